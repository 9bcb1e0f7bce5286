"""ABC notation: the notes of a tune (standard of 2011, without voices, chords and ornaments).

A tune is a header of fields (M: metre, L: unit length, K: key), then the melody. What a note sounds like depends on
everything before it: the key, accidentals of the bar, ties, tuplets and broken rhythm; `_TuneParser` holds that state.
"""

import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

STEPS = dict(zip("CDEFGAB", (0, 2, 4, 5, 7, 9, 11), strict=True))
SHARPS = "FCGDAEB"  # in the order in which keys add them
ACCIDENTALS = {"^": 1, "^^": 2, "_": -1, "__": -2, "=": 0}
MODES = {"": 0, "maj": 0, "ion": 0, "m": -3, "min": -3, "aeo": -3, "mix": -1, "dor": -2, "phr": -4, "lyd": 1, "loc": -5}
TUPLETS = {2: 3, 3: 2, 4: 3, 6: 2, 8: 3}  # p notes in the time of q; 5, 7 and 9 depend on the metre
COMPOUND = ("6/8", "9/8", "12/8")  # metres of three-part beats; 3/4 is none
BESIDE = re.compile(r'%.*|"[^"\n]*"|\{[^}]*\}|![^!\n]*!|\\$', re.MULTILINE)  # comments, chord names, grace notes, marks
TOKEN = re.compile(
    r"(?P<field>^[KLM]:.*$|\[[KLM]:[^\]]*\])"
    r"|(?P<note>(?P<accidental>\^{1,2}|_{1,2}|=)?(?P<letter>[A-Ga-gxzZ])(?P<octave>[,']*)(?P<length>[0-9]*/*[0-9]*))"
    r"|\((?P<tuplet>[2-9](?::[0-9]*){0,2})|(?P<ending>\[[12]|(?<=\|)[12])|(?P<bar>:\|:|::|:?\|[\]|]?:?|\|:)|(?P<broken><+|>+)|(?P<tie>-)",
    re.MULTILINE,
)


class Note(NamedTuple):
    """A note, or a rest.

    pitch: MIDI number, 60 is middle C; None for a rest. length: in whole notes. tied: continues in the next note.
    """

    pitch: int | None
    length: Fraction
    tied: bool = False


Bar = list[Note]


def header(tune: str) -> dict[str, str]:
    """The fields before the melody, by letter; K is the last of them.

    >>> header("X:1\\nM:6/8\\nK:G\\nabc")
    {'X': '1', 'M': '6/8', 'K': 'G'}
    """
    head = re.split(r"(?m)^K:.*$", tune, maxsplit=1)
    last = re.findall(r"(?m)^K:.*$", tune)[:1]
    return dict(re.findall(r"(?m)^([A-Z]):\s*(.*?)\s*$", "\n".join([re.sub("%.*", "", head[0]), *last])))


def metre(tune: str) -> Fraction:
    """The length of a bar in whole notes."""
    return _metre(header(tune).get("M", "C"))


def unit(fields: dict[str, str]) -> Fraction:
    """The length of a note without a number: field L, else by the metre (section 3.1.7 of the standard).

    >>> unit({"M": "2/4"}), unit({"M": "6/8", "L": "1/4"})
    (Fraction(1, 16), Fraction(1, 4))
    """
    short = "M" in fields and _metre(fields["M"]) < Fraction(3, 4)
    return _fraction(fields.get("L", ""), Fraction(1, 16 if short else 8))


def _metre(text: str) -> Fraction:
    """The length of a bar of 2/4, (2+3)/8, C (4/4) or C| (2/2); a free metre counts as 4/4."""
    match = re.match(r"\(?([0-9]+(?:\+[0-9]+)*)\)?/([1-9][0-9]*)", text)
    beats = sum(map(int, match[1].split("+"))) if match else 0
    return Fraction(beats, int(match[2])) if beats else Fraction(1)


def key(name: str) -> dict[str, int]:
    """Semitones by which a key raises each letter, for Am, Bb, D mix, or D mix ^g with an accidental of its own.

    >>> key("D"), key("F")
    ({'F': 1, 'C': 1}, {'B': -1})
    """
    if name.startswith("Hp"):  # the pipes of the Highlands
        return {"F": 1, "C": 1, "G": 0}
    own = {letter.upper(): ACCIDENTALS[sign] for sign, letter in re.findall(r"(\^{1,2}|_{1,2}|=)([A-Ga-g])\b", name)}
    match = re.match(r"([A-G])([#b]?)\s*([A-Za-z]{0,3})", name)
    if not match or match[3].lower() == "exp":
        return own
    # a key is a number of fifths, which is the number of sharps or flats
    mode = "m" if match[3] == "m" else match[3].lower()
    fifths = SHARPS.index(match[1]) - 1 + 7 * {"#": 1, "b": -1, "": 0}[match[2]] + MODES.get(mode, 0)
    changed = SHARPS[:fifths] if fifths >= 0 else SHARPS[::-1][:-fifths]
    return dict.fromkeys(changed, 1 if fifths > 0 else -1) | own


def bars(tune: str) -> list[Bar]:
    """The notes of each bar as they are written; a repeated bar occurs once."""
    return [bar for bar, _ in _read(tune) if bar]


