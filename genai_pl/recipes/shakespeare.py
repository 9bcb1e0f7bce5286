"""Shakespeare recipe: the shipped plays; a GPT continues them."""

from pathlib import Path

from genai_pl.atomic_io import write_atomic
from genai_pl.recipes.fetch import GenerateTexts

SPEAKERS = ("ROMEO", "JULIET", "KING RICHARD", "FIRST CITIZEN")


def show(generate: GenerateTexts, data: Path, out: Path) -> list[str]:
    """Write speeches.txt, a speech of each of four characters."""
    prompts = [f"{speaker}:\n" for speaker in SPEAKERS]
    speeches = [prompt + text for prompt, text in zip(prompts, generate(prompts, 150), strict=True)]
    text = "\n\n----\n\n".join(speeches) + "\n"
    write_atomic(out / "speeches.txt", lambda part: part.write_text(text, encoding="utf-8"))
    return [f"{out / 'speeches.txt'}", text]
