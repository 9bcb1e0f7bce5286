"""Every optimizer and schedule that conf/ offers can be built as the commands build it."""

from functools import partial
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from genai_pl.length import with_warmup

CONF = Path(__file__).parents[2] / "conf"


@pytest.mark.parametrize("option", sorted(path.stem for path in (CONF / "optimizer").glob("*.yaml")))
def test_every_optimizer_option_builds_steps_and_saves_plain_data(option: str, tmp_path: Path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = instantiate(OmegaConf.load(CONF / "optimizer" / f"{option}.yaml"))(model.named_parameters())
    model(torch.ones(3, 4)).square().mean().backward()
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    torch.load(tmp_path / "optimizer.pt", weights_only=True)


@pytest.mark.parametrize("option", sorted(path.stem for path in (CONF / "scheduler").glob("*.yaml")))
def test_every_scheduler_option_warms_up_to_one_and_stays_within_it(option: str):
    config = OmegaConf.load(CONF / "scheduler" / f"{option}.yaml")
    curve = partial(with_warmup(instantiate(config), 1000, None), total_steps=1000)
    multipliers = [curve(step) for step in range(1500)]
    assert multipliers[100] == max(multipliers) == 1.0
    assert multipliers[99] < 1.0
    assert min(multipliers) >= 0.0
