"""Fill in the middle: prompts of a text before and a text after the answer, as each family of models learned them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from genai_pl.data.prompt_tokens import begin_tokens
from genai_pl.data.tokenizer import FIM
from genai_pl.generation.output_constraints import inner_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class FimFormat(NamedTuple):
    """Special tokens around the two texts (Bavarian et al. 2022, section 3): PSM where the prefix is first, SPM else.

    first, second: in front of the first and the second text. last: after both, where there is one. suffix_first: SPM.
    ends: further tokens that end an answer.
    """

    first: str
    second: str
    last: str | None = None
    suffix_first: bool = False
    ends: tuple[str, ...] = ()

    @property
    def tokens(self) -> tuple[str, ...]:
        """The special tokens in the order of a prompt."""
        return (self.first, self.second) if self.last is None else (self.first, self.second, self.last)

    @property
    def stops(self) -> list[str]:
        """Texts that end an answer: a model that writes one of the special tokens has ended it, too."""
        names = [*self.tokens, *self.ends]
        return list(dict.fromkeys([*names, *(name.replace("▁", " ") for name in names)]))


PREFIX, MIDDLE, SUFFIX = FIM
LLAMA = ("▁<EOT>", "<EOT>")  # what ends a middle of Code Llama
FORMATS = (
    FimFormat(PREFIX, SUFFIX, MIDDLE, ends=("<|file_separator|>", "<|file_sep|>")),  # ours, Qwen's coders, CodeGemma
    FimFormat("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite
    FimFormat("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    FimFormat("▁<PRE>", "▁<SUF>", "▁<MID>", ends=LLAMA),  # Code Llama
    FimFormat("<PRE>", "<SUF>", "<MID>", ends=LLAMA),  # the same without its SentencePiece spaces
    FimFormat("<\uff5cfim▁begin\uff5c>", "<\uff5cfim▁hole\uff5c>", "<\uff5cfim▁end\uff5c>"),  # DeepSeek
    FimFormat("[SUFFIX]", "[PREFIX]", suffix_first=True),  # Codestral
    FimFormat("<[fim-suffix]>", "<[fim-prefix]>", "<[fim-middle]>", suffix_first=True),  # Seed-Coder
)


def find_format(tokenizer: "PreTrainedTokenizerBase") -> FimFormat | None:
    """The format whose special tokens the tokenizer has, None if it has none."""
    vocab = tokenizer.get_vocab()
    return next((form for form in FORMATS if all(name in vocab for name in form.tokens)), None)


def encode_gap(
    tokenizer: "PreTrainedTokenizerBase", form: FimFormat, prefix: str | Sequence[int], suffix: str
) -> list[int]:
    """Token ids of the prompt whose answer stands between prefix and suffix.

    A begin token that the tokenizer puts before texts stays in front of all. A prefix begins as any text does, with
    SentencePiece's space; a suffix continues one, without it.
    """
    begin = begin_tokens(tokenizer)
    if isinstance(prefix, str):
        before = _plain(tokenizer, prefix)
    else:
        before = list(prefix[len(begin) :] if begin and list(prefix[: len(begin)]) == begin else prefix)
    after = list(inner_tokens(tokenizer, suffix)) if _adds_space(tokenizer) else _plain(tokenizer, suffix)
    texts = (after, before) if form.suffix_first else (before, after)
    first, second, *last = tokenizer.convert_tokens_to_ids(list(form.tokens))
    return [*begin, first, *texts[0], second, *texts[1], *last]


def _plain(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _adds_space(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the tokenizer puts a space before a text that begins with none."""
    return tokenizer.convert_ids_to_tokens(_plain(tokenizer, "a"))[0].startswith("▁")
