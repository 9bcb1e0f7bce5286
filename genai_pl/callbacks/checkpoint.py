"""Checkpoints by step that resume exactly: written whole or not at all, with everything that the next step depends on."""

import logging
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import lightning as L
import numpy as np
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from genai_pl.callbacks.due import passed
from genai_pl.callbacks.shares import gather_shares, take_share
from genai_pl.errors import CheckpointError
from genai_pl.files import CONTENTS, is_checkpoint, start_writing
from genai_pl.models.checkpoint import MARK, read_checkpoint, read_contents, write_checkpoint
from genai_pl.modules.base import n_replicas

log = logging.getLogger(__name__)


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's reading and writing through ours: temporary name, flush, rename; and data only on the way in."""

    def __init__(self, written: Callable[[Path], None]) -> None:
        self.written = written  # told of each checkpoint that is whole

    def save_checkpoint(self, checkpoint: dict, path: str | Path, storage_options: object = None) -> None:
        write_checkpoint(checkpoint, Path(path))
        self.written(Path(path))

    def load_checkpoint(self, path: str | Path, map_location: object = None, weights_only: bool | None = None) -> dict:
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


class StepCheckpoint(Checkpoint):
    """Writes `step=000200.ckpt` every n optimizer steps, keeps the newest few, and points `last.ckpt` at the newest."""

    def __init__(self, folder: str, every_n_steps: int, keep: int) -> None:
        self.folder, self.every_n_steps, self.keep = Path(folder), every_n_steps, keep
        self.contents: dict[str, object] = {}  # what a checkpoint says besides Lightning's state: model, tokenizer
        self.trained_only = False  # leave out what is frozen: the base of an adapter, which can be had elsewhere
        self.last_step = -1
        self.started = False  # whether a first step has begun
        self.on_start: Callable[[], None] = lambda: None  # called once, by each process, when all is restored
        self._seen = 0
        self._rng: list[dict] = []  # of the run that goes on, by rank

    @property
    def last(self) -> Path:
        return self.folder / "last.ckpt"

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: object) -> None:
        before, self._seen = self._seen, trainer.global_step
        if passed(before, self._seen, self.every_n_steps) and not module.window:
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.global_step and trainer.global_step != self.last_step:
            self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Write the checkpoint of the current step."""
        self.last_step = trainer.global_step
        trainer.save_checkpoint(self.folder / f"step={trainer.global_step:06d}.ckpt")

    def written(self, path: Path) -> None:
        """Point `last.ckpt` at the checkpoint if it is one of ours, and forget the oldest."""
        if path.parent != self.folder or not path.name.startswith("step="):
            return
        _link(path, self.last)
        for old in sorted(self.folder.glob("step=*.ckpt"), key=_named_step)[: -self.keep]:
            _forget(old)

    def begin(self) -> None:
        """Say that all is restored: from here on the run writes."""
        if not self.started:
            self.started = True
            self.on_start()

    def rewind(self, checkpoint: Path) -> None:
        """Set aside what a run wrote after the step that it goes on from, which would count as newer."""
        step = step_of(checkpoint)
        for path in self.folder.glob("step=*.ckpt"):
            if _named_step(path) > step:
                path.rename(path.with_name(f"aside-{path.name}"))
                log.info("checkpoint  %s is set aside: the run goes on from step %d", path, step)
        if checkpoint.parent == self.folder and checkpoint != self.last:
            _link(checkpoint, self.last)

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict) -> None:
        states = [None] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(states, _rng_state())
        else:
            states = [_rng_state()]
        if self.trained_only:
            frozen = {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
            for kind in {"state_dict", "current_model_state"} & checkpoint.keys():  # the second beside means of weights
                checkpoint[kind] = {name: x for name, x in checkpoint[kind].items() if name not in frozen}
        checkpoint[MARK] = {
            "format": 1,
            "saved": time.time(),
            "rng": states,
            "replicas": n_replicas(trainer),
            **gather_shares(trainer, checkpoint),
            **self.contents,
        }

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict) -> None:
        self.last_step = checkpoint["global_step"]
        _set_progress(checkpoint["loops"]["fit_loop"], rows_per_batch(trainer))
        missing = {name for name, p in module.named_parameters() if p.requires_grad} - set(checkpoint["state_dict"])
        if missing:
            raise CheckpointError(f"the checkpoint lacks {min(missing)}: it is of another model or adapter")
        ours = checkpoint[MARK]
        take_share(trainer, checkpoint, ours)
        if ours.get("replicas", len(ours["rng"])) == n_replicas(trainer):
            self._rng = ours["rng"]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.begin()
        self._seen = trainer.global_step
        # the data iterators exist by now: nothing draws between here and the next step
        if len(self._rng) == trainer.world_size:
            _set_rng(self._rng[trainer.global_rank])
        elif n_replicas(trainer) > 1:  # dropout differs where batches do
            replica = trainer.strategy.distributed_sampler_kwargs["rank"]
            torch.manual_seed(hash((torch.initial_seed(), self._seen, replica)))
        self._rng = []


def newest_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run by their steps, the last first; times say nothing of a folder that was copied."""
    paths = [path for path in [*folder.glob("last.ckpt"), *folder.glob("step=*.ckpt")] if is_checkpoint(path)]
    found = {path.stat().st_ino: path for path in paths}
    return sorted(found.values(), key=_step_at_least, reverse=True)


