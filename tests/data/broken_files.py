"""Small files as people bring them, 300 ways to break them, and what Python's own csv, json and io modules read in them."""

import csv
import gzip
import io
import json
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from genai_pl.objectives import CausalLMCollator, SFTCollator, SpecialTokens
from genai_pl.objectives.collate import Collator
from genai_pl.objectives.pairs import PairCollator
from genai_pl.objectives.preference_collators import PreferenceCollator
from genai_pl.objectives.prompts import PromptCollator

Rows = list[dict]

ODD = [
    None, True, False, 0, 2, 2.5, -1, 1e30, 10**30, [], {}, [[]], [None], "", " ", "NA", "null", "nan", "None", "007", "2",
    "True", "2024-01-01", "2024-01-01T00:00:00Z", "a\u2028b", "a\x85b", "a\x0cb", "\ufeffa", "a\r\nb", "a\tb", 'say "x", y',
    "\ud800", "日本", "\x00", ["a", "b"], {"role": "user"}, [{"role": "user"}], [{"content": "x"}], "[]", '[{"role": 1}]',
]  # fmt: skip


def collator(kind: str, tokens: SpecialTokens) -> Collator:
    """The collator of an objective that takes a kind of data."""
    if kind == "text":
        return CausalLMCollator()
    if kind == "prompts":
        return PromptCollator(vocabulary=tokens, max_new_tokens=8)
    kinds = {"pairs": PairCollator, "preference": PreferenceCollator, "conversation pairs": PreferenceCollator}
    return kinds.get(kind, SFTCollator)(vocabulary=tokens)


def conversation(n: int) -> list[dict]:
    return [
        {"role": "user", "content": f"What is {n}?"},
        {"role": "assistant", "content": f"It is {n}, naïf."},
        {"role": "user", "content": "Again?"},
        {"role": "assistant", "content": f"{n}"},
    ]


def rows_of(kind: str) -> Rows:
    """Good rows of a kind of data."""
    make: dict[str, Callable[[int], dict]] = {
        "text": lambda n: {"text": f"A text of number {n}, with a comma and an é.\nIts second line.", "id": n},
        "chat": lambda n: {"messages": conversation(n), "id": f"r{n}"},
        "completions": lambda n: {"prompt": f"{n} + 1 = ", "completion": f"{n + 1}"},
        "preference": lambda n: {"prompt": f"{n}?", "chosen": f"yes, {n}", "rejected": f"no {n}"},
        "conversation pairs": lambda n: {
            "chosen": conversation(n),
            "rejected": [*conversation(n)[:3], {"role": "assistant", "content": "?"}],
        },
        "unpaired": lambda n: {"prompt": f"{n}?", "completion": f"so {n}", "label": n % 2 == 0},
        "prompts": lambda n: {"prompt": f"{n}?", "answer": n},
        "pairs": lambda n: {"anchor": f"text {n}", "positive": f"its partner {n}"},
        "seq2seq": lambda n: {"source": f"text {n}", "target": f"Text {n}"},
    }
    return [make[kind](n) for n in range(6)]


FLAT = ["text", "completions", "preference", "unpaired", "prompts", "pairs", "seq2seq"]  # kinds that fit into a csv
KINDS = [*FLAT, "chat", "conversation pairs"]


