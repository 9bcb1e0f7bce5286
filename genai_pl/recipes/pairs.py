"""What a model makes of held sources, beside what was written there, and how near it comes."""

import importlib.util
from pathlib import Path

from genai_pl.atomic_io import write_atomic
from genai_pl.recipes.fetch import GenerateTexts, read_rows

N_SHOWN = 200
LONGEST = 64  # tokens


def show(
    generate: GenerateTexts, data: Path, out: Path, *, source: str = "source", target: str = "target"
) -> list[str]:
    """The held pairs with what the model writes as pairs.md, and chrF and BLEU where sacrebleu is installed."""
    rows = read_rows(data / "val.jsonl")[:N_SHOWN]
    written = [text.strip() for text in generate([row[source] for row in rows], LONGEST)]
    table = ["| given | wanted | written |", "|---|---|---|"]
    for row, text in zip(rows, written, strict=True):
        cells = (" ".join(cell.split()).replace("|", "\\|") for cell in (row[source], row[target], text))
        table.append(f"| {' | '.join(cells)} |")
    write_atomic(out / "pairs.md", lambda part: part.write_text("\n".join(table) + "\n", encoding="utf-8"))
    wanted = [row[target].strip() for row in rows]
    examples = [
        line
        for trio in zip((r[source] for r in rows), wanted, written, strict=True)
        for line in comparison_lines(*trio)
    ]
    return [f"{out / 'pairs.md'}: {len(rows)} held pairs", *examples[:24], score(written, wanted)]


def comparison_lines(source: str, target: str, text: str) -> list[str]:
    """Three lines to compare."""
    return [f"  given    {' '.join(source.split())[:110]}", f"  wanted   {target}", f"  written  {text}"]


def score(written: list[str], wanted: list[str]) -> str:
    """chrF (Popovic 2015) and BLEU (Papineni et al. 2002) of all texts together, as sacrebleu reckons them."""
    exact = f"{sum(a == b for a, b in zip(written, wanted, strict=True))} of {len(wanted)} exactly as wanted"
    if importlib.util.find_spec("sacrebleu") is None:
        return f"{exact}; pip install sacrebleu: then chrF and BLEU are told"
    from sacrebleu.metrics import BLEU, CHRF

    chrf, bleu = CHRF().corpus_score(written, [wanted]).score, BLEU().corpus_score(written, [wanted]).score
    return f"chrF {chrf:.1f}, BLEU {bleu:.1f}, {exact}"
