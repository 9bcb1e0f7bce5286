"""Whole texts as tokens: what embeddings and rewards read, and how a tokenizer is made to give it by itself."""

import json
from collections.abc import Sequence as Texts
from typing import TYPE_CHECKING

from genai_pl.data.tokenizer import end_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_texts(
    tokenizer: "PreTrainedTokenizerBase", texts: Texts[str], *, max_length: int | None = None, closes: bool = True
) -> list[list[int]]:
    """Token ids of each text with the tokenizer's special tokens, cut to max_length without losing them.

    closes: add an end token, unless the tokenizer closes texts by itself.
    """
    cut = {} if max_length is None else {"truncation": True, "max_length": max_length}
    rows = tokenizer(list(texts), **cut, verbose=False)["input_ids"] if texts else []
    end = end_token(tokenizer)
    if not closes or end is None or appends_end_token(tokenizer):
        return rows
    return [[*(row if max_length is None else row[: max_length - 1]), end] for row in rows]


def appends_end_token(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the tokenizer puts a special token behind every text."""
    plain, whole = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (False, True))
    return whole[-1:] != plain[-1:]


def append_end_token(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Have the tokenizer put its end token behind every text, for whoever reads its tokenizer.json too."""
    from tokenizers import Tokenizer, models

    end = end_token(tokenizer)
    if end is None or appends_end_token(tokenizer):
        return
    backend, name = tokenizer.backend_tokenizer, tokenizer.convert_ids_to_tokens(end)
    found = json.loads(backend.to_str())["post_processor"]
    steps = found["processors"] if found and found["type"] == "Sequence" else [found] if found else []
    # a second template would see the parts of the first one, not the text: the end goes into the one that is there
    template = next((step for step in steps if step["type"] == "TemplateProcessing"), None)
    if template is None:
        texts = [{"Sequence": {"id": part, "type_id": n}} for n, part in enumerate("AB")]
        template = {"type": "TemplateProcessing", "single": texts[:1], "pair": texts, "special_tokens": {}}
        steps.append(template)
    for n, kind in enumerate(("single", "pair")):
        template[kind] = [*template[kind], {"SpecialToken": {"id": name, "type_id": n}}]
    template["special_tokens"][name] = {"id": name, "ids": [end], "tokens": [name]}
    shell = json.loads(Tokenizer(models.BPE()).to_str())
    shell["post_processor"] = steps[0] if len(steps) == 1 else {"type": "Sequence", "processors": steps}
    backend.post_processor = Tokenizer.from_str(json.dumps(shell)).post_processor


def lowercase_texts(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Have the tokenizer write texts in lower case first."""
    from tokenizers.normalizers import Lowercase, Sequence

    backend = tokenizer.backend_tokenizer
    found = backend.normalizer
    steps = [] if found is None else [*found] if isinstance(found, Sequence) else [found]
    if not any(isinstance(step, Lowercase) for step in steps):
        backend.normalizer = Sequence([Lowercase(), *steps])
