"""Notes of ABC against what music21 10.5.1 reads, and against the standard where music21 leaves it (ABC 2.1)."""

from fractions import Fraction

import pytest

from genai_pl.recipes import abc, music

# melody after "X:1", then pitch and length of each note as music21.converter.parse gives them (quarterLength / 4)
MUSIC21 = {
    "the unit is 1/16 in 2/4": ("M:2/4\nK:C\nCD c4 z2|\n", "60 1/16, 62 1/16, 72 1/4, z 1/8"),
    "the unit is 1/8 in 3/4": ("M:3/4\nK:C\nCDE|\n", "60 1/8, 62 1/8, 64 1/8"),
    "a unit that is said": ("M:2/4\nL:1/8\nK:C\nCD|\n", "60 1/8, 62 1/8"),
    "accidentals to the end of the bar": (
        "M:4/4\nL:1/4\nK:G\n^C C c F|C =F f F|F4|\n",
        "61 1/4, 61 1/4, 73 1/4, 66 1/4, 60 1/4, 65 1/4, 77 1/4, 65 1/4, 66 1",
    ),
    "tuplets of 2, 3, 4": (
        "M:4/4\nL:1/8\nK:C\n(3CDE (2CD (4CDEF|\n",
        "60 1/12, 62 1/12, 64 1/12, 60 3/16, 62 3/16, 60 3/32, 62 3/32, 64 3/32, 65 3/32",
    ),
    "tuplets of 5, 6, 7": (
        "M:4/4\nL:1/8\nK:C\n(5CDEFG|(6CDEFGA (7CDEFGAB|\n",
        "60 1/20, 62 1/20, 64 1/20, 65 1/20, 67 1/20, 60 1/24, 62 1/24, 64 1/24, 65 1/24, 67 1/24, 69 1/24, "
        "60 1/28, 62 1/28, 64 1/28, 65 1/28, 67 1/28, 69 1/28, 71 1/28",
    ),
    "tuplets with all their numbers": ("M:4/4\nL:1/8\nK:C\n(3:2:2C2D E|\n", "60 1/6, 62 1/12, 64 1/8"),
    "5 in a compound metre": ("M:6/8\nL:1/8\nK:C\n(5CDEFG|\n", "60 3/40, 62 3/40, 64 3/40, 65 3/40, 67 3/40"),
    "9 in 3/4, which is not compound": (
        "M:3/4\nL:1/8\nK:C\n(9CDEFGABcd|\n",
        "60 1/36, 62 1/36, 64 1/36, 65 1/36, 67 1/36, 69 1/36, 71 1/36, 72 1/36, 74 1/36",
    ),
    "broken rhythm": (
        "M:4/4\nL:1/8\nK:C\nC>D E<F G>>A B<<c|\n",
        "60 3/16, 62 1/16, 64 1/16, 65 3/16, 67 7/32, 69 1/32, 71 1/32, 72 7/32",
    ),
    "lengths": ("M:4/4\nL:1/8\nK:C\nC3/2D/ E//F/4|\n", "60 3/16, 62 1/16, 64 1/32, 65 1/32"),
    "D mixolydian": ("M:4/4\nL:1/8\nK:Dmix\nFCBE|\n", "66 1/8, 60 1/8, 71 1/8, 64 1/8"),
    "E dorian": ("M:4/4\nL:1/8\nK:E dor\nFCGD|\n", "66 1/8, 61 1/8, 67 1/8, 62 1/8"),
    "A phrygian": ("M:4/4\nL:1/8\nK:Aphr\nBEAD|\n", "70 1/8, 64 1/8, 69 1/8, 62 1/8"),
    "F sharp minor": ("M:4/4\nL:1/8\nK:F#m\nFCGD|\n", "66 1/8, 61 1/8, 68 1/8, 62 1/8"),
    "another key": ("M:4/4\nL:1/8\nK:G\nFC|\nK:F\nFB|\n", "66 1/8, 60 1/8, 65 1/8, 70 1/8"),
    "another unit": ("M:4/4\nL:1/8\nK:C\nCD|\nL:1/4\nCD|\n", "60 1/8, 62 1/8, 60 1/4, 62 1/4"),
}
# the standard, where music21 10.5.1 reads otherwise
STANDARD = {
    "a tied note keeps its accidental": ("L:1/4\nK:C\n^F-|F F|\n", "66 1/4, 66 1/4, 65 1/4"),
    "a field within the line": ("L:1/8\nK:C\nF [K:D]F|\n", "65 1/8, 66 1/8"),
    "B locrian": ("L:1/8\nK:B loc\nFCGD|\n", "65 1/8, 60 1/8, 67 1/8, 62 1/8"),
    "an accidental of the key's own": ("L:1/8\nK:D mix ^g\nFCG|\n", "66 1/8, 60 1/8, 68 1/8"),
    "rests of a whole bar": ("M:3/4\nL:1/8\nK:C\nC2 x2 z2|Z2|\n", "60 1/4, z 1/4, z 1/4, z 3/2"),
    "what is beside the notes": ('L:1/8\nK:C\n"Am"C {d}D !trill!E % F\nF|\n', "60 1/8, 62 1/8, 64 1/8, 65 1/8"),
}


@pytest.mark.parametrize("name", [*MUSIC21, *STANDARD])
def test_notes_have_the_pitches_and_lengths_of_music21_and_of_the_standard(name: str) -> None:
    tune, expected = {**MUSIC21, **STANDARD}[name]
    notes = [note for bar in abc.bars(tune) for note in bar]
    assert ", ".join(f"{'z' if n.pitch is None else n.pitch} {n.length}" for n in notes) == expected


def test_a_tie_over_a_bar_is_one_note_as_it_is_played() -> None:
    assert abc.played("L:1/4\nK:C\n^F-|F F|\n")[0] == abc.Note(66, Fraction(1, 2), False)


def test_the_recipe_writes_the_unit_that_the_metre_means_and_leaves_out_tunes_that_change() -> None:
    book = "X:1\nM:2/4\nK:G\nG2 (3ABc (2de|\nX:2\nM:2/4\nK:G\nG2|\nK:D\nF2|\nX:3\nM:3/4\nL:1/4\nK:G\nG[K:D]F|\n"
    [tune] = music.tunes(book)
    assert tune == "R:air\nM:2/4\nL:1/16\nK:G\nG2 (3ABc (2de|\n"
