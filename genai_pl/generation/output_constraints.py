"""What the user's words ask of a continuation, in tokens."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from genai_pl.config.generation import GenerationConfig
from genai_pl.generation.grammar import Constraint, build_constraint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class OutputConstraints:
    """What a continuation must be like, whatever the model says."""

    ends: frozenset[int] = frozenset()  # tokens that end a row
    prefix: tuple[int, ...] = ()  # what it begins with
    bad_words: tuple[tuple[int, ...], ...] = ()  # sequences that it must not have
    constraint: Constraint | None = None  # a grammar that it follows, after the prefix

    def and_ends(self, tokens: Collection[int]) -> "OutputConstraints":
        """The same with more tokens that end a row."""
        return replace(self, ends=self.ends | set(tokens))


NO_CONSTRAINTS = OutputConstraints()


def build_output_constraints(
    tokenizer: "PreTrainedTokenizerBase", config: GenerationConfig, ends: Collection[int] = ()
) -> OutputConstraints:
    """What the options that are text ask for; `ends` are the tokens that end a text of the model."""
    ends = end_tokens(tokenizer, config.stop) | set(ends)
    words = [spelling for word in config.bad_words if word for spelling in (word, f" {word}")]
    return OutputConstraints(
        ends=frozenset(ends),
        prefix=inner_tokens(tokenizer, config.prefix),
        bad_words=tuple(dict.fromkeys(inner_tokens(tokenizer, word) for word in words)),
        constraint=build_constraint(tokenizer, json_schema=config.json_schema, regex=config.regex, ends=ends),
    )


def end_tokens(tokenizer: "PreTrainedTokenizerBase", stop: Sequence[str]) -> set[int]:
    """Tokens that end any row: eos, and stop strings that are special tokens, which have no text to search."""
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = {special[s] for s in stop if s in special}
    return ends if tokenizer.eos_token_id is None else ends | {tokenizer.eos_token_id}


def inner_tokens(tokenizer: "PreTrainedTokenizerBase", text: str) -> tuple[int, ...]:
    """The tokens of a text that is not the beginning of one: without special tokens or a space put before it."""
    line = tokenizer.encode("\n", add_special_tokens=False)
    both = tokenizer.encode(f"\n{text}", add_special_tokens=False)
    if both[: len(line)] == line:
        return tuple(both[len(line) :])
    return tuple(tokenizer.encode(text, add_special_tokens=False))
