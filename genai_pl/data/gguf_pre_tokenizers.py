"""Pre-tokenizers by llama.cpp's names: the patterns that split a text before merges, read off a tokenizer.json.

llama.cpp has a fixed list of them (`tokenizer.ggml.pre`) and takes the name's word for what it splits, so the name must
follow from the patterns, not from the model's name. The patterns are those of the published tokenizers.
"""

from collections.abc import Mapping
from typing import NamedTuple

from genai_pl.errors import ConfigError

Json = Mapping[str, object]

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LOWER, UPPER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
BYTE_LEVEL = "ByteLevel"  # with its own pattern, GPT-2's
DIGITS = "Digits"  # each digit apart
LLAMA3 = WORDS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + SPACES
QWEN2 = WORDS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + SPACES
QWEN35 = WORDS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + SPACES
_CASED = (
    r"[^\r\n\p{L}\p{N}]?" + UPPER + "*" + LOWER + "+{end}" + r"|[^\r\n\p{L}\p{N}]?" + UPPER + "+" + LOWER + "*{end}"
)
O200K = _CASED.replace("{end}", WORDS + "?") + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + SPACES
TEKKEN = _CASED.replace("{end}", "") + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + SPACES


class PreTokenizer(NamedTuple):
    """steps: patterns in their order. ignore_merges: whole words of the vocabulary are tokens without merges."""

    steps: tuple[str, ...]
    ignore_merges: bool = False


KNOWN = {  # several names may stand for the same; the first is written
    "gpt-2": PreTokenizer((BYTE_LEVEL,)),
    "smollm": PreTokenizer((DIGITS, BYTE_LEVEL)),
    "llama-bpe": PreTokenizer((LLAMA3,), ignore_merges=True),
    "dbrx": PreTokenizer((LLAMA3,)),
    "qwen2": PreTokenizer((QWEN2,)),
    "qwen35": PreTokenizer((QWEN35,)),
    "gpt-4o": PreTokenizer((O200K,)),
    "tekken": PreTokenizer((TEKKEN,), ignore_merges=True),
}
ALIASES = {
    **dict.fromkeys(("phi-2", "gigachat", "mellum", "modern-bert", "exaone4", "olmo", "mpt", "jais"), "gpt-2"),
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), "smollm"),
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), "llama-bpe"),
    **dict.fromkeys(("smaug-bpe",), "dbrx"),
    **dict.fromkeys(("deepseek-r1-qwen", "kormo", "megrez", "stablelm2"), "qwen2"),
    **dict.fromkeys(("llama4", "kanana2"), "gpt-4o"),
}


def steps_of(pre_tokenizer: Json | None) -> tuple[str, ...]:
    """The steps of a `pre_tokenizer` of tokenizer.json; ConfigError for one that llama.cpp cannot have."""
    parts = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    steps = [_step(part) for part in parts if part is not None]
    return tuple(step for step in steps if step)


def _step(part: Json) -> str:
    """One step; empty for one that only spells bytes as characters."""
    kind = part["type"]
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        return BYTE_LEVEL if part.get("use_regex", True) else ""
    if kind == "Digits" and part.get("individual_digits"):
        return DIGITS
    if kind == "Split" and (part["behavior"], part["invert"]) in (("Isolated", False), ("Removed", True)):
        pattern = part["pattern"]
        if "Regex" in pattern:
            return r"\p{N}" if pattern["Regex"] == r"\p{N}" else pattern["Regex"]
    shown = {name: value for name, value in part.items() if name != "type"}
    raise ConfigError(f"format=gguf: llama.cpp has no pre-tokenizer {kind} {shown}; format=hf writes this tokenizer")


def name_of(steps: tuple[str, ...], *, ignore_merges: bool | None) -> str:
    """llama.cpp's name of a pre-tokenizer; ConfigError for patterns that it does not have.

    ignore_merges: as in `PreTokenizer`; None if it makes no difference.
    """
    steps = tuple(DIGITS if step == r"\p{N}" else step for step in steps)
    same = [name for name, known in KNOWN.items() if known.steps == steps]
    found = next((name for name in same if ignore_merges in (None, KNOWN[name].ignore_merges)), None)
    if found:
        return found
    if same:
        reason = f"ignore_merges={ignore_merges} beside the pattern of {same[0]}"
    else:
        reason = f"pre-tokenizer with the patterns {list(steps)}"
    known = ", ".join(KNOWN)
    raise ConfigError(f"format=gguf: llama.cpp has no {reason}; it has {known} (format=hf writes this tokenizer)")


def known_pre_tokenizer(name: str) -> PreTokenizer | None:
    """The pre-tokenizer of a name in a file, None for one that is not known here."""
    return KNOWN.get(ALIASES.get(name, name))


def pre_tokenizer_json(known: PreTokenizer) -> dict[str, object]:
    """The `pre_tokenizer` of tokenizer.json for a known one."""
    parts: list[dict[str, object]] = []
    for step in known.steps:
        if step == DIGITS:
            parts.append({"type": "Digits", "individual_digits": True})
        elif step != BYTE_LEVEL:
            parts.append({"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False})
    with_pattern = BYTE_LEVEL in known.steps
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": with_pattern}
    return {"type": "Sequence", "pretokenizers": [*parts, last]} if parts else last
