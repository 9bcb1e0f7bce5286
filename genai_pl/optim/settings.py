"""Optimizer settings on resuming: hyperparameters come from this run's configuration, not from the checkpoint."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

Settings = list[dict[str, object]]


def settings_of(optimizer: Optimizer) -> Settings:
    """The options of each group of a new optimizer, its peak learning rate as `initial_lr`."""
    return [
        {name: value for name, value in group.items() if name not in ("lr", "params")}
        for group in optimizer.param_groups
    ]


def configure(optimizer: Optimizer, scheduler: LambdaLR, settings: Settings) -> None:
    """Give a restored optimizer these settings, and each group the learning rate that the schedule has for the next step.

    Loading a state dict overwrites groups with those of the checkpoint: a run resumed with another lr would ignore it.
    """
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    curves = zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    for group, peak, curve in curves:
        group["lr"] = peak * curve(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
