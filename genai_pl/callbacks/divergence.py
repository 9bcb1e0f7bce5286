"""Divergence: one warning where the training loss rises far above its best, and one line at the end if it stays there.

The difficulty is noise: small batches have losses of any height, and a loss near 0 may triple harmlessly. So levels
    are medians of several losses, and a rise counts only in proportion to the differences that neighbouring steps had
    at the best level.
"""

import logging
import math
from collections import deque
from statistics import fmean, median

import lightning as L

log = logging.getLogger(__name__)

RECENT, LEAST = 5, 3  # losses whose median is a level, and the fewest of which one is taken
TIMES = 3.0  # a loss is far above the best level if it is above this many times that,
NOISES = 4.0  # and also above it by this many mean differences between neighbouring steps
EXPLODES = 10.0  # two losses above this many times the first one, and above this value, are enough
HISTORY, FIRST = 100, 10  # differences that are kept, and steps after which those at the best level count


class LossWatch:
    """The losses of a run, step by step, and whether the recent ones are far above the best level.

    The best level is the lowest median of 5 losses. A run has diverged when each of the last 5 is more than 3 times
    that, and 4 mean differences between neighbouring steps, as they were at the best level: one hard batch does not
    count, small batches are noisy, and a loss near 0 may triple. In the first 10 steps a difference counts at most as
    the larger of first loss and best level, plus 1, as an explosion is no noise. Two losses above 3 times that bound
    and 10 times the first loss, or 10, are enough.

    diverged: whether the run has diverged, and has not come back since
    """

    def __init__(self) -> None:
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.differences: deque[float] = deque(maxlen=HISTORY)
        self.best, self.best_step = math.inf, 0  # level, and the step at which it was reached
        self.last, self.last_step = 0.0, 0
        self.first, self.n_steps, self.noise = 0.0, 0, 0.0
        self.diverged = False

    def add(self, step: int, loss: float) -> bool:
        """Count the loss of a step; returns whether a divergence begins with it."""
        if not math.isfinite(loss):
            return False  # a step that fp16 loss scaling skips
        # history of losses and of their differences
        if not self.n_steps:
            self.first = loss
        if self.recent:
            self.differences.append(abs(loss - self.recent[-1]))
        self.recent.append(loss)
        self.last, self.last_step, self.n_steps = loss, step, self.n_steps + 1
        # best level so far, and the noise there
        level = median(self.recent) if self.n_steps >= LEAST else loss
        best = level < self.best
        if best:
            self.best, self.best_step = level, step
        if self.differences and (best or self.n_steps <= FIRST):
            noise = fmean(self.differences)
            most = max(abs(self.best), abs(self.first)) + 1
            self.noise = min(noise, most) if self.n_steps <= FIRST else noise
        # five losses far above the best level, or two enormous ones
        is_far_above = len(self.recent) == RECENT and min(self.recent) > self.limit()
        explodes = self.n_steps >= LEAST and min(list(self.recent)[-2:]) > max(
            3 * self.limit(), EXPLODES * max(abs(self.first), 1.0)
        )
        before, self.diverged = self.diverged, is_far_above or explodes
        return self.diverged and not before

    def limit(self) -> float:
        """The loss above which all of the last ones are far above the best level."""
        return self.best + (TIMES - 1) * abs(self.best) + NOISES * self.noise

    def describe(self) -> str:
        """The last loss beside the best level."""
        return f"loss {self.last:.4g} at step {self.last_step}, best {self.best:.4g} at step {self.best_step}"


class Divergence(L.Callback):
    """Warns in one line when a run diverges, and again at its end if it has not come back."""

    def __init__(self) -> None:
        self.watch = LossWatch()

    def state_dict(self) -> dict[str, object]:
        return {name: list(x) if isinstance(x, deque) else x for name, x in vars(self.watch).items()}

    def load_state_dict(self, state: dict[str, object]) -> None:
        for name, value in vars(self.watch).items():
            restored = state.get(name, value)
            setattr(self.watch, name, deque(restored, maxlen=value.maxlen) if isinstance(value, deque) else restored)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: object) -> None:
        """Watch the loss once per optimizer step, of objectives whose loss is expected to fall (`loss_falls`)."""
        if not module.loss_falls or trainer.global_step == self.watch.last_step or module.window:
            return
        begins = self.watch.add(trainer.global_step, float(module.step_loss))  # the step has synchronized already
        if begins and trainer.is_global_zero:
            log.warning("diverging   %s; lower optimizer.lr, or warm up for longer", self.watch.describe())

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.watch.diverged and trainer.is_global_zero:
            log.warning("diverged    %s", self.watch.describe())
