"""The mixture schedule: which source gives the next row, so that each keeps its share to within one row.

Nothing is drawn: rows are dealt as a fair queue deals its link. After rows of N tokens in all, source i with the weight
w_i (of weights that sum to 1) is entitled to the sum of w_i * tokens over those rows; its lag is that minus what it gave.
The next row comes from the sources that lag, from the one whose entitlement covers its next row first (earliest
eligible virtual deadline first, Stoica and Abdel-Wahab 1995; worst-case-fair queueing, Bennett and Zhang 1996). So no
source is ahead of its share, nor behind it, by more than about one of its longest rows, however long the run.

The order is a function of seed and position: the state is a few numbers for each source.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from genai_pl.errors import DataError

Points = Sequence[tuple[float, float]]  # (fraction of the run, weight), by increasing fraction
ROUNDING = 1e-6  # tokens by which a lag may be off


class SourcePlan(NamedTuple):
    """The part of one source in a mixture.

    name: of the source. weight: its weight over the run, piecewise linear. n_rows: rows of a pass, None for a stream.
    costs: what each row takes of a share, tokens or examples; one number where all rows are equal. tokens: tokens of each
    row, likewise. max_rows, cap: rows and costs after which the source ends, None for never.
    """

    name: str
    weight: Points
    n_rows: int | None
    costs: np.ndarray | int
    tokens: np.ndarray | int
    max_rows: int | None = None
    cap: int | None = None


class Draw(NamedTuple):
    """One row: the number of its source, the pass over it, and the row's number; of a stream, how many came before."""

    source: int
    epoch: int
    row: int


