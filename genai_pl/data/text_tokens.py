"""Whole texts as tokens, for embeddings and rewards, and a tokenizer that adds these tokens by itself.

A vector or score is read at the end token, so a text needs one, whether its tokenizer adds it or not. Exported models are
loaded by programs that only call the tokenizer; `append_end_token` writes the end token into tokenizer.json for them.
"""

import json
from collections.abc import Callable
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


def encode_pairs(
    tokenizer: "PreTrainedTokenizerBase", texts: Texts[str], pairs: Texts[str] | None, *, max_length: int | None
) -> dict[str, list[list[int]]]:
    """`input_ids` of each text, or text and partner, as the tokenizer alone makes them: other programs read the same.

    `token_type_ids` (0, then 1) are there for pairs where the tokenizer makes them.
    max_length: pairs beyond it lose the end of their longer text; None keeps all.
    """
    if not texts:
        return {"input_ids": []}
    both = (list(texts),) if pairs is None else (list(texts), list(pairs))
    limits = {} if max_length is None else {"truncation": True, "max_length": max_length}
    encoded = tokenizer(*both, **limits, verbose=False)
    names = ["input_ids", "token_type_ids"] if pairs is not None and "token_type_ids" in encoded else ["input_ids"]
    return {name: encoded[name] for name in names}


def separate_pairs(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Make the tokenizer put its end token between two texts, where it puts no special token there."""
    first, second, both = (tokenizer(*texts)["input_ids"] for texts in (("a",), ("b",), ("a", "b")))
    plain = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in "ab"]
    end = end_token(tokenizer)
    if end is None or both != first + second or [first, second] != plain:
        return
    name, parts = tokenizer.convert_ids_to_tokens(end), [{"Sequence": {"id": part, "type_id": 0}} for part in "AB"]
    between = {"SpecialToken": {"id": name, "type_id": 0}}
    _edit_template(tokenizer, lambda template: template.update(pair=[parts[0], between, parts[1]]), name, end)


def appends_end_token(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the tokenizer puts a special token after every text."""
    plain, complete = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (False, True))
    return complete[-1:] != plain[-1:]


def append_end_token(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Make the tokenizer put its end token after every text, also where its tokenizer.json is loaded by other programs.

    The post-processor is edited as JSON: `tokenizers` cannot append to one in place.
    """
    end = end_token(tokenizer)
    if end is None or appends_end_token(tokenizer):
        return
    name = tokenizer.convert_ids_to_tokens(end)

    def append(template: dict) -> None:
        """Put the token at the end of single texts and of pairs."""
        for n, kind in enumerate(("single", "pair")):
            template[kind] = [*template[kind], {"SpecialToken": {"id": name, "type_id": n}}]

    _edit_template(tokenizer, append, name, end)


def _edit_template(
    tokenizer: "PreTrainedTokenizerBase", edit: Callable[[dict], None], name: str, token_id: int
) -> None:
    """Let `edit` change the template of special tokens in tokenizer.json, which then may use the token of this name."""
    from tokenizers import Tokenizer, models

    backend = tokenizer.backend_tokenizer
    processor = json.loads(backend.to_str())["post_processor"]
    steps = (
        processor["processors"] if processor and processor["type"] == "Sequence" else [processor] if processor else []
    )
    # a second template would wrap the output of the first: edit the one that exists
    template = next((step for step in steps if step["type"] == "TemplateProcessing"), None)
    if template is None:
        texts = [{"Sequence": {"id": part, "type_id": n}} for n, part in enumerate("AB")]
        template = {"type": "TemplateProcessing", "single": texts[:1], "pair": texts, "special_tokens": {}}
        steps.append(template)
    edit(template)
    template["special_tokens"][name] = {"id": name, "ids": [token_id], "tokens": [name]}
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
