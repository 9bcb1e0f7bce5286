"""Checkpoints by optimizer step that resume exactly: atomic, with everything that the next step depends on.

Beside Lightning's state a checkpoint holds the state of every random generator of every rank, the position of every
rank in its data, and model and tokenizer. A resumed run then draws the numbers and batches that the uninterrupted run
would have drawn. `AtomicCheckpointIO` writes and reads single files (sharded checkpoints go through the strategy);
`StepCheckpoint` decides when, what is kept, and what is restored.
"""

import logging
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import lightning as L
import numpy as np
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint, WeightAveraging

from genai_pl.callbacks.best import BestCheckpoint, remove_old
from genai_pl.callbacks.checkpoint_files import link, named_step, newest_checkpoints, step_of
from genai_pl.callbacks.due import passed
from genai_pl.callbacks.mirror import Mirror
from genai_pl.callbacks.shares import dropout_share, gather_shares, restore_share
from genai_pl.callbacks.validation import validate_if_due, validation_is_due
from genai_pl.checkpoints.file import MARK, read_checkpoint, write_checkpoint
from genai_pl.distributed.dtensor import local_shard
from genai_pl.errors import CheckpointError, ConfigError, TrainingError
from genai_pl.modules.base import n_replicas

log = logging.getLogger(__name__)


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's checkpoint plugin with atomic writes and data-only reads (`genai_pl.checkpoints.file`).

    written: called with the path of each complete checkpoint
    """

    def __init__(self, written: Callable[[Path], None]) -> None:
        self.written = written

    def save_checkpoint(self, checkpoint: dict, path: str | Path, storage_options: object = None) -> None:
        write_checkpoint(checkpoint, Path(path))
        self.written(Path(path))

    def load_checkpoint(self, path: str | Path, map_location: object = None, weights_only: bool | None = None) -> dict:
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


class StepCheckpoint(Checkpoint):
    """Writes `step=000200.ckpt` every n optimizer steps, keeps the newest few, and points `last.ckpt` at the newest.

    folder: of the run's checkpoints
    every_n_steps: optimizer steps between two of them, None: no such; the last step of a run always gets one
    keep: how many stay; at least the newest two until a step after the newest has given a finite loss
    every_n_minutes: minutes since the last one after which the next step gets one
    best: what keeps the best one; every step that is validated then gets one
    mirror: what copies the run folder into object storage, with every checkpoint

    `describe_run` gives the rest, which is known only when model and tokenizer are.
    """

    def __init__(
        self,
        folder: str,
        every_n_steps: int | None,
        keep: int,
        *,
        every_n_minutes: float | None = None,
        best: BestCheckpoint | None = None,
        mirror: Mirror | None = None,
    ) -> None:
        self.folder, self.every_n_steps, self.keep = Path(folder), every_n_steps, keep
        self.every_n_minutes, self.best, self.mirror = every_n_minutes, best, mirror
        self._saved = time.monotonic()  # when, in this process
        self.contents: dict[str, object] = {}  # these three from `describe_run`
        self.trained_only = False
        self.on_start: Callable[[], None] = lambda: None
        self.last_step = -1
        self.started = False  # whether a first step has begun
        self.seconds = 0.0  # that writing has taken in this process
        self._seen = 0
        self._unconfirmed = False  # whether no step has followed the newest checkpoint yet
        self._removing = threading.Lock()  # a thread that writes a checkpoint removes old ones, as training does
        self._rng: list[dict] = []  # generator states of the resumed run, by rank

    def describe_run(
        self, contents: dict[str, object], *, trained_only: bool = False, on_start: Callable[[], None]
    ) -> None:
        """Set what a checkpoint holds besides Lightning's state, and what to call when the run starts.

        contents: model, tokenizer, length, settings
        trained_only: leave out frozen weights: the base of an adapter, which is kept elsewhere
        on_start: called once by each process when all is restored
        """
        self.contents, self.trained_only, self.on_start = contents, trained_only, on_start

    @property
    def last(self) -> Path:
        """The link to the newest checkpoint."""
        return self.folder / "last.ckpt"

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: object) -> None:
        """Save where a checkpoint is due; inside an accumulation window there is nothing to save."""
        before, self._seen = self._seen, trainer.global_step
        if self._seen > max(before, self.last_step):  # the newest checkpoint's weights gave a finite loss
            self.confirm()
        if not module.window and self._seen > self.last_step and self._is_due(trainer, before):
            self.save(trainer)

    def _is_due(self, trainer: L.Trainer, before: int) -> bool:
        """Whether steps or minutes have passed, or this step is measured and may be the best; the same on all ranks."""
        if self.every_n_steps and passed(before, self._seen, self.every_n_steps):
            return True
        if self.best is not None and (
            self.best.measured_at(self._seen) if self.best.of_benchmarks else validation_is_due(trainer)
        ):
            return True
        if self.every_n_minutes is None:
            return False
        return trainer.strategy.broadcast(time.monotonic() - self._saved >= 60 * self.every_n_minutes)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Save the last step, if it has no checkpoint yet."""
        if trainer.global_step and trainer.global_step != self.last_step:
            self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Write the checkpoint of the current step.

        TrainingError, and nothing is written, where a weight is so large that no loss can be computed: the checkpoint
        before it is worth more than one that cannot be trained on.
        """
        if not _is_finite(trainer):
            raise TrainingError(f"the weights have grown out of all bounds at step {trainer.global_step}")
        self.last_step, start = trainer.global_step, time.perf_counter()
        trainer.save_checkpoint(self.folder / f"step={trainer.global_step:06d}.ckpt")
        self.seconds += time.perf_counter() - start
        self._saved = time.monotonic()

    def written(self, path: Path) -> None:
        """Point `last.ckpt` at a complete checkpoint of this folder, and remove the oldest."""
        if path.parent != self.folder or not path.name.startswith("step="):
            return
        link(path, self.last)
        if self.best is not None:
            self.best.point()  # a thread may have been writing it during the validation
        self._unconfirmed = True
        # the previous one is known to be good; this one only after the next step
        if self.mirror is not None:
            self.mirror.wait()  # nothing is removed while it is being copied
        self._keep_newest(max(self.keep, 2))
        if self.mirror is not None:
            self.mirror.best = None if self.best is None else self.best.file_name
            self.mirror.start()

    def confirm(self) -> None:
        """Note that the weights of the newest checkpoint have given a finite loss: older ones may be removed."""
        if self._unconfirmed:
            self._unconfirmed = False
            self._keep_newest(self.keep)

    def set_aside(self, step: int) -> Path | None:
        """Rename the checkpoint of a step to `aside-...`, so that no run resumes from it; None if there is none.

        For weights that give no finite loss. Returns the new path; `last.ckpt` then points at the newest remaining
        one.
        """
        path = self.folder / f"step={step:06d}.ckpt"
        if not path.exists():
            return None
        aside = path.rename(path.with_name(f"aside-{path.name}"))
        self.last.unlink(missing_ok=True)
        if left := newest_checkpoints(self.folder):
            link(left[0], self.last)
        if self.best is not None:
            self.best.point()
        return aside

    def _keep_newest(self, n: int) -> None:
        """Remove all but the n checkpoints of the highest steps, and the best ones."""
        with self._removing:
            remove_old(sorted(self.folder.glob("step=*.ckpt"), key=named_step), n, self.best)

    def begin(self) -> None:
        """Call `on_start` once: all is restored, and the run may write."""
        if not self.started:
            self.started = True
            self.on_start()

    def rewind(self, checkpoint: Path) -> None:
        """Set aside the checkpoints after the step that a run resumes from: they would count as newer."""
        step = step_of(checkpoint)
        for path in self.folder.glob("step=*.ckpt"):
            if named_step(path) > step:
                path.rename(path.with_name(f"aside-{path.name}"))
                log.info("checkpoint  %s is set aside: the run goes on from step %d", path, step)
        own = self.folder / f"step={step:06d}.ckpt"  # best.ckpt is a second name that will move on
        if checkpoint.parent == self.folder and checkpoint != self.last:
            link(own if own.exists() else checkpoint, self.last)
        if self.best is not None:
            self.best.rewind()
        self._unconfirmed = True  # what the stopped run had no time to remove goes with the next step

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict) -> None:
        """Add generator states of all ranks, data positions and `contents`; drop frozen weights if so set. A collective."""
        # generator states of all ranks, in one file
        states = [None] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(states, _rng_state())
        else:
            states = [_rng_state()]
        # without the frozen weights of an adapter's base
        if self.trained_only:
            frozen = {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
            for kind in {
                "state_dict",
                "current_model_state",
            } & checkpoint.keys():  # the second exists beside averaged weights
                checkpoint[kind] = {name: x for name, x in checkpoint[kind].items() if name not in frozen}
        checkpoint[MARK] = {
            "format": 1,
            "saved": time.time(),
            "rng": states,
            "replicas": n_replicas(trainer),
            "dropout_shares": dropout_share(trainer)[1],
            **gather_shares(trainer, checkpoint),
            **self.contents,
        }

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict) -> None:
        """Check that the checkpoint fits this run, and prepare its progress, data position and generator states.

        ConfigError where its weights are averages that need callbacks=ema; CheckpointError where trained weights are
        missing.
        """
        averages = any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)
        if "current_model_state" in checkpoint and not averages:  # `state_dict` holds the averages
            raise ConfigError("callbacks: the run keeps means of its weights, and goes on with callbacks=ema only")
        # batches of the current epoch, counted in this run's batch size
        self.last_step = checkpoint["global_step"]
        _set_progress(checkpoint["loops"]["fit_loop"], rows_per_batch(trainer))
        # every trained weight must be in it
        missing = {name for name, p in module.named_parameters() if p.requires_grad} - set(checkpoint["state_dict"])
        if missing:
            raise CheckpointError(f"the checkpoint lacks {min(missing)}: it is of another model or adapter")
        # this replica's position in a stream, and generator states if there are as many replicas
        ours = checkpoint[MARK]
        restore_share(trainer, checkpoint, ours)
        replicas = ours.get("replicas", len(ours["rng"]))
        if (replicas, ours.get("dropout_shares", replicas)) == (n_replicas(trainer), dropout_share(trainer)[1]):
            self._rng = ours["rng"]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Restore the generators, as late as possible, and run a validation that was due when the run was stopped.

        With another number of replicas no saved state fits; each replica then seeds itself from seed, step and number.
        """
        self.begin()
        self._seen = trainer.global_step
        validate_if_due(trainer)
        # the data iterators exist by now: nothing is drawn between here and the next step
        if len(self._rng) == trainer.world_size:
            _set_rng(self._rng[trainer.global_rank])
        elif (share := dropout_share(trainer))[1] > 1:  # dropout differs where tokens do
            torch.manual_seed(hash((torch.initial_seed(), self._seen, share[0])))
        self._rng = []


