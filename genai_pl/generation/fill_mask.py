"""Masked-token prediction: the likeliest tokens at each mask of a text, from an encoder with a language-model head."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from genai_pl.config.enums import Position
from genai_pl.errors import ConfigError
from genai_pl.generation.decode import evaluating
from genai_pl.models import Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


ALIASES = ("[MASK]", "<mask>", "<|mask|>")  # the mask token of BERT, of RoBERTa, and of our tokenizers


class Candidate(NamedTuple):
    """A token for a masked position. text: without surrounding spaces. probability: under the model, 0 to 1."""

    text: str
    probability: float


@torch.no_grad()
def fill(model: Encoder, tokenizer: "PreTrainedTokenizerBase", text: str, *, top_k: int) -> list[list[Candidate]]:
    """The `top_k` likeliest tokens for each mask token of the text, likeliest first.

    ConfigError if the text has no mask, the model no head, or the text more tokens than the model's max_seq_len.
    """
    input_ids = torch.tensor([_encode(model, tokenizer, text)], device=model.embed.weight.device)
    mask_positions = (input_ids[0] == tokenizer.mask_token_id).nonzero()[:, 0]  # (M,)
    with evaluating(model):
        # logits at the M masked positions alone: (M, V)
        hidden = _hidden(model, input_ids, mask_positions)  # (M, C)
        best = model.logits(hidden).float().softmax(dim=-1).topk(min(top_k, model.config.vocab_size))
    return [
        [Candidate(tokenizer.decode([token]).strip(), p) for token, p in zip(tokens, probabilities, strict=True)]
        for tokens, probabilities in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def _encode(model: Encoder, tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Ids of the text with its special tokens; ConfigError where masks cannot be predicted."""
    if model.lm_head is None:
        raise ConfigError("this encoder has no language-model head to fill masks with: set embed=true")
    if tokenizer.mask_token_id is None:
        raise ConfigError("this encoder's tokenizer has no mask token: set embed=true")
    row = tokenizer.encode(_with_own_masks(tokenizer, text), verbose=False)
    if tokenizer.mask_token_id not in row:
        raise ConfigError(f"prompt: no {tokenizer.mask_token} in it for this encoder to fill in; or set embed=true")
    if len(row) > model.config.max_seq_len:
        raise ConfigError(
            f"prompt: {len(row)} tokens are more than the {model.config.max_seq_len} that the model reads "
            "(model.max_seq_len): shorten it"
        )
    return row


def _with_own_masks(tokenizer: "PreTrainedTokenizerBase", text: str) -> str:
    """The text with other tokenizers' mask tokens replaced by this tokenizer's.

    Unchanged if it has this tokenizer's mask already; an alias that is an ordinary token of the vocabulary stays.
    """
    if tokenizer.mask_token in text:
        return text
    for alias in ALIASES:
        if alias not in tokenizer.get_vocab():
            text = text.replace(alias, tokenizer.mask_token)
    return text


def _hidden(model: Encoder, input_ids: Tensor, mask_positions: Tensor) -> Tensor:
    """Hidden states (M, C) at the masked positions.

    A permutation LM (XLNet) has a query stream for positions whose own token it must not see; the masks use it, and come last
    in the factorization order, so that they condition on all other tokens.
    """
    if model.config.position is not Position.xl:
        return model.features(input_ids)[0, mask_positions]
    order = torch.zeros_like(input_ids)
    order[0, mask_positions] = 1  # all else comes before them
    return model.permuted_features(input_ids, order, mask_positions[None])[0]
