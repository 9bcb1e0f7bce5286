"""Text from files: split by characters, tokenized without loss, cached by content."""

import gzip
from pathlib import Path

import pytest
from datasets import Dataset

from genai_pl.data import byte_tokenizer, sources, token_bytes, train_bpe
from genai_pl.data.text import TextDataModule
from genai_pl.data.tokenize import encode_batch, split_chunks, split_text, tokenize
from genai_pl.data.tokenizer import tokenizer_files, tokenizer_from_files
from genai_pl.errors import DataError
from genai_pl.objectives import CausalLMCollator
from tests.small_tokenizers import TOKENIZERS

WILD = "naïve — 日本語 \x00 tab\t\r\n  two  spaces\n\n\n🙂 end"


def module(path: Path | str, **options) -> TextDataModule:
    defaults = {
        "path": str(path), "val_path": None, "val_fraction": 0.1, "column": "text", "seq_len": 16, "batch_size": 2,
        "val_batch_size": None, "workers": 0, "shuffle": True, "streaming": False, "block_rows": 8, "val_documents": 2,
        "separate_documents": True, "seed": 0,
    }  # fmt: skip
    return TextDataModule(**{**defaults, **options})


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), train_bpe(["some text to learn from, some text"], 300)])
def test_any_text_comes_back_from_its_tokens(tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode(WILD)) == WILD


def test_a_byte_token_is_its_byte() -> None:
    assert byte_tokenizer().encode("héllo") == list("héllo".encode())


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), train_bpe(["some text to learn from, some text"], 300)])
def test_token_bytes_add_up_to_the_bytes_of_the_text(tokenizer) -> None:
    sizes = token_bytes(tokenizer, 400)
    assert len(sizes) == 400
    assert sum(sizes[i] for i in tokenizer.encode(WILD)) == len(WILD.encode())
    assert sizes[tokenizer.eos_token_id] == 0


def test_a_tokenizer_survives_its_files_and_transformers_reads_them(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = train_bpe(["some text to learn from, some text"], 300)
    again = tokenizer_from_files(tokenizer_files(tokenizer))
    tokenizer.save_pretrained(tmp_path)
    for other in (again, AutoTokenizer.from_pretrained(tmp_path)):
        assert other.encode(WILD) == tokenizer.encode(WILD)
        assert (other.eos_token_id, other.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
@pytest.mark.parametrize(
    "texts", [["abcdefghij" * 10], ["ab", "cdef", "", "ghijklmnop", "q" * 50], ["é" * 11, "b" * 9]]
)
def test_the_last_fraction_of_the_characters_validates(texts: list[str], fraction: float) -> None:
    train, val = split_text(Dataset.from_dict({"text": texts}), fraction)
    joined = "".join(texts)
    cut = int(len(joined) * (1 - fraction))
    assert "".join(train["text"]) == joined[:cut]
    assert "".join(val["text"]) == joined[cut:]


def test_a_long_text_is_cut_at_line_breaks_and_loses_nothing() -> None:
    text = ("x" * 999 + "\n") * 300
    pieces = split_chunks(text, lambda part: list(part.encode()))
    assert "".join(pieces) == text
    assert len(pieces) > 3
    assert all(piece.endswith("\n") for piece in pieces)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("newline", ["\n", "\n\n", "\n\n  ", "\r\n", " \n\t\n"])
def test_a_long_text_has_the_tokens_of_the_whole(kind: str, newline: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    words = ["She", "said:", "it's", "12", "naïve", "lines,", "or", "日本"]
    text = newline.join(" ".join(words[n % 5 :]) + "." for n in range(6000))
    assert len(text) > 65_536
    (row,) = encode_batch({"text": [text]}, tokenizer, [])["input_ids"]
    assert row.tolist() == tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def test_documents_end_with_the_end_token() -> None:
    rows = encode_batch({"text": ["ab", "", None]}, byte_tokenizer(), [256])["input_ids"]
    assert [row.tolist() for row in rows] == [[97, 98, 256], [256], [256]]


def test_tokens_are_found_again_by_content_and_not_after_a_change() -> None:
    documents = Dataset.from_dict({"text": ["one", "two"]})
    first = tokenize(documents, byte_tokenizer(), content="a")
    again = tokenize(Dataset.from_dict({"text": ["one", "two"]}), byte_tokenizer(), content="a")
    other = tokenize(Dataset.from_dict({"text": ["three"]}), byte_tokenizer(), content="b")
    assert first.cache_files == again.cache_files != other.cache_files
    assert other[0]["input_ids"] == [*b"three", 256]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "parquet", "folder", "glob"])
def test_every_kind_of_file_gives_the_same_documents(kind: str, tmp_path: Path) -> None:
    texts = ["first document, with a comma", "second 日本"]
    table = Dataset.from_dict({"text": texts})
    if kind == "jsonl":
        table.to_json(tmp_path / "t.jsonl")
    elif kind == "csv":
        table.to_csv(tmp_path / "t.csv")
    elif kind == "parquet":
        table.to_parquet(tmp_path / "t.parquet")
    else:
        for i, text in enumerate(texts):
            (tmp_path / f"{i}.txt").write_text(text)
    where = {"txt": tmp_path / "0.txt", "folder": tmp_path, "glob": tmp_path / "*.txt"}.get(
        kind, tmp_path / f"t.{kind}"
    )
    found = sources.read_documents(sources.find_source(str(where)), "text")
    assert found["text"][:] == (texts[:1] if kind == "txt" else texts)


def test_another_column_can_be_the_text(tmp_path: Path) -> None:
    Dataset.from_dict({"body": ["x"], "text": ["y"]}).to_json(tmp_path / "t.jsonl")
    assert sources.read_documents(sources.find_source(str(tmp_path / "t.jsonl")), "body")["text"][:] == ["x"]


def test_a_folder_of_mixed_kinds_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.csv").write_text("text\nb\n")
    with pytest.raises(DataError, match="several kinds"):
        sources.find_source(str(tmp_path))


def test_shipped_text_has_its_own_validation_text() -> None:
    data = module("shakespeare", seq_len=64)
    data.prepare(byte_tokenizer(), CausalLMCollator())
    folder = sources.CORPUS / "shakespeare"
    assert data.train_rows.n_tokens == len((folder / "train.txt").read_bytes()) + 1  # and the end token
    targets = sum(batch["targets"].item() for batch in data.val_dataloader())
    assert targets == len((folder / "val.txt").read_bytes())


def test_validation_counts_every_token_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 1000)
    data = module(tmp_path / "a.txt", seq_len=16)
    data.prepare(byte_tokenizer(), CausalLMCollator())
    assert (
        sum(batch["targets"].item() for batch in data.val_dataloader()) == 100
    )  # 100 bytes and the end, less the first


def test_an_edited_file_is_tokenized_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    counts = []
    for text in ("a" * 500, "b" * 700):
        path.write_text(text)
        data = module(path)
        data.prepare(byte_tokenizer(), CausalLMCollator())
        counts.append(data.train_rows.n_tokens)
        assert data.train_rows[0]["input_ids"][0] == ord(text[0])
    assert counts == [451, 631]


def test_a_compressed_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text"))
    with pytest.raises(DataError, match=r"a\.txt\.gz: unknown kind of file"):
        sources.find_source(str(tmp_path / "a.txt.gz"))