@torch.no_grad()
def _is_finite(trainer: L.Trainer) -> bool:
    """Whether the norm of every trained weight is finite, on all ranks.

    A norm in float32 overflows for weights whose squares do, and such weights overflow in a model, too.
    """
    weights = [
        local_shard(p) for p in trainer.lightning_module.parameters() if p.requires_grad and p.is_floating_point()
    ]
    norms = torch._foreach_norm(weights, 2, torch.float32) if weights else []
    finite = all(bool(torch.isfinite(norm)) for norm in norms)
    return finite if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(finite, all=True)


def rows_per_batch(trainer: L.Trainer) -> int:
    """Rows of one batch over all processes."""
    plan = trainer.datamodule.batch_plan()
    return plan.batch_size * plan.world_size


def _set_progress(loop: dict, rows: int) -> None:
    """Count the batches of the current epoch in batches of `rows` rows; none if the epoch was complete.

    Lightning would continue from the old count: with another batch size or number of processes it would end the epoch
    too early, or after a single batch.
    """
    batches, epochs = loop["epoch_loop.batch_progress"], loop["epoch_progress"]
    in_its_end = batches["current"]["completed"] < batches["current"]["ready"]  # saved while its last batch ended
    if batches["is_last_batch"] and in_its_end:
        for count in epochs.values():  # Lightning has not counted the epoch that a resumed run had begun in
            count |= {"ready": count["completed"] + 1, "started": count["completed"] + 1}
    elif batches["is_last_batch"] and epochs["total"]["completed"] == epochs["total"]["ready"]:
        steps = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
        for progress in (batches, loop["epoch_loop.scheduler_progress"], *steps.values()):
            progress["current"] = dict.fromkeys(progress["current"], 0)
        batches["is_last_batch"] = False
        return
    (loader,) = loop["state_dict"]["combined_loader"]
    if "rows" in loader:  # a stream has no epochs
        moved = loader["rows"] // rows - batches["current"]["ready"]
        batches["current"] = {name: count + moved for name, count in batches["current"].items()}


def _rng_state() -> dict[str, object]:
    """States of torch's, Python's, numpy's and CUDA's generators, as tensors and plain data that weights_only can load."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_rng(state: dict) -> None:
    """Restore what `_rng_state` returned; CUDA's only if there are as many devices."""
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    if "cuda" in state and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
