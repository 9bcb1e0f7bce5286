"""Where each process's share of a stream goes on: a checkpoint, which one process writes, holds that of all."""

from typing import Any

import lightning as L
import torch.distributed as dist

from genai_pl.errors import CheckpointError, ConfigError
from genai_pl.modules.base import n_replicas

SHARES = "shares"  # by the number of the replica, which all processes have that see the same batches


def gather_shares(trainer: L.Trainer, checkpoint: dict[str, Any]) -> dict[str, object]:
    """What a checkpoint says besides of a stream that several replicas read; all processes have to call this."""
    if not trainer.datamodule.streaming or n_replicas(trainer) == 1:
        return {}
    shares: list[tuple[int, object]] = [(0, None)] * trainer.world_size
    dist.all_gather_object(shares, (_replica(trainer), _progress(checkpoint)["combined_loader"]))
    return {SHARES: dict(shares)}


def restore_share(trainer: L.Trainer, checkpoint: dict[str, Any], ours: dict[str, Any]) -> None:
    """Put this process's share where Lightning looks for it; ConfigError where there are as many replicas no more."""
    if not trainer.datamodule.streaming:
        return
    before, now = ours.get("replicas", len(ours["rng"])), n_replicas(trainer)
    if before != now:
        raise ConfigError(
            f"trainer.devices: the stream was dealt to {before} processes, not {now}, and goes on with as many only; "
            "start another run from these weights with init_from="
        )
    if now > 1:
        if SHARES not in ours:
            raise CheckpointError("resume: an older version did not write where the stream of each process goes on")
        _progress(checkpoint)["combined_loader"] = ours[SHARES][_replica(trainer)]


def _progress(checkpoint: dict[str, Any]) -> dict[str, Any]:
    return checkpoint["loops"]["fit_loop"]["state_dict"]


def _replica(trainer: L.Trainer) -> int:
    return trainer.strategy.distributed_sampler_kwargs["rank"]
