"""What a model with a scoring head says of whole texts."""

import torch
from torch import Tensor, nn

from genai_pl.names import Shape
from genai_pl.objectives.preference import segment_ends


def scores(model: nn.Module, input_ids: Tensor, segment_ids: Tensor, n: int, **given: Tensor) -> Tensor:
    """The scores (B, n) of segments 1 .. n of each row, in float32: read at the last token, of an encoder at the first."""
    hidden = model.features(input_ids, segment_ids, **given)  # (B, T, C)
    if model.config.shape is Shape.encoder:
        numbers = torch.arange(1, n + 1, device=hidden.device)
        places = (segment_ids[:, None] == numbers[:, None]).int().argmax(-1)  # the first of each
    else:
        places = segment_ends(segment_ids, n)  # (B, n)
    rows = torch.arange(len(hidden), device=hidden.device)[:, None]
    return model.score(hidden[rows, places]).squeeze(-1).float()
