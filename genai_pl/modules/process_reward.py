"""Process reward models: the head gives every step of an answer the probability that it is correct, at its last token."""

from genai_pl.config.enums import Head
from genai_pl.models import Model
from genai_pl.modules.base import BaseModule, Batch, Metrics
from genai_pl.modules.columns import Column
from genai_pl.objectives import IGNORED, SpecialTokens, StepCollator, process_reward_loss
from genai_pl.objectives.process_reward import step_hits


class ProcessRewardModule(BaseModule):
    """Cross entropy of the labels of steps; a class for tokens with two labels, as transformers and TRL have it."""

    shapes = ("decoder",)
    data_kind = "stepwise"
    head = Head.tokens
    labelled = True
    columns = (*BaseModule.columns, Column("train/accuracy", "accuracy", "{:8.1%}"))

    def __init__(
        self, model: Model, *, vocabulary: SpecialTokens, seed: int, optimizer: object, schedule: object
    ) -> None:
        super().__init__(model, optimizer=optimizer, schedule=schedule)
        self.collator = StepCollator(vocabulary=vocabulary)

    def generate_options(self, text: str, mask_token: str | None) -> dict[str, object]:
        return {"prompt": text, "score": True}

    def step(self, batch: Batch) -> Metrics:
        """Cross entropy and steps on the right side of one half, summed over steps; in validation also incorrect steps."""
        hidden = self.model.features(batch["input_ids"], batch["segment_ids"])
        ends_step = batch["labels"] != IGNORED
        logits, labels = self.model.label_logits(hidden[ends_step]).float(), batch["labels"][ends_step]  # (N, 2), (N,)
        hits, found, incorrect = step_hits(logits.detach(), labels)
        sums = {"loss": process_reward_loss(logits, labels), "accuracy": hits}
        return sums if self.training else {**sums, "found": found, "incorrect": incorrect}

    def summarize(self, sums: Metrics, targets) -> Metrics:
        """Loss and accuracy per step; in validation `recall_incorrect`, the share of incorrect steps that are found."""
        metrics = {name: sums[name] / targets for name in ("loss", "accuracy")}
        if "incorrect" in sums and sums["incorrect"] > 0:
            metrics["recall_incorrect"] = sums["found"] / sums["incorrect"]
        return metrics
