"""Every optimizer and schedule that conf/ offers can be built as the commands build it."""

from functools import partial
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from genai_pl.optim.settings import configure, settings_of
from genai_pl.training.length import with_warmup

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


OTHER = {"betas": [0.5, 0.6], "nesterov": True, "momentum": 0.3, "adjust_lr": "match_rms_adamw", "clip_threshold": 2.0}


@pytest.mark.parametrize("option", sorted(path.stem for path in (CONF / "optimizer").glob("*.yaml")))
def test_a_restored_optimizer_has_every_option_that_it_is_configured_with_now(option: str):
    config = OmegaConf.to_container(OmegaConf.load(CONF / "optimizer" / f"{option}.yaml"))
    numbers = {name: value for name, value in config.items() if not name.startswith("_") and value is not None}
    changed = {name: OTHER[name] if name in OTHER else value * 0.5 for name, value in numbers.items()}
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    before, after = (instantiate(config | more)(model.named_parameters()) for more in ({}, changed))
    scheduler = LambdaLR(after, lambda step: 1.0)
    wanted = [{name: value for name, value in group.items() if name != "params"} for group in after.param_groups]
    settings = settings_of(after)
    after.load_state_dict(before.state_dict())
    configure(after, scheduler, settings)
    for group, expected in zip(after.param_groups, wanted, strict=True):
        assert {name: value for name, value in group.items() if name != "params"} == expected
