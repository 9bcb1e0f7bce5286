"""Questions and short answers out of Debian's bsdgames (the quiz of BSD): a language model learns to answer, not to chat."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from genai_pl.atomic_io import write_atomic
from genai_pl.recipes.fetch import GenerateTexts, Record, from_apt, read_rows, write_parts

N_HELD = 80
# quiz: the fields that are asked for and answered, and the question
QUESTIONS = {
    "africa": (0, 1, "What is the capital of {}?"),
    "america": (0, 1, "What is the capital of {}?"),
    "asia": (0, 1, "What is the capital of {}?"),
    "europe": (0, 1, "What is the capital of {}?"),
    "state": (0, 1, "What is the capital of the state of {}?"),
    "elements": (3, 0, "What is the chemical symbol of {}?"),
    "babies": (0, 1, "What does a {} grow up to be?"),
    "collectives": (0, 1, "What is a group of {} called?"),
    "flowers": (0, 1, "What does the flower {} stand for?"),
    "sexes": (0, 1, "What is the female of {}?"),
    "murders": (0, 1, "Who killed {}?"),
    "latin": (0, 1, "What does the Latin word {} mean?"),
}


def find(work: Path) -> list[Path]:
    """The quizzes that questions are known for."""
    return [p for p in from_apt("bsdgames", "usr/share/games/bsdgames/quiz/*", work) if p.name in QUESTIONS]


def plain(pattern: str) -> str:
    """The answer that a pattern of quiz(6) stands for: what is optional is said, of alternatives the first."""
    inner = re.compile(r"\{([^{}\[\]]*)\}|\[([^{}\[\]]*)\]")
    while found := inner.search(pattern):
        first = (found[1] if found[1] is not None else found[2]).split("|")[0]
        pattern = pattern[: found.start()] + first + pattern[found.end() :]
    return pattern.split("|")[0].strip()


def questions(quiz: str, text: str) -> Iterator[tuple[str, str]]:
    """Question and answer of each line of a quiz."""
    asked, answered, question = QUESTIONS[quiz]
    for line in text.replace("\\\n", "").splitlines():
        fields = line.split(":")
        if line.isprintable() and len(fields) > max(asked, answered) and fields[asked] and fields[answered]:
            yield question.format(plain(fields[asked])), plain(fields[answered])


def prepare(files: list[Path], out: Path) -> str:
    """Write questions as prompts and answers as completions; other questions are held back."""
    found = [pair for path in files for pair in questions(path.name, path.read_text(encoding="latin-1"))]
    order = np.random.default_rng(0).permutation(len(found))
    rows: list[Record] = [
        {"prompt": f"Question: {found[n][0]}\nAnswer:", "completion": f" {found[n][1]}"} for n in order
    ]
    return write_parts(out, rows, held=min(N_HELD, len(rows) // 10 + 1))


def show(generate: GenerateTexts, data: Path, out: Path) -> list[str]:
    """Held questions with the model's answers as answers.txt, and how many are right."""
    rows = read_rows(data / "val.jsonl")
    answers = [text.strip().split("\n")[0] for text in generate([row["prompt"] for row in rows], 16)]
    wanted = [row["completion"].strip() for row in rows]
    right = [a.lower().rstrip(".") == b.lower() for a, b in zip(answers, wanted, strict=True)]
    lines = [
        f"{'right' if good else 'wrong'}  {row['prompt'].splitlines()[0].removeprefix('Question: ')}  {answer}  ({text})"
        for good, row, answer, text in zip(right, rows, answers, wanted, strict=True)
    ]
    write_atomic(out / "answers.txt", lambda part: part.write_text("\n".join(lines) + "\n", encoding="utf-8"))
    return [
        f"{out / 'answers.txt'}: held questions",
        *lines[:16],
        f"{sum(right)} of {len(rows)} answered as the quiz wants it",
    ]
