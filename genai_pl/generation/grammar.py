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

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from transformers import PreTrainedTokenizerBase


# Blanks between two parts of JSON, at most one such group: a space, or a line break with its indentation. llguidance's own
# pattern has no bound, and a weak model, for which blanks are likely after blanks, would write them until max_new_tokens.
JSON_BLANKS = r"( |\n {0,12})"
MATCHERS = 64  # of one constraint at most: rows of a batch


class GrammarConstraint:
    """The set of tokens after which a text can still become one that the grammar accepts.

    Rows of a batch, reordered beams and rejected draft tokens share the matchers of the last texts: a text goes on with the
    matcher whose tokens it continues, or is read again by a new one (0.6 us a token). No matcher is rolled back: in llguidance
    1.9.1 one that has computed a mask allows wrong tokens after that.
    grammar: in llguidance's format. option: named in errors. ends: allowed where the text is complete, beside eos.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", grammar: str, *, option: str, ends: Collection[int]
    ) -> None:
        self.tokenizer, self.grammar, self.option = tokenizer, grammar, option
        self.ends = tuple(sorted({*ends, tokenizer.eos_token_id} - {None}))
        self.first: LLMatcher | None = None  # before any token
        self.matchers: list[tuple[list[int], LLMatcher]] = []  # with the tokens they have consumed, the oldest first
        self.vocab_size = 0

    def begin(self, vocab_size: int) -> None:
        """Compile the grammar for a vocabulary of `vocab_size`; ConfigError for a grammar that llguidance refuses."""
        if self.vocab_size == vocab_size:
            return
        if not self.ends:
            raise ConfigError(f"{self.option}: the tokenizer has no eos token, so a text could not end")
        self.vocab_size, self.matchers = vocab_size, []
        self.first = _compiled(self.tokenizer, vocab_size, self.grammar, self.ends).deep_copy()
        self._check(self.first)

    def allowed(self, generated: Sequence[int]) -> Tensor:
        """Mask (V,), True for tokens that may follow `generated`; end tokens are among them where the text is complete."""
        matcher = self._matcher_after(list(generated))
        # complete: an end token is all that may follow
        if matcher.is_stopped():
            mask = torch.zeros(self.vocab_size, dtype=torch.bool)
            mask[list(self.ends)] = True
            return mask
        # llguidance packs 8 tokens into a byte, the first in the lowest bit
        bits = torch.frombuffer(bytearray(matcher.compute_bitmask()), dtype=torch.uint8)
        bits = (bits[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1  # (V / 8, 8)
        return bits.flatten()[: self.vocab_size].bool()

    def _matcher_after(self, generated: list[int]) -> "LLMatcher":
        """The matcher that has consumed these tokens; the newest that has consumed the beginning of them goes on."""
        for n in reversed(range(len(self.matchers))):
            consumed, matcher = self.matchers[n]
            if consumed == generated[: len(consumed)]:
                del self.matchers[n]
                break
        else:
            consumed, matcher = [], self.first.deep_copy()
        matcher.consume_tokens(generated[len(consumed) :])
        self._check(matcher)
        self.matchers = [*self.matchers, (generated, matcher)][-MATCHERS:]
        return matcher

    def _check(self, matcher: "LLMatcher") -> None:
        """ConfigError with llguidance's own message, shortened to one line, if the matcher failed."""
        if matcher.is_error():
            first, *others = matcher.get_error().strip().splitlines()
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
    """The text of a JSON schema, with a bound of blanks; it is read from a file unless it begins with a brace.

    ConfigError if it is no JSON object.
    """
    try:
        is_text = schema_or_path.lstrip().startswith("{")
        text = schema_or_path if is_text else Path(schema_or_path).read_text(encoding="utf-8")
        schema = json.loads(text)
        if not isinstance(schema, dict):
            raise ConfigError(f"generation.json_schema={schema_or_path}: a schema is a JSON object")
        return json.dumps(_with_bounded_blanks(schema))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"generation.json_schema={schema_or_path}: neither a file nor a JSON schema ({error})"
        ) from None
    except RecursionError:
        raise ConfigError("generation.json_schema: the schema is nested too deeply") from None


def _with_bounded_blanks(schema: dict[str, object]) -> dict[str, object]:
    """The schema with JSON_BLANKS among llguidance's options, `x-guidance`, unless these say what blanks there are.

    The pattern goes before `whitespace_flexible`, so it must not be added to a schema that has turned blanks off.

    >>> _with_bounded_blanks({"x-guidance": {"whitespace_flexible": False}})
    {'x-guidance': {'whitespace_flexible': False}}
    """
    options = schema.get("x-guidance", {})
    if not isinstance(options, dict) or {"whitespace_pattern", "whitespace_flexible"} & set(options):
        return schema
    return {**schema, "x-guidance": {**options, "whitespace_pattern": JSON_BLANKS}}
