"""Curriculum: prompts are drawn by how often they were answered well so far, those near one half the most.

A prompt that is always or never answered well teaches a policy nothing: the variance of its reward, p (1 - p) for a pass
rate p, is what a policy gradient learns from (Foster et al. 2025, "Learning to reason at the frontier of learnability"; Bae
et al. 2025, "Online difficulty filtering"). Pass rates are measured by the rollouts themselves. They are the same on all
ranks, and draws depend on seed and step alone: a number of processes, or a resume, changes no prompt.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from genai_pl.errors import ConfigError

KEPT = 0.5  # of what a prompt had shown before it is measured again: the policy has changed since
STATE = "curriculum"  # in checkpoints


class Curriculum:
    """The pass rates of R prompts, and draws by them.

    share: of the prompts of a rollout that are drawn; the others come in the order of the data. pass_score: least score of a
    completion that passes. tries, passes: (R,) completions so far and those that passed, earlier ones weighing less.
    """

    def __init__(self, n_rows: int, *, share: float, pass_score: float) -> None:
        self.share, self.pass_score = share, pass_score
        self.tries, self.passes = torch.zeros(2, n_rows, dtype=torch.float64)
        self._new = torch.zeros(2, n_rows, dtype=torch.float64)  # of this rank and step

    def weights(self) -> Tensor:
        """p (1 - p) of each prompt, (R,); p = (passes + 1) / (tries + 2) is 1/2 before the first try."""
        rates = (self.passes + 1) / (self.tries + 2)
        return rates * (1 - rates)

    def draw(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Numbers of prompts (N,) of which a share is drawn anew, without any twice; -1 stays.

        rows: in the order of the data, of all ranks. generator: on the CPU, the same on all ranks.
        """
        places = (rows >= 0).nonzero()[:, 0]
        n = int(self.share * len(places) + 0.5)
        places = places[torch.randperm(len(places), generator=generator)[:n]]
        kept = rows.clone()
        kept[places] = -1
        weights = self.weights()
        weights[kept[kept >= 0]] = 0
        n = min(n, int((weights > 0).sum()))  # a set of fewer prompts than a rollout has
        if n:
            drawn = rows.clone()
            drawn[places[:n]] = torch.multinomial(weights, n, generator=generator)
            return drawn
        return rows

    def order(self, generator: torch.Generator) -> Tensor:
        """All prompts (R,) in a drawn order, likely ones first."""
        return torch.multinomial(self.weights(), len(self.tries), generator=generator)

    def record(self, rows: Sequence[int] | Tensor, scores: Tensor) -> None:
        """Count the completions of prompts by their scores (N,), N / len(rows) neighbours for each; nan is no try."""
        scores = scores.detach().double().cpu().view(len(rows), -1)
        numbers = torch.as_tensor(rows)
        tried = (~scores.isnan()).sum(1).double()
        self._new[0].index_add_(0, numbers, tried)
        self._new[1].index_add_(0, numbers, (scores >= self.pass_score).sum(1).double())

    def advance(self, over_ranks: Callable[[Tensor], Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
        """Take over what all ranks have counted in this step; (passes, tries) of this rank."""
        own = self._new.sum(1)
        new = over_ranks(self._new.float().to(device)).double().cpu()  # counts, exact in float32
        kept = torch.where(new[0] > 0, KEPT, 1.0)
        self.tries, self.passes = self.tries * kept + new[0], self.passes * kept + new[1]
        self._new = torch.zeros_like(self._new)
        return own[1], own[0]

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"tries": self.tries, "passes": self.passes}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a checkpoint; ConfigError where it is of other data."""
        if len(state["tries"]) != len(self.tries):
            raise ConfigError(
                f"objective.curriculum: the checkpoint has measured {len(state['tries']):,} prompts, the data have "
                f"{len(self.tries):,}; resume with the data that it was trained with"
            )
        self.tries, self.passes = state["tries"].clone(), state["passes"].clone()