class Mixture:
    """The endless sequence of rows of several sources.

    total_rows: rows of the run, over which weights are interpolated. seed, shuffle: of the order within a pass.
    temperature: weights are raised to 1 / temperature: above 1 small sources count more.

    `rows`, `tokens` and `spent` are what each source gave so far; `lags` what it is owed.

    >>> plans = [SourcePlan(name, [(0.0, weight)], 10, 1, 1) for name, weight in (("a", 3), ("b", 1))]
    >>> mixture = Mixture(plans, total_rows=8)
    >>> "".join("ab"[mixture.take().source] for _ in range(8))
    'abaaabaa'
    """

    def __init__(
        self,
        plans: Sequence[SourcePlan],
        *,
        total_rows: int,
        seed: int = 0,
        shuffle: bool = True,
        temperature: float = 1.0,
    ) -> None:
        self.plans, self.total_rows = list(plans), max(1, total_rows)
        self.seed, self.shuffle, self.temperature = seed, shuffle, temperature
        n = len(self.plans)
        self.rows, self.tokens, self.spent, self.lags = [0] * n, [0] * n, [0] * n, [0.0] * n
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # of the present pass, by source
        self._constant = all(len(plan.weight) == 1 for plan in self.plans)
        self._forget()

    def _forget(self) -> None:
        """Drop what was computed ahead: the next row of each source, and the weights."""
        self._next: list[tuple[Draw, int, int] | None] = [None] * len(self.plans)
        self._weights: list[float] | None = None
        self._active: list[int] = []  # sources in play

    def take(self) -> Draw:
        """The next row; DataError where every source has ended or has no weight now."""
        # weights of the sources in play, which inherit what the others are owed
        if self._weights is None or not self._constant:
            self._weights = self.weights()
            self._active = [n for n, weight in enumerate(self._weights) if weight]
            if owed := sum(lag for lag, weight in zip(self.lags, self._weights, strict=True) if not weight):
                self.lags = [(lag + owed * w if w else 0.0) for lag, w in zip(self.lags, self._weights, strict=True)]
        lags, weights = self.lags, self._weights
        # of those that lag, the one that is entitled to its whole next row first
        chosen, first = -1, float("inf")
        for n in [n for n in self._active if lags[n] >= -ROUNDING] or self._active:
            deadline = (self._ahead(n)[1] - lags[n]) / weights[n]
            if deadline < first:
                chosen, first = n, deadline
        draw, cost, tokens = self._ahead(chosen)
        # account for it
        for n in self._active:
            lags[n] += weights[n] * cost
        lags[chosen] -= cost
        self.rows[chosen] += 1
        self.tokens[chosen] += tokens
        self.spent[chosen] += cost
        self._next[chosen] = None
        if self.ended(chosen):
            self._weights = None
        return draw

    def weights(self) -> list[float]:
        """Weights at this row, which sum to 1; 0 for a source that has ended."""
        fraction = sum(self.rows) / self.total_rows
        values = [
            0.0 if self.ended(n) else interpolate(plan.weight, fraction) ** (1 / self.temperature)
            for n, plan in enumerate(self.plans)
        ]
        total = sum(values)
        if not total:
            raise DataError(
                f"data.sources: after {sum(self.rows):,} rows ({fraction:.0%} of the run) every source has ended or has "
                "the weight 0; raise epochs or cap, or lower trainer.max_steps"
            )
        return [value / total for value in values]

    def ended(self, n: int) -> bool:
        """Whether source n has given all that its `max_rows` or `cap` allow."""
        plan = self.plans[n]
        if plan.max_rows is not None and self.rows[n] >= plan.max_rows:
            return True
        return plan.cap is not None and self.spent[n] + self._ahead(n)[1] > plan.cap

    def passes(self, n: int) -> float | None:
        """Passes over source n so far; None for a stream."""
        n_rows = self.plans[n].n_rows
        return None if n_rows is None else self.rows[n] / n_rows

    def _ahead(self, n: int) -> tuple[Draw, int, int]:
        """The next row of source n with its cost and tokens."""
        if self._next[n] is None:
            plan, given = self.plans[n], self.rows[n]
            if plan.n_rows is None:
                draw = Draw(n, 0, given)
            else:
                epoch, position = divmod(given, plan.n_rows)
                draw = Draw(n, epoch, int(self._order(n, epoch)[position]))
            self._next[n] = draw, _at(plan.costs, draw.row), _at(plan.tokens, draw.row)
        return self._next[n]

    def _order(self, n: int, epoch: int) -> np.ndarray:
        """The numbers of the rows of source n in the order of a pass."""
        if self._orders.get(n, (None,))[0] != epoch:
            size = self.plans[n].n_rows
            draw = np.random.default_rng([self.seed, n, epoch])
            self._orders[n] = epoch, draw.permutation(size) if self.shuffle else np.arange(size)
        return self._orders[n][1]

    def state_dict(self) -> dict[str, list]:
        """What each source gave and is owed, for `load_state_dict`."""
        return {"rows": [*self.rows], "tokens": [*self.tokens], "spent": [*self.spent], "lags": [*self.lags]}

    def load_state_dict(self, state: dict[str, list]) -> None:
        """Continue after a `state_dict`."""
        self.rows, self.tokens, self.spent, self.lags = ([*state[k]] for k in ("rows", "tokens", "spent", "lags"))
        self._forget()


def _at(values: np.ndarray | int, row: int) -> int:
    """The value of a row."""
    return values if isinstance(values, int) else int(values[row])


def interpolate(points: Points, fraction: float) -> float:
    """The weight at a fraction of the run: linear between points, constant before the first and after the last.

    >>> [interpolate([(0.5, 2.0), (1.0, 4.0)], fraction) for fraction in (0.0, 0.75, 1.5)]
    [2.0, 3.0, 4.0]
    """
    after = bisect_right(points, fraction, key=lambda point: point[0])
    if after == 0:
        return points[0][1]
    if after == len(points):
        return points[-1][1]
    (x0, y0), (x1, y1) = points[after - 1], points[after]
    return y0 + (y1 - y0) * (fraction - x0) / (x1 - x0)
