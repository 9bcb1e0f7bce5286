"""Training a reward model: the answer that people preferred gets the higher score."""

import torch
from torch import Tensor, nn

from genai_pl.models import Model
from genai_pl.modules.base import BaseModule, Batch, Metrics
from genai_pl.names import Head, Shape
from genai_pl.objectives import PreferenceCollator, Vocabulary, pairwise_reward_loss, reward_accuracy
from genai_pl.objectives.preference import segment_ends


class RewardModule(BaseModule):
    """One score for a prompt with its answer, read at the last token (of an encoder: at the first)."""

    shapes = ("decoder", "encoder")
    data_kind = "preference"
    head = Head.score

    def __init__(
        self,
        model: Model,
        *,
        vocabulary: Vocabulary,
        seed: int,
        optimizer: object,
        schedule: object,
        centering: float = 0.0,
    ) -> None:
        super().__init__(model, optimizer=optimizer, schedule=schedule)
        self.collator = PreferenceCollator(vocabulary=vocabulary, seed=seed)
        self.centering = centering

    def step(self, batch: Batch) -> Metrics:
        chosen, rejected = scores(self.model, batch["input_ids"], batch["segment_ids"], 2).unbind(1)
        loss = pairwise_reward_loss(chosen, rejected, margin=batch.get("margin"), centering=self.centering)
        difference = (chosen - rejected).detach()
        return {
            "loss": loss,
            "accuracy": reward_accuracy(chosen, rejected),
            "margin": difference.sum(),
            "rewards/chosen": chosen.detach().sum(),
            "rewards/rejected": rejected.detach().sum(),
        }


def scores(model: nn.Module, input_ids: Tensor, segment_ids: Tensor, n: int) -> Tensor:
    """The scores (B, n) of segments 1 .. n of each row, in float32."""
    hidden = model.features(input_ids, segment_ids)  # (B, T, C)
    if model.config.shape is Shape.encoder:
        numbers = torch.arange(1, n + 1, device=hidden.device)
        places = (segment_ids[:, None] == numbers[:, None]).int().argmax(-1)  # the first of each
    else:
        places = segment_ends(segment_ids, n)  # (B, n)
    rows = torch.arange(len(hidden), device=hidden.device)[:, None]
    return model.score(hidden[rows, places]).squeeze(-1).float()
