"""The hyperparameters of an optimizer that comes back from a checkpoint: those that it is configured with now."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

Settings = list[dict[str, object]]


def settings_of(optimizer: Optimizer) -> Settings:
    """What each group of a new optimizer is configured with, its peak rate as `initial_lr`."""
    return [
        {name: value for name, value in group.items() if name not in ("lr", "params")}
        for group in optimizer.param_groups
    ]


def configure(optimizer: Optimizer, scheduler: LambdaLR, settings: Settings) -> None:
    """Give a restored optimizer these settings, and its groups the rate that the schedule has for the next step."""
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    curves = zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    for group, peak, curve in curves:
        group["lr"] = peak * curve(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
