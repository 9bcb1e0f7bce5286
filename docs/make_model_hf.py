"""Generator of docs/model_hf.md: the causal families of transformers that run under model=hf, each as a small random model.

python docs/make_model_hf.py [--check]
"""

import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "model_hf.md"
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "models")]
INTRODUCTION = """# Models that model=hf runs

`python train.py model=hf model.name=FOLDER_OR_HUB_ID` puts our attention into a causal model of transformers. Before training
or export, a few tokens pass through the model's own weights with transformers' eager attention and with ours: plain rows, two
packed documents, padding on the left, and a cache that is continued, rewound and reordered. A model whose logits differ is
refused with one line; no option overrides that. The comparison takes 1.6 seconds for SmolLM2 135M on one core, and 2.5 in
bfloat16, where each module computes with a float32 copy of its weights for the time of its call. Options of a configuration
matter too: a Granite with `logits_scaling` 1 runs, one with another value does not.

`python docs/make_model_hf.py` writes the table. It builds a small random model of each family that transformers {version}
registers and compares everything that training and generation do with it (logits, packed and padded rows, greedy decoding
with a cache, gradients, saving and loading) with transformers' eager attention. {counts}

| family | under model=hf |
|---|---|
"""


def outcome(kind: str) -> str:
    """The result of a family in a few words: runs, refused, not tried, or wrong, with the reason."""
    from one_family import NotTried, built, refusal_or_faults

    with tempfile.TemporaryDirectory() as folder:
        try:
            result = refusal_or_faults(built(kind), Path(folder))
        except NotTried as error:
            return f"not tried: {error}"
    if isinstance(result, list):
        return f"wrong: {', '.join(result)}" if result else "runs"
    return "refused: " + result.partition("does not run here: ")[2].partition("; docs/")[0]


def outcomes() -> dict[str, str]:
    """The result of every causal family by its model_type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return {kind: outcome(kind) for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)}


def page(results: dict[str, str]) -> str:
    """The text of the page."""
    import transformers

    words = [text.partition(":")[0] for text in results.values()]
    counts = ", ".join(f"{words.count(word)} {word}" for word in ("runs", "refused", "not tried", "wrong"))
    counts = f"Of {len(results)} families: {counts}.".replace("runs", "run")
    rows = "".join(f"| `{kind}` | {text.replace('|', chr(92) + '|')} |\n" for kind, text in results.items())
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
