"""Positions of all replicas in a stream: the checkpoint, which one process writes, holds those of all.

Each replica reads its own share of a stream. Its position in that share is part of Lightning's state, of which a
checkpoint holds only that of the writing process; so they are gathered when saving, and each replica takes its own
when loading.
"""

from typing import Any

import lightning as L
import torch.distributed as dist

from genai_pl.errors import CheckpointError, ConfigError
from genai_pl.modules.base import n_replicas

SHARES = "shares"  # key of the positions, by replica; processes that see the same batches are one replica


def gather_shares(trainer: L.Trainer, checkpoint: dict[str, Any]) -> dict[str, object]:
    """The positions of all replicas, for a checkpoint; nothing without a stream or with one replica. A collective."""
    if not trainer.datamodule.streaming or n_replicas(trainer) == 1:
        return {}
    shares: list[tuple[int, object]] = [(0, None)] * trainer.world_size
    dist.all_gather_object(shares, (_replica(trainer), _progress(checkpoint)["combined_loader"]))
    return {SHARES: dict(shares)}


def restore_share(trainer: L.Trainer, checkpoint: dict[str, Any], ours: dict[str, Any]) -> None:
    """Put this replica's position where Lightning looks for it.

    ConfigError if the number of replicas has changed: a stream dealt to n readers can only be continued by n.
    """
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


def dropout_share(trainer: L.Trainer) -> tuple[int, int]:
    """The number of this process's share of the tokens, and that of all shares: each is dropped by other random numbers.

    A share is that of a replica, or of a rank of its context-parallel group.
    """
    group = trainer.lightning_module.model.context_group
    replica = _replica(trainer) if n_replicas(trainer) > 1 else 0
    return replica * group.size + group.rank, n_replicas(trainer) * group.size


def _progress(checkpoint: dict[str, Any]) -> dict[str, Any]:
    return checkpoint["loops"]["fit_loop"]["state_dict"]


def _replica(trainer: L.Trainer) -> int:
    return trainer.strategy.distributed_sampler_kwargs["rank"]
