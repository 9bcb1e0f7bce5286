"""Grammar constraints: continuations that match a JSON schema or a regular expression, with llguidance's token masks.

llguidance compiles a grammar to a matcher over bytes and computes, for the current state, the set of tokens that keep the text
completable. This file adapts its matcher to the rule interface of `BannedTokens`, which has no memory between calls.
"""

import json
from collections.abc import Collection, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from genai_pl.errors import ConfigError
from genai_pl.generation.decode_state import common_length

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from transformers import PreTrainedTokenizerBase


class GrammarConstraint:
    """The set of tokens after which a text can still become one that the grammar accepts.

    One matcher serves all rows of a batch: it is rolled back to the common prefix of its tokens and the row's, and consumes the
    rest (0.3 us a token). A matcher per row would have to follow beam reordering and rejected draft tokens.
    grammar: in llguidance's format. option: named in errors. ends: allowed where the text is complete, beside eos.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", grammar: str, *, option: str, ends: Collection[int]
    ) -> None:
        self.tokenizer, self.grammar, self.option = tokenizer, grammar, option
        self.ends = tuple(sorted({*ends, tokenizer.eos_token_id} - {None}))
        self.matcher: LLMatcher | None = None
        self.consumed: list[int] = []
        self.vocab_size = 0

    def begin(self, vocab_size: int) -> None:
        """Compile the grammar for a vocabulary of `vocab_size`; ConfigError for a grammar that llguidance refuses."""
        if self.vocab_size == vocab_size:
            return
        if not self.ends:
            raise ConfigError(f"{self.option}: the tokenizer has no eos token, so a text could not end")
        self.vocab_size, self.consumed = vocab_size, []
        self.matcher = _compiled(self.tokenizer, vocab_size, self.grammar, self.ends).deep_copy()
        self._check()

    def allowed(self, generated: Sequence[int]) -> Tensor:
        """Mask (V,), True for tokens that may follow `generated`; end tokens are among them where the text is complete."""
        generated = list(generated)
        # move the matcher from the tokens of the last call to these
        n = common_length(self.consumed, generated)
        self.matcher.rollback(len(self.consumed) - n)
        self.matcher.consume_tokens(generated[n:])
        self._check()
        self.consumed = generated
        # complete: an end token is all that may follow
        if self.matcher.is_stopped():
            mask = torch.zeros(self.vocab_size, dtype=torch.bool)
            mask[list(self.ends)] = True
            return mask
        # llguidance packs 8 tokens into a byte, the first in the lowest bit
        bits = torch.frombuffer(bytearray(self.matcher.compute_bitmask()), dtype=torch.uint8)
        bits = (bits[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1  # (V / 8, 8)
        return bits.flatten()[: self.vocab_size].bool()

    def _check(self) -> None:
        """ConfigError with llguidance's own message, shortened to one line, if the matcher failed."""
        if self.matcher.is_error():
            first, *others = self.matcher.get_error().strip().splitlines()
            reason = f"{first} {others[-1]}" if others and first.endswith(":") else first
            raise ConfigError(f"{self.option}: {reason}")


@lru_cache(maxsize=32)
def _compiled(
    tokenizer: "PreTrainedTokenizerBase", vocab_size: int, grammar: str, ends: tuple[int, ...]
) -> "LLMatcher":
    """A fresh matcher for a grammar. Cached, because many requests to a server use the same grammar; callers copy it."""
    from llguidance import LLMatcher

    return LLMatcher(_vocabulary(tokenizer, vocab_size, ends), grammar, log_level=0)


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: "PreTrainedTokenizerBase", vocab_size: int, ends: tuple[int, ...]) -> "LLTokenizer":
    """llguidance's tree of the text of every token. Cached: it takes a second for a large vocabulary."""
    from llguidance.hf import from_tokenizer

    return from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=list(ends))


def build_constraint(
    tokenizer: "PreTrainedTokenizerBase", *, json_schema: str | None, regex: str | None, ends: Collection[int] = ()
) -> GrammarConstraint | None:
    """The constraint of generation.json_schema or generation.regex; None if neither is set, ConfigError if both are.

    json_schema: a file, or the text of a schema. regex: matches the whole continuation, not a part of it.
    ends: end tokens of the model, any of which may follow a complete text.
    """
    if json_schema is None and regex is None:
        return None
    if json_schema is not None and regex is not None:
        raise ConfigError("generation.json_schema and generation.regex: give one of them")
    option = "generation.regex" if json_schema is None else "generation.json_schema"
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise ConfigError(f"{option} needs llguidance: pip install 'genai_pl[constrain]'") from None
    if json_schema is None:
        return GrammarConstraint(tokenizer, LLMatcher.grammar_from_regex(regex), option=option, ends=ends)
    grammar = LLMatcher.grammar_from_json_schema(_read_schema(json_schema))
    return GrammarConstraint(tokenizer, grammar, option=option, ends=ends)


def _read_schema(schema_or_path: str) -> str:
    """The text of a JSON schema, read from a file unless it begins with a brace; ConfigError if it is no JSON object."""
    path = Path(schema_or_path)
    try:
        text = schema_or_path if schema_or_path.lstrip().startswith("{") else path.read_text(encoding="utf-8")
        schema = json.loads(text)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"generation.json_schema={schema_or_path}: neither a file nor a JSON schema ({error})"
        ) from None
    if not isinstance(schema, dict):
        raise ConfigError(f"generation.json_schema={schema_or_path}: a schema is a JSON object")
    return text
