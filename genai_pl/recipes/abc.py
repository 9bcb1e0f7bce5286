"""Notes of a tune in ABC notation (the standard of 2011, without voices, chords and ornaments)."""

import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

STEPS = dict(zip("CDEFGAB", (0, 2, 4, 5, 7, 9, 11), strict=True))
SHARPS = "FCGDAEB"  # in the order in which keys take them
ACCIDENTALS = {"^": 1, "^^": 2, "_": -1, "__": -2, "=": 0}
MODES = {"": 0, "maj": 0, "ion": 0, "m": -3, "min": -3, "aeo": -3, "mix": -1, "dor": -2, "phr": -4, "lyd": 1, "loc": -5}
TOKEN = re.compile(
    r"(?P<note>(?P<accidental>\^{1,2}|_{1,2}|=)?(?P<letter>[A-Ga-gz])(?P<octave>[,']*)(?P<length>[0-9]*/*[0-9]*))"
    r"|(?P<triplet>\(3)|(?P<ending>\[[12]|(?<=\|)[12])|(?P<bar>:\|:|::|:?\|[\]|]?:?|\|:)|(?P<broken><+|>+)|(?P<tie>-)"
)


class Note(NamedTuple):
    """A note, or a rest whose pitch is None; lengths are in whole notes."""

    pitch: int | None  # as MIDI counts: 60 is the C in the middle
    length: Fraction
    tied: bool = False  # whether it goes on in the next one


Bar = list[Note]


def header(tune: str) -> dict[str, str]:
    """The fields before the melody, by letter."""
    return dict(re.findall(r"(?m)^([A-Z]):\s*(.*?)\s*$", tune))


def metre(tune: str) -> Fraction:
    """The length of a bar."""
    return _fraction(header(tune).get("M", "C"), Fraction(1))  # C and C| are 4/4 and 2/2


def key(name: str) -> dict[str, int]:
    """How many semitones each letter is raised by a key such as Am, Bb or D mix."""
    found = re.match(r"([A-G])([#b]?)\s*([A-Za-z]{0,3})", name)
    if not found:
        return {}
    mode = "m" if found[3] == "m" else found[3].lower()
    fifths = SHARPS.index(found[1]) - 1 + 7 * {"#": 1, "b": -1, "": 0}[found[2]] + MODES.get(mode, 0)
    changed = SHARPS[:fifths] if fifths >= 0 else SHARPS[::-1][:-fifths]
    return dict.fromkeys(changed, 1 if fifths > 0 else -1)


def bars(tune: str) -> list[Bar]:
    """The notes of each bar as they are written; what is played twice stands once."""
    return [bar for bar, _ in _read(tune) if bar]


def played(tune: str) -> list[Note]:
    """The notes as they are played: repeats and both their endings, tied notes as one."""
    notes: list[Note] = []
    repeated: list[Bar] = []  # since the last repeat began
    ending = 0  # where in `repeated` the first ending began; 0: it has none
    for bar, mark in _read(tune):
        notes += bar
        repeated.append(bar)
        if mark.endswith("1"):
            ending = len(repeated)
        if mark.startswith(":"):
            notes += [note for again in repeated[: ending or None] for note in again]
        if ":" in mark or mark in ("||", "|]"):
            repeated, ending = [], 0
    return _tied(notes)


def _tied(notes: Sequence[Note]) -> list[Note]:
    joined: list[Note] = []
    for note in notes:
        if joined and joined[-1].tied and joined[-1].pitch == note.pitch:
            note = note._replace(length=joined.pop().length + note.length)
        joined.append(note)
    return joined


def _read(tune: str) -> Iterator[tuple[Bar, str]]:
    """Each bar and the bar line after it, with the number of the ending that begins there."""
    fields = header(tune)
    unit = _fraction(fields.get("L", "1/8"), Fraction(1, 8))
    signature = key(fields.get("K", "C"))
    melody = "\n".join(line for line in tune.splitlines() if not re.match("[A-Za-z]:", line))
    bar: Bar = []
    raised = dict(signature)
    broken, triplet = Fraction(1), 0
    mark = ""
    for token in TOKEN.finditer(melody):
        if token["note"]:
            factor, broken = broken * (Fraction(2, 3) if triplet else 1), Fraction(1)
            triplet = max(0, triplet - 1)
            bar.append(_note(token, unit * factor, raised))
        elif token["triplet"]:
            triplet = 3
        elif token["broken"] and bar:
            longer = 2 - Fraction(1, 2 ** len(token["broken"]))
            factors = (longer, 2 - longer) if token["broken"][0] == ">" else (2 - longer, longer)
            bar[-1], broken = bar[-1]._replace(length=bar[-1].length * factors[0]), factors[1]
        elif token["tie"] and bar:
            bar[-1] = bar[-1]._replace(tied=True)
        elif token["bar"] or token["ending"]:
            mark = token["bar"] or mark + token["ending"][-1]
            yield bar, mark
            bar, raised = [], dict(signature)
    yield bar, ""


def _note(token: re.Match, unit: Fraction, raised: dict[str, int]) -> Note:
    """One note; an accidental holds to the end of the bar, so it is kept in `raised`."""
    up, slashes, down = re.fullmatch(r"(\d*)(/*)(\d*)", token["length"]).groups()
    divisor = int(down) if down else 2 ** len(slashes)
    length = unit * int(up or 1) / max(1, divisor)
    letter, octave = token["letter"], token["octave"]
    if letter == "z":
        return Note(None, length)
    if token["accidental"]:
        raised[letter.upper()] = ACCIDENTALS[token["accidental"]]
    place = 60 + 12 * (letter.islower() + octave.count("'") - octave.count(","))
    return Note(place + STEPS[letter.upper()] + raised.get(letter.upper(), 0), length)


def _fraction(text: str, default: Fraction) -> Fraction:
    found = re.match(r"([1-9]\d*)/([1-9]\d*)", text)
    return Fraction(int(found[1]), int(found[2])) if found else default