def write(path: Path, rows: Rows) -> None:
    """The rows as a file of the kind that its name says."""
    if path.suffix == ".txt":
        path.write_text("\n".join(row["text"] for row in rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            lines = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            lines.writeheader()
            lines.writerows(rows)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


class Unclear(Exception):
    """A value that is no text, or no label."""


class Number(str):
    """A number of a JSON file, as it is written."""


def read(path: Path) -> Rows:
    """The rows of a file by Python's own modules and pyarrow's parquet."""
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    newline = "" if path.suffix == ".csv" else None
    text = io.TextIOWrapper(io.BytesIO(path.read_bytes()), encoding="utf-8-sig", newline=newline).read()
    if path.suffix == ".txt":
        return [{"text": text}]
    if path.suffix == ".csv":
        lines = csv.DictReader(io.StringIO(text, newline=""))
        rows = list(lines)
        if any(None in row or None in row.values() for row in rows):
            raise Unclear
        return rows
    decoder = json.JSONDecoder(parse_float=Number, parse_int=Number, object_pairs_hook=once)
    try:
        found = decoder.decode(text)
    except ValueError:
        found = [decoder.decode(line) for line in text.split("\n") if line.strip()]
    found = found if isinstance(found, list) else [found]
    return [{"text": row} if isinstance(row, str) and not isinstance(row, Number) else dict(row) for row in found]


def once(pairs: list[tuple]) -> dict:
    if len(dict(pairs)) < len(pairs):
        raise Unclear
    return dict(pairs)


def text(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise Unclear
    value.encode()
    return str(value)


def given(value: object) -> list:
    """A text, or the roles and texts of messages."""
    if not isinstance(value, list):
        return [text(value)]
    if not value:
        raise Unclear
    return [(named(message), content(message)) for message in value]


def named(message: object) -> str:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or isinstance(message["role"], Number):
        raise Unclear
    return message["role"]


def content(message: dict) -> str:
    parts = message.get("content")
    if not isinstance(parts, list):
        return text(parts)
    return "".join(text(part["text"] if isinstance(part, dict) else part) for part in parts)


def label(value: object) -> bool:
    yes = {"true": True, "false": False, "1": True, "0": False}
    if value is True or value is False:
        return value
    if str(value).strip().lower() not in yes:
        raise Unclear
    return yes[str(value).strip().lower()]


def expected(kind: str, row: dict) -> list:
    """What a row of a kind says."""
    if kind == "chat":
        value = row.get("messages")
        value = json.loads(value) if isinstance(value, str) else value
        if not isinstance(value, list):
            raise Unclear
        return given(value)
    if kind == "conversation pairs":
        chosen, rejected = given(row.get("chosen")), given(row.get("rejected"))
        alike = [one == other for one, other in zip(chosen, rejected, strict=False)]
        n = alike.index(False) if False in alike else len(alike) - 1
        if not n or "assistant" not in dict(chosen[n:]) or "assistant" not in dict(rejected[n:]):
            raise Unclear
        return [*chosen[:n], chosen[n:], rejected[n:]]
    roles = {
        "text": ["text"], "completions": ["prompt", "completion"], "preference": ["prompt", "chosen", "rejected"],
        "unpaired": ["prompt", "completion"], "prompts": ["prompt"], "pairs": ["anchor", "positive"],
        "seq2seq": ["source", "target"],
    }[kind]  # fmt: skip
    texts = [text(row.get(role)) for role in roles]
    return [*texts, label(row.get("label"))] if kind == "unpaired" else texts


def some_cell(rows: Rows, rng: random.Random) -> tuple[dict, str]:
    row = rng.choice(rows)
    return row, rng.choice([key for key in row if key not in ("id", "answer")] or list(row))


def change_value(rows: Rows, rng: random.Random) -> None:
    row, key = some_cell(rows, rng)
    row[key] = rng.choice(ODD)


def change_message(rows: Rows, rng: random.Random) -> None:
    row, key = some_cell(rows, rng)
    if isinstance(row[key], list):
        message = rng.choice(row[key])
        message[rng.choice(["role", "content"])] = rng.choice(ODD)


def drop_key(rows: Rows, rng: random.Random) -> None:
    row, key = some_cell(rows, rng)
    del row[key]


def drop_message_key(rows: Rows, rng: random.Random) -> None:
    row, key = some_cell(rows, rng)
    if isinstance(row[key], list):
        del rng.choice(row[key])[rng.choice(["role", "content"])]


def rename_column(rows: Rows, rng: random.Random) -> None:
    _, key = some_cell(rows, rng)
    for row in rows:
        row[key + rng.choice([" ", "s", "_"])] = row.pop(key)


def wrap_value(rows: Rows, rng: random.Random) -> None:
    row, key = some_cell(rows, rng)
    row[key] = rng.choice([[row[key]], {"value": row[key]}, [[row[key]]], json.dumps(row[key]), {key: dict(row)}])


def whole_column(rows: Rows, rng: random.Random) -> None:
    _, key = some_cell(rows, rng)
    odd = rng.choice(ODD)
    for row in rows:
        row[key] = odd


def nest(rows: Rows, rng: random.Random) -> None:
    row, key = some_cell(rows, rng)
    row[key] = "@nested@"


def fewer_rows(rows: Rows, rng: random.Random) -> None:
    del rows[rng.choice([0, 1]) :]


OF_ROWS = [
    change_value,
    change_message,
    drop_key,
    drop_message_key,
    rename_column,
    wrap_value,
    whole_column,
    nest,
    fewer_rows,
]


def flip(data: bytes, rng: random.Random) -> bytes:
    n = rng.randrange(len(data))
    return data[:n] + bytes([data[n] ^ (1 << rng.randrange(8))]) + data[n + 1 :]


def insert(data: bytes, rng: random.Random) -> bytes:
    n = rng.randrange(len(data))
    return (
        data[:n]
        + rng.choice([b"\xff", b"\x00", b'"', b"{", b"]", b",", b"\n", b"\r", b"\xe2\x80\xa8", b"\\"])
        + data[n:]
    )


def encoded(data: bytes, rng: random.Random) -> bytes:
    try:
        return data.decode().encode(rng.choice(["utf-8-sig", "utf-16", "utf-32", "utf-16-le", "cp1252", "utf-7"]))
    except UnicodeError:
        return b"\xef\xbb\xbf" + data


def repeat_key(data: bytes, rng: random.Random) -> bytes:
    for key in (b'"prompt"', b'"text"', b'"chosen"', b'"role"', b'"anchor"', b'"source"'):
        if key in data:
            return data.replace(key, key + b': "x", ' + key, 1)
    return data.replace(b",", b",,", 1)


OF_BYTES = [
    flip, insert, encoded, repeat_key,
    lambda data, rng: data[: rng.randrange(len(data))],
    lambda data, rng: b"\xef\xbb\xbf" + data,
    lambda data, rng: gzip.compress(data),
    lambda data, rng: rng.choice([b"PK\x03\x04", b"\x1f\x8b", b"BZh9", b"PAR1", b"#!"]) + data,
    lambda data, rng: rng.choice([b"", b" \n", b"[]", b"{}", b"null", b"[[]]", b"1", b"NaN", b'"x"', b"[1, 2]", b'{"data": []}']),
    lambda data, rng: data.replace(b"\n", rng.choice([b"\r\n", b"\r", b"\n\n", b" \n"])),
    lambda data, rng: data.replace(b'": "', b'": ' + rng.choice([b"NaN", b"1e400", b"-0.50", b"tru"]) + b', "z": "', 1),
    lambda data, rng: data.replace(b",", rng.choice([b";", b"\t", b",,"])),
    lambda data, rng: data + data[: len(data) // 2],
]  # fmt: skip


def broken(number: int, folder: Path) -> tuple[str, Path]:
    """The kind of data of file `number`, and the file, broken in a way that the number decides."""
    rng = random.Random(number)
    of_rows = number % 2 == 0
    kind = KINDS[(number // 2) % len(KINDS)]
    endings = ["jsonl", "json", "parquet"] + ["csv"] * (kind in FLAT) + ["txt"] * (kind == "text" and not of_rows)
    path = folder / f"case{number}.{rng.choice(endings)}"
    rows = rows_of(kind)
    if of_rows:
        rng.choice(OF_ROWS)(rows, rng)
    try:
        write(path, rows)
    except (UnicodeEncodeError, OverflowError, pa.ArrowException, IndexError):  # this kind of file cannot hold it
        write(path.with_suffix(".jsonl"), json.loads(json.dumps(rows, ensure_ascii=True).replace("\\ud800", "?")))
        path = path.with_suffix(".jsonl")
    data = path.read_bytes()
    if not of_rows:
        data = rng.choice(OF_BYTES)(data, rng)
    if path.suffix != ".parquet":
        data = data.replace(b'"@nested@"', b"[" * 3000 + b"]" * 3000)
    path.write_bytes(data)
    return kind, path