def _named_step(path: Path) -> int:
    """The step in a checkpoint's name."""
    number = path.name.removeprefix("step=").removesuffix(".ckpt")
    return int(number) if number.isdecimal() else -1


def _step_at_least(path: Path) -> int:
    """The step of a checkpoint; one that has it neither in its name nor in readable contents stands before all others."""
    if (step := _named_step(path)) >= 0:
        return step
    try:
        return step_of(path)
    except CheckpointError:
        return sys.maxsize


def step_of(path: Path) -> int:
    """The optimizer step at which a checkpoint was written."""
    return read_contents(path).get("global_step", 0)


def saved_at(path: Path) -> tuple[float, int]:
    """When a checkpoint was written, as it says itself, and its step; zeros where it cannot be read."""
    try:
        contents = read_contents(path)
    except CheckpointError:
        return 0.0, 0
    written = contents[MARK].get("saved")
    return min(written if isinstance(written, float) else path.stat().st_mtime, time.time()), contents.get(
        "global_step", 0
    )


def rows_per_batch(trainer: L.Trainer) -> int:
    """How many rows all processes take together for a batch."""
    plan = trainer.datamodule.plan()
    return plan.batch_size * plan.world_size


def _set_progress(loop: dict, rows: int) -> None:
    """Count the batches of the epoch under way as the loader does, in batches of `rows` rows; none of one that was over.

    Lightning counts on from the old batches: it would leave the epoch too early, or after a single batch.
    """
    batches, epochs = loop["epoch_loop.batch_progress"], loop["epoch_progress"]["total"]
    if batches["is_last_batch"] and epochs["completed"] == epochs["ready"]:
        steps = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
        for progress in (batches, loop["epoch_loop.scheduler_progress"], *steps.values()):
            progress["current"] = dict.fromkeys(progress["current"], 0)
        batches["is_last_batch"] = False
        return
    (loader,) = loop["state_dict"]["combined_loader"]
    if "rows" in loader:  # a stream has no epochs
        moved = loader["rows"] // rows - batches["current"]["ready"]
        batches["current"] = {name: count + moved for name, count in batches["current"].items()}


def _link(path: Path, link: Path) -> None:
    """A second name for the file or folder, swapped in one rename (a copy where the disk has no hard links)."""
    temporary = start_writing(link)
    try:
        if path.is_dir():
            temporary.symlink_to(path.name)
        else:
            os.link(path, temporary)
    except OSError:
        temporary.write_bytes(path.read_bytes())
    os.replace(temporary, link)
    temporary.unlink(missing_ok=True)  # two names of one file are left as they are: `link` was that of `path`


def _forget(path: Path) -> None:
    if path.is_dir():
        (path / CONTENTS).unlink(missing_ok=True)  # half a folder is no checkpoint
        shutil.rmtree(path)
    else:
        path.unlink()


def _rng_state() -> dict[str, object]:
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
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    if "cuda" in state and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
