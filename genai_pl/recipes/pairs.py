"""Results of source-to-target recipes: the model's outputs beside the references, as a table and as chrF and BLEU."""

import importlib.util
from pathlib import Path

from genai_pl.atomic_io import write_atomic
from genai_pl.recipes.fetch import GenerateTexts, read_rows

N_SHOWN = 200
LONGEST = 64  # tokens


def show(
    generate: GenerateTexts, data: Path, out: Path, *, source: str = "source", target: str = "target"
) -> list[str]:
    """Write pairs.md, validation pairs with the model's outputs; report chrF and BLEU where sacrebleu is installed."""
    rows = read_rows(data / "val.jsonl")[:N_SHOWN]
    outputs = [text.strip() for text in generate([row[source] for row in rows], LONGEST)]
    table = ["| given | wanted | written |", "|---|---|---|"]
    for row, text in zip(rows, outputs, strict=True):
        cells = (" ".join(cell.split()).replace("|", "\\|") for cell in (row[source], row[target], text))
        table.append(f"| {' | '.join(cells)} |")
    write_atomic(out / "pairs.md", lambda part: part.write_text("\n".join(table) + "\n", encoding="utf-8"))
    references = [row[target].strip() for row in rows]
    examples = [
        line
        for trio in zip((r[source] for r in rows), references, outputs, strict=True)
        for line in comparison_lines(*trio)
    ]
    return [f"{out / 'pairs.md'}: {len(rows)} held pairs", *examples[:24], score(outputs, references)]


def comparison_lines(source: str, target: str, text: str) -> list[str]:
    """Three lines: source, reference, output."""
    return [f"  given    {' '.join(source.split())[:110]}", f"  wanted   {target}", f"  written  {text}"]


def score(outputs: list[str], references: list[str]) -> str:
    """A line with chrF (Popovic 2015) and BLEU (Papineni et al. 2002) of the corpus, computed by sacrebleu, and exact matches."""
    exact = f"{sum(a == b for a, b in zip(outputs, references, strict=True))} of {len(references)} exactly as wanted"
    if importlib.util.find_spec("sacrebleu") is None:
        return f"{exact}; pip install sacrebleu: then chrF and BLEU are told"
    from sacrebleu.metrics import BLEU, CHRF

    chrf, bleu = CHRF().corpus_score(outputs, [references]).score, BLEU().corpus_score(outputs, [references]).score
    return f"chrF {chrf:.1f}, BLEU {bleu:.1f}, {exact}"
