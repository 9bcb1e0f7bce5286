"""Question answering recipe: questions and short answers out of Debian's bsdgames (BSD's quiz).

A language model learns to answer in a fixed form, not to chat. Validation questions are others of the same quizzes, so
the score measures knowledge, of which a small model has little.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from genai_pl.atomic_io import write_atomic
from genai_pl.recipes.fetch import GenerateTexts, Record, from_apt, read_rows, write_parts

N_HELD = 80
# quiz: field of the question, field of the answer, form of the question
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
    """The quizzes that have a question form."""
    return [p for p in from_apt("bsdgames", "usr/share/games/bsdgames/quiz/*", work) if p.name in QUESTIONS]


def plain(pattern: str) -> str:
    """The answer that a pattern of quiz(6) stands for: optional parts are kept, of alternatives the first.

    >>> plain("{New |}Delhi|Dehli")
    'New Delhi'
    """
    inner = re.compile(r"\{([^{}\[\]]*)\}|\[([^{}\[\]]*)\]")
    while match := inner.search(pattern):
        first = (match[1] if match[1] is not None else match[2]).split("|")[0]
        pattern = pattern[: match.start()] + first + pattern[match.end() :]
    return pattern.split("|")[0].strip()


def questions(quiz: str, text: str) -> Iterator[tuple[str, str]]:
    """Question and answer of each line of a quiz."""
    key_field, answer_field, question = QUESTIONS[quiz]
    for line in text.replace("\\\n", "").splitlines():
        fields = line.split(":")
        if (
            line.isprintable()
            and len(fields) > max(key_field, answer_field)
            and fields[key_field]
            and fields[answer_field]
        ):
            yield question.format(plain(fields[key_field])), plain(fields[answer_field])


def prepare(files: list[Path], out: Path) -> str:
    """Write questions as prompts and answers as completions, in a fixed random order."""
    pairs = [pair for path in files for pair in questions(path.name, path.read_text(encoding="latin-1"))]
    order = np.random.default_rng(0).permutation(len(pairs))
    rows: list[Record] = [
        {"prompt": f"Question: {pairs[n][0]}\nAnswer:", "completion": f" {pairs[n][1]}"} for n in order
    ]
    return write_parts(out, rows, n_val=min(N_HELD, len(rows) // 10 + 1))


def show(generate: GenerateTexts, data: Path, out: Path) -> list[str]:
    """Write answers.txt, validation questions with the model's answers; report how many are right."""
    rows = read_rows(data / "val.jsonl")
    answers = [text.strip().split("\n")[0] for text in generate([row["prompt"] for row in rows], 16)]
    references = [row["completion"].strip() for row in rows]
    right = [a.lower().rstrip(".") == b.lower() for a, b in zip(answers, references, strict=True)]
    lines = [
        f"{'right' if good else 'wrong'}  {row['prompt'].splitlines()[0].removeprefix('Question: ')}  {answer}  ({text})"
        for good, row, answer, text in zip(right, rows, answers, references, strict=True)
    ]
    write_atomic(out / "answers.txt", lambda part: part.write_text("\n".join(lines) + "\n", encoding="utf-8"))
    return [
        f"{out / 'answers.txt'}: held questions",
        *lines[:16],
        f"{sum(right)} of {len(rows)} answered as the quiz wants it",
    ]
