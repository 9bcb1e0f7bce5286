"""Music recipe: dances and airs in ABC notation out of music21's corpus (O'Neill, Ryan, Aird, 1778 to 1907).

Tunes are reduced to what a small model can learn: four header fields and the notes. The report checks a rule that no
header states: every bar has the length of the metre.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from genai_pl.atomic_io import write_atomic
from genai_pl.recipes import abc
from genai_pl.recipes.fetch import GenerateTexts, Record, from_pip, read_rows, write_parts
from genai_pl.recipes.midi import midi

BOOKS = "music21/corpus/{book}/*.abc"
N_HELD = 150
LONGEST = 700  # characters of a tune
KEPT = re.compile(
    r"[A-Ga-gxzZ][,']*[0-9/]*|[\^_=]+|\([2-9](?::[0-9]*){0,2}|[|:\[\]12 ><\-\n]"
)  # characters of a melody
HEADER = ("R", "M", "L", "K")
KINDS = (("jig", "6/8"), ("reel", "C|"), ("hornpipe", "C|"), ("air", "3/4"))  # headers that `show` prompts with


def find(work: Path) -> list[Path]:
    """The books of tunes."""
    books = ("oneills1850", "airdsAirs", "ryansMammoth")
    return [path for book in books for path in from_pip("music21>=9", "music21", BOOKS.format(book=book), work)]


def tunes(text: str) -> Iterator[str]:
    """Each tune of a file with a constant key, metre and unit: four header lines and the melody without ornaments."""
    for part in re.split(r"(?m)^X:", text.replace("\r", ""))[1:]:
        lines = [line for line in part.split("\n")[1:] if line and not line.startswith("%")]
        # the header, the cleaned melody, and whether the key or metre changes inside
        fields = {line[0]: line[2:].split("%")[0].strip() for line in reversed(lines) if re.match("[A-Z]:", line)}
        melody = [clean(line) for line in lines if not re.match("[A-Za-z]:", line)]
        begins = next((n for n, line in enumerate(lines) if line.startswith("K:")), 0)
        changes = any(re.match("[KLM]:", line) or re.search(r"\[[KLM]:", line) for line in lines[begins + 1 :])
        if {"M", "K"} <= set(fields) and any(melody) and not changes:
            fields = {"R": kind(fields), "M": fields["M"], "L": str(abc.unit(fields)), "K": fields["K"]}
            header = "".join(f"{name}:{fields[name]}\n" for name in HEADER)
            yield header + "\n".join(line for line in melody if line) + "\n"


def kind(fields: dict[str, str]) -> str:
    """The kind of dance, reel, jig, hornpipe, ..., or air where the book names none."""
    return (re.findall("[a-z]+", fields.get("R", "").lower()) or ["air"])[-1]


def clean(line: str) -> str:
    """A line of a melody without chord names, fingerings, grace notes, slurs and marks.

    >>> clean('"Am"{g}(ABc) !f! [CE]2')
    'ABc C2'
    """
    line = re.sub(r'"[^"]*"|\{[^}]*\}|![^!]*!|%.*|\[[A-Z]:[^]]*\]', "", line)
    line = re.sub(r"\[(?=[\^_=A-Ga-g])([\^_=]*[A-Ga-g][,']*[0-9/]*)[^]|]*\]", r"\1", line)  # the first note of a chord
    line = re.sub(r"\((?![2-9])", "", line)  # slurs
    return re.sub(" +", " ", "".join(KEPT.findall(line))).strip()


def prepare(files: list[Path], out: Path) -> str:
    """Write each distinct tune of moderate length as a text."""
    unique_tunes = {tune for path in files for tune in tunes(path.read_text(encoding="latin-1"))}
    texts = sorted(tune for tune in unique_tunes if 100 < len(tune) < LONGEST)
    rows: list[Record] = [{"text": texts[n]} for n in np.random.default_rng(0).permutation(len(texts))]
    return write_parts(out, rows, n_val=min(N_HELD, len(rows) // 10 + 1))


def show(generate: GenerateTexts, data: Path, out: Path) -> list[str]:
    """Write tune1.abc, tune1.mid, ...; report how many of their bars have the length of the metre."""
    headers = [f"R:{name}\nM:{metre}\nL:1/8\nK:{key}\n" for name, metre in KINDS for key in ("G", "D")]
    melodies = [header + text for header, text in zip(headers, generate(headers, 250), strict=True)]
    for n, tune in enumerate(melodies, start=1):
        text = f"X:{n}\nT:{abc.header(tune)['R'].capitalize()} {n}\n{tune.rstrip()}\n"
        write_atomic(out / f"tune{n}.abc", lambda part, text=text: part.write_text(text, encoding="utf-8"))
        write_atomic(out / f"tune{n}.mid", lambda part, tune=tune: part.write_bytes(midi(abc.played(tune))))
    real = [row["text"] for row in read_rows(data / "val.jsonl")]
    return [
        f"{out}/tune1.abc, .mid, ... tune{len(melodies)}: play them, or print them with an ABC program",
        *melodies[:3],
        f"{full_bars(melodies):.0%} of the inner bars fill the metre (of real tunes, {full_bars(real):.0%})",
    ]


def full_bars(texts: list[str]) -> float:
    """The share of inner bars that have the length of the metre; the first and last of a tune may be incomplete."""
    inner = [sum(note.length for note in bar) == abc.metre(tune) for tune in texts for bar in abc.bars(tune)[1:-1]]
    return sum(inner) / max(1, len(inner))
