"""Permutation language modelling: pretraining an encoder with two streams on tokens in a random order (XLNet)."""

from torch import Tensor

from genai_pl.config.enums import Position
from genai_pl.errors import ConfigError
from genai_pl.models import Encoder
from genai_pl.modules.base import Batch
from genai_pl.modules.mlm import masked_words
from genai_pl.modules.token_prediction import TokenModule
from genai_pl.objectives import PermutationCollator


class PermutationModule(TokenModule):
    """Prediction of some tokens one after the other in a drawn order.

    Each is predicted from all tokens that are not predicted and those before it in that order. The model needs
    position=xl: its query stream knows the position of a target but not its token (Yang et al. 2019, section 2.3).
    """

    shapes = ("encoder",)
    make_collator = PermutationCollator

    def __init__(self, model: Encoder, **options: object) -> None:
        if model.config.position is not Position.xl:
            raise ConfigError("objective=permutation needs model.position=xl, the two streams of model=xlnet")
        super().__init__(model, **options)

    def hidden(self, batch: Batch) -> Tensor:
        return self.model.permuted_features(
            batch["input_ids"], batch["order"], batch["target_positions"], batch.get("segment_ids")
        )

    def generate_options(self, text: str, mask_token: str | None) -> dict[str, object]:
        """A prompt whose second word is masked if the tokenizer has a mask token, else one to embed."""
        if mask_token is None:
            return {"prompt": text, "embed": True}
        return {"prompt": masked_words(text, mask_token)}
