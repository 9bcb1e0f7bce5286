"""Float8: the layers that multiply in it, and one line where none can."""

import pytest
import torch
from torch import nn

from genai_pl.errors import ConfigError
from genai_pl.strategies import float8 as module
from genai_pl.strategies.float8 import check_float8, fits_float8
from tests.conftest import TINY


def test_float8_without_a_gpu_is_one_line(command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = command("train", *TINY, "precision=fp8")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "precision=fp8 needs a GPU that multiplies in it" in result.err
    assert "precision=bf16" in result.err


@pytest.mark.parametrize(
    ("capability", "said"), [((8, 0), "needs a GPU that multiplies"), ((9, 0), "pip install torchao")]
)
def test_an_old_gpu_and_a_missing_package_are_told(
    capability: tuple[int, int], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setitem(check_float8.__globals__, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=said):
        module(nn.Module())


def test_layers_whose_sizes_the_product_refuses_stay_as_they_are() -> None:
    assert fits_float8(nn.Linear(32, 48))
    assert not fits_float8(nn.Linear(32, 50))
    assert not fits_float8(nn.Embedding(32, 32))
