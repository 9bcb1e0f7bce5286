"""Generator of docs/families.md: every causal family of transformers as a small random model, native here or wrapped.

python docs/make_families.py [--check] [--only llama,mamba]
"""

import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "families.md"
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "models")]
INTRODUCTION = """# Families

Every causal family that transformers {version} registers, as a small random model of its own configuration class, against
transformers' eager attention: logits, two packed documents against each alone, a batch padded on the left, greedy
generation with a cache, gradients, export and reload, LoRA on all linear layers. `python docs/make_families.py` writes the
table. Of {n} families {counts}.

**Native** families have weight tables here (`init_from=`), and also run wrapped. **Wrapped** ones run with transformers'
layers (`model=hf model.name=...`, [how](model_hf.md)). A slower route that a family takes is exact, too:

- *own attention*: transformers computes attention, since ours cannot state its mask, bias or arguments.
- *rows*: each document of a packed row gets a row of its own, since a layer (recurrent, convolution, or attention of its
  own) reads across them; `data.packing=false` or `data.separate_documents=false` saves the padding.
- *no cache*: each new token reads the whole text again; *after padding*: in batches of unequal prompts only.
- *no prompt tuning*: layers read more of a token than its embedding.

| family | runs | right | route, or why it is refused |
|---|---|---|---|
"""
ROUTES = {
    "transformers computes": "own attention",
    "documents": "rows",
    "after padding": "no cache after padding",
    "each new": "no cache",
    "there are no": "no prompt tuning",
}
# why transformers does not build, load or run a family in a small size
NOT_TRIED = {
    "blt": "reads patches of bytes; transformers makes no cache of its configuration, which has no number of layers",
    "dots3_note": "sees images, and states sizes for layers 25 to 41, so that it has no small member",
    "dots3_note_text": "states sizes for some of its layers, so that it has 76M parameters at least",
    "emu3": "AutoModelForCausalLM writes a configuration of its text part, and does not read it again",
    "gemma3n": "its images need the package timm",
    "gemma4_assistant": "a draft that reads states of another model, and no text of its own",
    "gemma4_unified_assistant": "a draft that reads states of another model, and no text of its own",
    "mllama": "AutoModelForCausalLM writes a configuration of its text part, and does not read it again",
    "musicgen": "AutoModelForCausalLM gives its decoder the configuration of the whole, and stops",
    "musicgen_melody": "AutoModelForCausalLM gives its decoder the configuration of the whole, and stops",
    "xlstm": "transformers stops in its chunks of a text, at states of another shape",
}
CHECKS = ("logits", "packed", "padded", "generation", "gradients", "export", "lora")


def outcome(kind: str) -> tuple[str, str, str]:
    """The last three cells of a family's row."""
    from one_family import NotTried, built, native, wrapped

    with tempfile.TemporaryDirectory() as folder:
        try:
            theirs = built(kind)
            ours, other = native(theirs, Path(folder) / "native"), wrapped(theirs, Path(folder) / "wrapped")
        except NotTried as error:
            return "not tried", "", NOT_TRIED.get(kind, str(error))
    if ours is not None and ours.refused is None:
        other = other._replace(notes=other.notes if other.refused is None else (), refused=None)
    if other.refused is not None:
        return "refused", "", other.refused.partition("does not run here: ")[2].partition("; docs/")[0]
    wrong = other.wrong + (() if ours is None else tuple(f"native {name}" for name in ours.wrong))
    if wrong:
        return "wrong", "", ", ".join(wrong)
    if ours is not None:
        return "native", *_right(ours.partly, [])
    routes = [next(words for start, words in ROUTES.items() if note.startswith(start)) for note in other.notes]
    return "wrapped", *_right(other.partly, routes)


def _right(partly: dict[str, str], routes: list[str]) -> tuple[str, str]:
    """The cells on what is right, and on routes and refused uses."""
    right = "all" if not partly else ", ".join(name for name in CHECKS if name not in partly)
    return right, "; ".join([*([", ".join(routes)] if routes else []), *(f"{k} {v}" for k, v in partly.items())])


def outcomes(only: str = "") -> dict[str, tuple[str, str, str]]:
    """The cells of every causal family by its model_type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kinds = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    return {kind: outcome(kind) for kind in kinds if not only or kind in only.split(",")}


def page(results: dict[str, tuple[str, str, str]]) -> str:
    """The text of the page."""
    import transformers

    words = [cells[0] for cells in results.values()]
    counts = ", ".join(f"{words.count(word)} {word}" for word in ("native", "wrapped", "refused", "not tried", "wrong"))
    counts = f"{words.count('native') + words.count('wrapped')} run and are right ({counts})"
    rows = "".join(
        f"| `{kind}` | {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"
        for kind, cells in results.items()
    )
    return INTRODUCTION.format(version=transformers.__version__, n=len(results), counts=counts) + rows


def main() -> None:
    from transformers.utils import logging

    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    start = time.perf_counter()
    only = sys.argv[sys.argv.index("--only") + 1] if "--only" in sys.argv else ""
    text = page(outcomes(only))
    print(f"{time.perf_counter() - start:.0f} seconds", file=sys.stderr)
    if only:
        print(text[text.index("|---|") :])
    elif "--check" in sys.argv:
        sys.exit(
            0 if PAGE.read_text(encoding="utf-8") == text else f"{PAGE}: out of date: python docs/make_families.py"
        )
    else:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
