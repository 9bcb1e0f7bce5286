"""Steps of an answer: their tokens, and a text divided into them.

Each step is followed by the separator; step and separator are tokenized apart. Data with labels, evaluation and rewards
all read steps through these functions.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from genai_pl.data.prompt_tokens import Messages, Tools, encode_prompts
from genai_pl.data.token_boundaries import encode_continuations
from genai_pl.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_steps(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str | Messages],
    steps: Sequence[Sequence[str]],
    separator: str,
    tools: Sequence[Tools] | None = None,
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(prompt ids, ids of all steps with a separator after each, ends of the steps in these) of each row, int32."""
    between = encode_continuations(tokenizer, [separator])[0]
    if not between:
        raise ConfigError(f"data.step_separator={separator!r}: the tokenizer has no token for it; choose another text")
    ids = iter(encode_continuations(tokenizer, [step for row in steps for step in row]))
    found = []
    for prompt, row in zip(encode_prompts(tokenizer, prompts, tools), steps, strict=True):
        parts = [[*next(ids), *between] for _ in row]
        ends = np.cumsum([len(part) for part in parts]).astype(np.int32)
        found.append((prompt, np.asarray([token for part in parts for token in part], dtype=np.int32), ends))
    return found


def split_steps(text: str, separator: str) -> list[tuple[str, int]]:
    r"""The steps of a text that are not blank, each with the character at which it ends, its separator included.

    The last one ends where the text does. A text without any is one step.

    >>> split_steps("2+2=4\n\nso 5\n", "\n")
    [('2+2=4', 6), ('so 5', 12)]
    """
    steps, place = [], 0
    for part in text.split(separator):
        place += len(part) + len(separator)
        if part.strip():
            steps.append((part, min(place, len(text))))
    if not steps:
        return [(text, len(text))]
    return [*steps[:-1], (steps[-1][0], len(text))]
