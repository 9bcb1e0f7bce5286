"""Notes of a tune in ABC notation (the standard of 2011, without voices, chords and ornaments)."""

import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

STEPS = dict(zip("CDEFGAB", (0, 2, 4, 5, 7, 9, 11), strict=True))
SHARPS = "FCGDAEB"  # in the order in which keys take them
ACCIDENTALS = {"^": 1, "^^": 2, "_": -1, "__": -2, "=": 0}
MODES = {"": 0, "maj": 0, "ion": 0, "m": -3, "min": -3, "aeo": -3, "mix": -1, "dor": -2, "phr": -4, "lyd": 1, "loc": -5}
TUPLETS = {2: 3, 3: 2, 4: 3, 6: 2, 8: 3}  # so many notes in the time of how many; 5, 7, 9 depend on the metre
COMPOUND = ("6/8", "9/8", "12/8")  # and 3/4 is not 6/8
BESIDE = re.compile(r'%.*|"[^"\n]*"|\{[^}]*\}|![^!\n]*!|\\$', re.MULTILINE)  # comments, chord names, grace notes, marks
TOKEN = re.compile(
    r"(?P<field>^[KLM]:.*$|\[[KLM]:[^\]]*\])"
    r"|(?P<note>(?P<accidental>\^{1,2}|_{1,2}|=)?(?P<letter>[A-Ga-gxzZ])(?P<octave>[,']*)(?P<length>[0-9]*/*[0-9]*))"
    r"|\((?P<tuplet>[2-9](?::[0-9]*){0,2})|(?P<ending>\[[12]|(?<=\|)[12])|(?P<bar>:\|:|::|:?\|[\]|]?:?|\|:)|(?P<broken><+|>+)|(?P<tie>-)",
    re.MULTILINE,
)


class Note(NamedTuple):
    """A note, or a rest whose pitch is None; lengths are in whole notes."""

    pitch: int | None  # as MIDI counts: 60 is the C in the middle
    length: Fraction
    tied: bool = False  # whether it goes on in the next one


Bar = list[Note]


def header(tune: str) -> dict[str, str]:
    """The fields before the melody, by letter; the key is the last of them."""
    head = re.split(r"(?m)^K:.*$", tune, maxsplit=1)
    last = re.findall(r"(?m)^K:.*$", tune)[:1]
    return dict(re.findall(r"(?m)^([A-Z]):\s*(.*?)\s*$", "\n".join([re.sub("%.*", "", head[0]), *last])))


def metre(tune: str) -> Fraction:
    """The length of a bar."""
    return _metre(header(tune).get("M", "C"))


def unit(fields: dict[str, str]) -> Fraction:
    """The length of a note without a number: as said, else by the metre (section 3.1.7 of the standard)."""
    short = "M" in fields and _metre(fields["M"]) < Fraction(3, 4)
    return _fraction(fields.get("L", ""), Fraction(1, 16 if short else 8))


def _metre(text: str) -> Fraction:
    """2/4, (2+3)/8, C for 4/4, C| for 2/2; free where there is none, which counts as 4/4."""
    found = re.match(r"\(?([0-9]+(?:\+[0-9]+)*)\)?/([1-9][0-9]*)", text)
    beats = sum(map(int, found[1].split("+"))) if found else 0
    return Fraction(beats, int(found[2])) if beats else Fraction(1)


def key(name: str) -> dict[str, int]:
    """How many semitones each letter is raised by a key such as Am, Bb, D mix, or D mix ^g with an accidental of its own."""
    if name.startswith("Hp"):  # the pipes of the Highlands
        return {"F": 1, "C": 1, "G": 0}
    own = {letter.upper(): ACCIDENTALS[sign] for sign, letter in re.findall(r"(\^{1,2}|_{1,2}|=)([A-Ga-g])\b", name)}
    found = re.match(r"([A-G])([#b]?)\s*([A-Za-z]{0,3})", name)
    if not found or found[3].lower() == "exp":
        return own
    mode = "m" if found[3] == "m" else found[3].lower()
    fifths = SHARPS.index(found[1]) - 1 + 7 * {"#": 1, "b": -1, "": 0}[found[2]] + MODES.get(mode, 0)
    changed = SHARPS[:fifths] if fifths >= 0 else SHARPS[::-1][:-fifths]
    return dict.fromkeys(changed, 1 if fifths > 0 else -1) | own


def bars(tune: str) -> list[Bar]:
    """The notes of each bar as they are written; what is played twice stands once."""
    return [bar for bar, _ in _read(tune) if bar]


def played(tune: str) -> list[Note]:
    """The notes as they are played: repeats and both their endings, tied notes as one."""
    notes: list[Note] = []
    repeated: list[Bar] = []  # since the last repeat began
    first_ending = 0  # where in `repeated` the first ending began; 0: it has none
    for bar, mark in _read(tune):
        notes += bar
        repeated.append(bar)
        if mark.endswith("1"):
            first_ending = len(repeated)
        if mark.startswith(":"):
            notes += [note for again in repeated[: first_ending or None] for note in again]
        if ":" in mark or mark in ("||", "|]"):
            repeated, first_ending = [], 0
    return _tied(notes)


