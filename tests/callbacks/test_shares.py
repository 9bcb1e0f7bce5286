"""Positions in a stream of several processes: each continues with its own share, and only with as many processes."""

from types import SimpleNamespace

import pytest

from genai_pl.callbacks.shares import SHARES, restore_share
from genai_pl.errors import CheckpointError, ConfigError


def trainer(n: int, rank: int, *, streaming: bool = True) -> SimpleNamespace:
    dealt = {"rank": rank, "num_replicas": n}
    strategy = SimpleNamespace(distributed_sampler_kwargs=dealt)
    return SimpleNamespace(datamodule=SimpleNamespace(streaming=streaming), world_size=n, strategy=strategy)


def checkpoint() -> dict:
    return {"loops": {"fit_loop": {"state_dict": {"combined_loader": ["of process 0"]}}}}


def taken(trainer: SimpleNamespace, ours: dict) -> list[str]:
    restored = checkpoint()
    restore_share(trainer, restored, ours)
    return restored["loops"]["fit_loop"]["state_dict"]["combined_loader"]


def test_each_process_goes_on_with_its_own_share() -> None:
    ours = {"replicas": 2, "rng": [{}, {}], SHARES: {0: ["of process 0"], 1: ["of process 1"]}}
    assert [taken(trainer(2, rank), ours) for rank in range(2)] == [["of process 0"], ["of process 1"]]


def test_a_stream_that_is_dealt_otherwise_is_refused() -> None:
    for before, now in ((2, 1), (1, 2), (2, 4)):
        with pytest.raises(ConfigError, match=rf"trainer.devices: .* dealt to {before} processes, not {now}"):
            taken(trainer(now, 0), {"replicas": before, "rng": [{}] * before, SHARES: {}})
        assert taken(trainer(now, 0, streaming=False), {"replicas": before, "rng": []}) == ["of process 0"]


def test_a_checkpoint_without_the_shares_of_all_is_refused() -> None:
    with pytest.raises(CheckpointError, match="older version"):
        taken(trainer(2, 1), {"replicas": 2, "rng": [{}, {}]})
    assert taken(trainer(1, 0), {"replicas": 1, "rng": [{}]}) == ["of process 0"]
