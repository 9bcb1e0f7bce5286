"""Writes docs/model_hf.md: what every causal family of transformers, small and random, does under model=hf.

python docs/make_model_hf.py [--check]
"""

import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "model_hf.md"
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "models")]
INTRODUCTION = """# What model=hf runs

`python train.py model=hf model.name=FOLDER_OR_HUB_ID` puts our attention into a causal model of transformers. Before anything
is trained or written, a few tokens go through the model's own weights with transformers' eager attention and with ours: plain
rows, two documents in a row, padding on the left, and a cache that is read on, rewound and reordered. What is not equal is
refused in one line; there is no option to go on regardless. SmolLM2 135M is compared in 1.6 seconds on one core, and in 2.5 in
bfloat16, where each module calculates with a float32 copy of its own weights meanwhile. Options of a configuration count as
well: a Granite with `logits_scaling` 1 runs, one with another does not.

The table is written by `python docs/make_model_hf.py`: small random models of each family that transformers {version}
registers, in all that training and generation do with a model (logits, packed and padded rows, greedy text with a cache,
gradients, save and load), against transformers' eager attention. {counts}

| family | under model=hf |
|---|---|
"""


def outcome(kind: str) -> str:
    """What becomes of a family, in a few words."""
    from one_family import NotTried, built, refusal_or_faults

    with tempfile.TemporaryDirectory() as folder:
        try:
            found = refusal_or_faults(built(kind), Path(folder))
        except NotTried as error:
            return f"not tried: {error}"
    if isinstance(found, list):
        return f"wrong: {', '.join(found)}" if found else "runs"
    return "refused: " + found.partition("does not run here: ")[2].partition("; docs/")[0]


def outcomes() -> dict[str, str]:
    """Family: what becomes of it, for all of them."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return {kind: outcome(kind) for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)}


def page(found: dict[str, str]) -> str:
    """The page that says so."""
    import transformers

    words = [text.partition(":")[0] for text in found.values()]
    counts = ", ".join(f"{words.count(word)} {word}" for word in ("runs", "refused", "not tried", "wrong"))
    counts = f"Of {len(found)} families: {counts}.".replace("runs", "run")
    rows = "".join(f"| `{kind}` | {text.replace('|', chr(92) + '|')} |\n" for kind, text in found.items())
    return INTRODUCTION.format(version=transformers.__version__, counts=counts) + rows


def main() -> None:
    from transformers.utils import logging

    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    text = page(outcomes())
    if "--check" in sys.argv:
        sys.exit(
            0 if PAGE.read_text(encoding="utf-8") == text else f"{PAGE}: out of date: python docs/make_model_hf.py"
        )
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
