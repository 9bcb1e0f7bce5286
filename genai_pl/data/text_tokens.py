"""Whole texts as tokens, for embeddings and rewards, and a tokenizer that adds these tokens by itself.

A vector or score is read at the end token, so a text needs one, whether its tokenizer adds it or not. Exported models are
loaded by programs that only call the tokenizer; `append_end_token` writes the end token into tokenizer.json for them.
"""

import json
from collections.abc import Sequence as Texts
from typing import TYPE_CHECKING

from genai_pl.data.tokenizer import end_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_texts(
    tokenizer: "PreTrainedTokenizerBase", texts: Texts[str], *, max_length: int | None = None, add_end: bool = True
) -> list[list[int]]:
    """Token ids of each text with the tokenizer's special tokens, truncated to max_length without losing them.

    add_end: add an end token, unless the tokenizer appends one by itself.
    """
    truncation = {} if max_length is None else {"truncation": True, "max_length": max_length}
    rows = tokenizer(list(texts), **truncation, verbose=False)["input_ids"] if texts else []
    end = end_token(tokenizer)
    if not add_end or end is None or appends_end_token(tokenizer):
        return rows
    return [[*(row if max_length is None else row[: max_length - 1]), end] for row in rows]


def appends_end_token(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the tokenizer puts a special token after every text."""
    plain, complete = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (False, True))
    return complete[-1:] != plain[-1:]


def append_end_token(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Make the tokenizer put its end token after every text, also where its tokenizer.json is loaded by other programs.

    The post-processor is edited as JSON: `tokenizers` cannot append to one in place.
    """
    from tokenizers import Tokenizer, models

    end = end_token(tokenizer)
    if end is None or appends_end_token(tokenizer):
        return
    backend, name = tokenizer.backend_tokenizer, tokenizer.convert_ids_to_tokens(end)
    processor = json.loads(backend.to_str())["post_processor"]
    steps = (
        processor["processors"] if processor and processor["type"] == "Sequence" else [processor] if processor else []
    )
    # a second template would wrap the output of the first: extend the one that exists
    template = next((step for step in steps if step["type"] == "TemplateProcessing"), None)
    if template is None:
        texts = [{"Sequence": {"id": part, "type_id": n}} for n, part in enumerate("AB")]
        template = {"type": "TemplateProcessing", "single": texts[:1], "pair": texts, "special_tokens": {}}
        steps.append(template)
    # append the token to the templates of single texts and of pairs
    for n, kind in enumerate(("single", "pair")):
        template[kind] = [*template[kind], {"SpecialToken": {"id": name, "type_id": n}}]
    template["special_tokens"][name] = {"id": name, "ids": [end], "tokens": [name]}
    # a post-processor loads only as part of a tokenizer
    wrapper = json.loads(Tokenizer(models.BPE()).to_str())
    wrapper["post_processor"] = steps[0] if len(steps) == 1 else {"type": "Sequence", "processors": steps}
    backend.post_processor = Tokenizer.from_str(json.dumps(wrapper)).post_processor


def lowercase_texts(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Make the tokenizer lowercase every text first."""
    from tokenizers.normalizers import Lowercase, Sequence

    backend = tokenizer.backend_tokenizer
    normalizer = backend.normalizer
    steps = [] if normalizer is None else [*normalizer] if isinstance(normalizer, Sequence) else [normalizer]
    if not any(isinstance(step, Lowercase) for step in steps):
        backend.normalizer = Sequence([Lowercase(), *steps])