def played(tune: str) -> list[Note]:
    """The notes as they are played: repeats with both endings, and tied notes as one."""
    notes: list[Note] = []
    repeated: list[Bar] = []  # since the last repeat began
    first_ending = 0  # where in `repeated` the first ending began; 0: it has none
    for bar, mark in _read(tune):
        # a repeat plays the bars since the last repeat sign, up to its first ending
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
    """The notes with tied ones of the same pitch merged."""
    merged: list[Note] = []
    for note in notes:
        if merged and merged[-1].tied and merged[-1].pitch == note.pitch:
            note = note._replace(length=merged.pop().length + note.length)
        merged.append(note)
    return merged


class _TuneParser:
    """The state on which the notes of a tune depend.

    fields: the header, changed by fields in the melody. bar: notes of the bar so far.
    raised: semitones by letter, those of the key and of accidentals in this bar.
    broken, tuplet: factors of the next note's length. tuplet_notes_left: notes of the tuplet that are still to come.
    tied_note: letter, octave and pitch of a note that is tied to the next one.
    """

    def __init__(self, fields: dict[str, str]) -> None:
        self.fields = fields
        self.bar: Bar = []
        self.broken = self.tuplet = Fraction(1)  # factors of the next note, and of those of a tuplet
        self.tuplet_notes_left = 0  # notes of the tuplet
        self.tied_note: tuple[str, int, int] | None = (
            None  # letter, octave and pitch of a note that is tied to the next
        )
        self.change()

    def change(self, field: str = "") -> None:
        """Apply a field inside the melody, or the end of a bar: either cancels the accidentals."""
        if field:
            letter, value = field.strip("[]").split(":", 1)
            self.fields = {**self.fields, letter: value.strip()}
        self.signature = key(self.fields.get("K", "C"))
        self.raised = dict(self.signature)

    def begin_tuplet(self, text: str) -> None:
        """Begin a tuplet p:q:r: p notes in the time of q, for the next r notes."""
        p, q, r = [int(part) if part else 0 for part in [*text.split(":"), "", ""][:3]]
        several = 3 if self.fields.get("M", "C") in COMPOUND else 2
        self.tuplet, self.tuplet_notes_left = Fraction(q or TUPLETS.get(p, several), p), r or p

    def add(self, token: re.Match) -> None:
        """Append a note or rest."""
        length = self._length(token) * self.broken
        self.broken = Fraction(1)
        if self.tuplet_notes_left:
            length, self.tuplet_notes_left = length * self.tuplet, self.tuplet_notes_left - 1
        self.bar.append(Note(self._pitch(token), length))

    def break_rhythm(self, marks: str) -> None:
        """Apply > or <: one of two neighbours is dotted, the other shortened by as much."""
        longer = 2 - Fraction(1, 2 ** len(marks))
        first, self.broken = (longer, 2 - longer) if marks[0] == ">" else (2 - longer, longer)
        self.bar[-1] = self.bar[-1]._replace(length=self.bar[-1].length * first)

    def _length(self, token: re.Match) -> Fraction:
        """The length of a note as it is written: multiples, halves, or base bars of rest (Z)."""
        up, slashes, down = re.fullmatch(r"(\d*)(/*)(\d*)", token["length"]).groups()
        base = _metre(self.fields.get("M", "C")) if token["letter"] == "Z" else unit(self.fields)  # Z: rests of bars
        return base * int(up or 1) / max(1, int(down) if down else 2 ** len(slashes))

    def _pitch(self, token: re.Match) -> int | None:
        """The MIDI number of a note; an accidental holds to the end of the bar, and beyond it in a tied note."""
        letter = token["letter"].upper()
        if letter in "XZ":
            return None
        # c is an octave above C; ' and , move by one more
        octave = token["letter"].islower() + token["octave"].count("'") - token["octave"].count(",")
        if token["accidental"]:
            self.raised[letter] = ACCIDENTALS[token["accidental"]]
        pitch = 60 + 12 * octave + STEPS[letter] + self.raised.get(letter, 0)
        if self.tied_note and self.tied_note[:2] == (letter, octave) and not token["accidental"]:
            pitch = self.tied_note[2]
        self.last, self.tied_note = (letter, octave, pitch), None
        return pitch

    def tie(self) -> None:
        """Tie the last note to the next one."""
        self.bar[-1] = self.bar[-1]._replace(tied=True)
        self.tied_note = self.last if self.bar[-1].pitch is not None else None


def _read(tune: str) -> Iterator[tuple[Bar, str]]:
    """Each bar with the bar line after it, and the number of the ending that begins there."""
    # the melody without lines of fields that do not affect it
    body = re.split(r"(?m)^K:.*$", tune, maxsplit=1)[-1]
    melody = "\n".join(line for line in body.splitlines() if not re.match("[A-JN-Za-z]:", line))
    parser, mark = _TuneParser(header(tune)), ""
    for token in TOKEN.finditer(BESIDE.sub("", melody)):
        # each token changes the parser's state; a bar line yields the bar
        if token["note"]:
            parser.add(token)
        elif token["field"]:
            parser.change(token["field"])
        elif token["tuplet"]:
            parser.begin_tuplet(token["tuplet"])
        elif token["broken"] and parser.bar:
            parser.break_rhythm(token["broken"])
        elif token["tie"] and parser.bar:
            parser.tie()
        elif token["bar"] or token["ending"]:
            mark = token["bar"] or mark + token["ending"][-1]
            yield parser.bar, mark
            parser.bar = []
            parser.change()
    yield parser.bar, ""


def _fraction(text: str, default: Fraction) -> Fraction:
    """The fraction that a text begins with, else the default."""
    match = re.match(r"([1-9]\d*)/([1-9]\d*)", text)
    return Fraction(int(match[1]), int(match[2])) if match else default
