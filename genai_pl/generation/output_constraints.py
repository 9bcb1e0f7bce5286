"""Output constraints: the options that are text (stop strings, prefix, bad words, JSON schema), converted to token ids.

They are separate from `GenerationConfig` because the same text has other ids under another tokenizer.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from genai_pl.config.generation import GenerationConfig
from genai_pl.generation.grammar import GrammarConstraint, build_constraint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class OutputConstraints:
    """Requirements on a continuation that hold whatever the model's probabilities are.

    ends: ids of tokens that finish a row. prefix: ids that every continuation begins with. bad_words: id sequences that no
    continuation contains. constraint: an object with `begin(vocab_size)` and `allowed(generated) -> (V,) bool`, such as a
    grammar, for the tokens after the prefix.
    """

    ends: frozenset[int] = frozenset()
    prefix: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    constraint: GrammarConstraint | None = None

    def and_ends(self, tokens: Collection[int]) -> "OutputConstraints":
        """The same constraints with more end tokens."""
        return replace(self, ends=self.ends | set(tokens))


NO_CONSTRAINTS = OutputConstraints()


def build_output_constraints(
    tokenizer: "PreTrainedTokenizerBase", config: GenerationConfig, ends: Collection[int] = ()
) -> OutputConstraints:
    """The constraints that the text options of `config` describe.

    ends: the model's own end tokens, beside the tokenizer's eos. A bad word is forbidden with and without a space before it,
    since both are one word to a reader but different tokens.
    """
    ends = end_tokens(tokenizer, config.stop) | set(ends)
    words = [spelling for word in config.bad_words if word for spelling in (word, f" {word}")]
    return OutputConstraints(
        ends=frozenset(ends),
        prefix=inner_tokens(tokenizer, config.prefix),
        bad_words=tuple(dict.fromkeys(inner_tokens(tokenizer, word) for word in words)),
        constraint=build_constraint(tokenizer, json_schema=config.json_schema, regex=config.regex, ends=ends),
    )


def end_tokens(tokenizer: "PreTrainedTokenizerBase", stop: Sequence[str]) -> set[int]:
    """Ids of the tokens that finish any row: eos, and stop strings that are special tokens.

    Special tokens are skipped when decoding, so the search for stop strings in the text would never meet them.
    """
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = {special[s] for s in stop if s in special}
    return ends if tokenizer.eos_token_id is None else ends | {tokenizer.eos_token_id}


def inner_tokens(tokenizer: "PreTrainedTokenizerBase", text: str) -> tuple[int, ...]:
    """Ids of a text in the middle of another one: no special tokens, and no space that the tokenizer adds at a start.

    SentencePiece tokenizers put a space before the first word. Encoding the text after a newline and removing the newline's
    tokens avoids it; where the newline merges with the text, the same is done with a smiley, and where that merges as well,
    the plain encoding is used.
    """
    for start in ("\n", "\N{WHITE SMILING FACE}"):
        line = tokenizer.encode(start, add_special_tokens=False)
        both = tokenizer.encode(f"{start}{text}", add_special_tokens=False)
        if both[: len(line)] == line:
            return tuple(both[len(line) :])
    return tuple(tokenizer.encode(text, add_special_tokens=False))