def _tied(notes: Sequence[Note]) -> list[Note]:
    joined: list[Note] = []
    for note in notes:
        if joined and joined[-1].tied and joined[-1].pitch == note.pitch:
            note = note._replace(length=joined.pop().length + note.length)
        joined.append(note)
    return joined


class _TuneParser:
    """What the notes of a tune depend on, as far as it has been read."""

    def __init__(self, fields: dict[str, str]) -> None:
        self.fields = fields
        self.bar: Bar = []
        self.broken = self.tuplet = Fraction(1)  # factors of the next note, and of those of a tuplet
        self.left = 0  # notes of the tuplet
        self.held: tuple[str, int, int] | None = None  # letter, octave and pitch of a note that is tied to the next
        self.change()

    def change(self, field: str = "") -> None:
        """A field inside the melody, or the end of a bar: accidentals are forgotten."""
        if field:
            letter, value = field.strip("[]").split(":", 1)
            self.fields = {**self.fields, letter: value.strip()}
        self.signature = key(self.fields.get("K", "C"))
        self.raised = dict(self.signature)

    def begin_tuplet(self, text: str) -> None:
        """p:q:r puts p notes into the time of q, for the next r."""
        p, q, r = [int(part) if part else 0 for part in [*text.split(":"), "", ""][:3]]
        several = 3 if self.fields.get("M", "C") in COMPOUND else 2
        self.tuplet, self.left = Fraction(q or TUPLETS.get(p, several), p), r or p

    def add(self, token: re.Match) -> None:
        """One note or rest."""
        length = self._length(token) * self.broken
        self.broken = Fraction(1)
        if self.left:
            length, self.left = length * self.tuplet, self.left - 1
        self.bar.append(Note(self._pitch(token), length))

    def break_rhythm(self, marks: str) -> None:
        """A dot for one of two neighbours, which the other loses."""
        longer = 2 - Fraction(1, 2 ** len(marks))
        first, self.broken = (longer, 2 - longer) if marks[0] == ">" else (2 - longer, longer)
        self.bar[-1] = self.bar[-1]._replace(length=self.bar[-1].length * first)

    def _length(self, token: re.Match) -> Fraction:
        up, slashes, down = re.fullmatch(r"(\d*)(/*)(\d*)", token["length"]).groups()
        whole = _metre(self.fields.get("M", "C")) if token["letter"] == "Z" else unit(self.fields)  # Z: rests of bars
        return whole * int(up or 1) / max(1, int(down) if down else 2 ** len(slashes))

    def _pitch(self, token: re.Match) -> int | None:
        """As MIDI counts; an accidental holds to the end of the bar, and beyond it in a note that is tied."""
        letter = token["letter"].upper()
        if letter in "XZ":
            return None
        octave = token["letter"].islower() + token["octave"].count("'") - token["octave"].count(",")
        if token["accidental"]:
            self.raised[letter] = ACCIDENTALS[token["accidental"]]
        pitch = 60 + 12 * octave + STEPS[letter] + self.raised.get(letter, 0)
        if self.held and self.held[:2] == (letter, octave) and not token["accidental"]:
            pitch = self.held[2]
        self.last, self.held = (letter, octave, pitch), None
        return pitch

    def tie(self) -> None:
        """The last note goes on in the next one."""
        self.bar[-1] = self.bar[-1]._replace(tied=True)
        self.held = self.last if self.bar[-1].pitch is not None else None


def _read(tune: str) -> Iterator[tuple[Bar, str]]:
    """Each bar and the bar line after it, with the number of the ending that begins there."""
    body = re.split(r"(?m)^K:.*$", tune, maxsplit=1)[-1]
    melody = "\n".join(line for line in body.splitlines() if not re.match("[A-JN-Za-z]:", line))
    reader, mark = _TuneParser(header(tune)), ""
    for token in TOKEN.finditer(BESIDE.sub("", melody)):
        if token["note"]:
            reader.add(token)
        elif token["field"]:
            reader.change(token["field"])
        elif token["tuplet"]:
            reader.begin_tuplet(token["tuplet"])
        elif token["broken"] and reader.bar:
            reader.break_rhythm(token["broken"])
        elif token["tie"] and reader.bar:
            reader.tie()
        elif token["bar"] or token["ending"]:
            mark = token["bar"] or mark + token["ending"][-1]
            yield reader.bar, mark
            reader.bar = []
            reader.change()
    yield reader.bar, ""


def _fraction(text: str, default: Fraction) -> Fraction:
    found = re.match(r"([1-9]\d*)/([1-9]\d*)", text)
    return Fraction(int(found[1]), int(found[2])) if found else default
