"""feedback.py task=negatives: pairs in, lines out that objective=contrastive and objective=rerank read."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from genai_pl.cli.negatives import report
from genai_pl.evaluation.negatives import Mined
from genai_pl.models import ModelConfig, build_model, save_pretrained
from tests.conftest import TINY

PAIRS = [{"anchor": f"question {n}", "positive": f"the answer {n * 7}"} for n in range(12)]
TINY_RUN = [word for word in TINY if not word.startswith(("model.", "tokenizer"))]


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A folder of an untrained encoder with a tokenizer of bytes."""
    from genai_pl.data.tokenizer import byte_tokenizer

    tokenizer = byte_tokenizer()
    config = ModelConfig(
        shape="encoder", n_layer=1, n_head=2, n_embd=16, vocab_size=len(tokenizer), max_seq_len=64, norm_order="post",
        embed_norm=True, n_token_types=2, activation="gelu", head="none",
    )  # fmt: skip
    folder = tmp_path / "encoder"
    save_pretrained(
        build_model(config), folder, token_ids={"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    )
    tokenizer.save_pretrained(folder)
    return folder


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_mined_triplets_and_rankings_are_trained_on(encoder: Path, command, tmp_path: Path) -> None:
    write(tmp_path / "pairs.jsonl", PAIRS)
    write(tmp_path / "more.jsonl", [{"text": f"another text {n}"} for n in range(5)])
    given = ("task=negatives", f"checkpoint={encoder}", "data.path=pairs.jsonl", "negatives.relative_margin=null")
    done = command("feedback", *given, "out=triplets.jsonl", "negatives.n=2", "negatives.corpus=more.jsonl")
    assert done.status == 0, done.err
    assert "objective=contrastive" in done.out
    triplets = read(tmp_path / "triplets.jsonl")
    assert len(triplets) == 24
    known = {row["positive"] for row in PAIRS} | {f"another text {n}" for n in range(5)}
    assert all(row["negative"] in known - {row["positive"]} for row in triplets)
    done = command("feedback", *given, "out=rankings.jsonl", "negatives.format=ranking")
    assert done.status == 0, done.err
    assert {len(row["documents"]) for row in read(tmp_path / "rankings.jsonl")} == {4}
    assert all(row["labels"] == [1, 0, 0, 0] for row in read(tmp_path / "rankings.jsonl"))
    for objective in (("contrastive", "data.path=triplets.jsonl", "data.negative=negative", "objective.gradcache_chunk=5"),
                      ("rerank", "data.path=rankings.jsonl")):  # fmt: skip
        run = f"hydra.run.dir={objective[0]}"
        result = command("train", f"objective={objective[0]}", f"init_from={encoder}", *objective[1:], *TINY_RUN, run)
        assert result.status == 0, result.err


@pytest.mark.parametrize(("nearer", "told"), [(0.9, True), (0.1, False)])
def test_negatives_that_are_nearer_than_positives_are_told(nearer: float, told: bool, capsys) -> None:
    options = {"n": 1, "format": "ranking"}
    config = OmegaConf.create({"negatives": options, "checkpoint": "m", "out": "o", "data": {"path": "p"}})
    mined = Mined(torch.tensor([[nearer]]), torch.tensor([[0]]), torch.tensor([0.5]), 0)
    report(config, mined, n_pairs=1, n_candidates=2, n_lines=1)
    assert ("shortcut" in capsys.readouterr().out) == told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("negatives.format=pairs",), "negatives.format=pairs is not one of triplet, ranking"),
        (("negatives.sampling=best",), "negatives.sampling=best is not one of top, random"),
        (("negatives.n=0",), "negatives.n=0 must be at least 1"),
        (("negatives.range_max=2",), "negatives.range_max=2 leaves no 3 candidates; raise it to 3"),
        (("judge=x",), "judge=x: has no effect: task=negatives"),
        (("out=pairs.jsonl",), "out=pairs.jsonl: exists already; name a new file"),
        (("data.anchor=query",), "no column 'query'; found: anchor, positive (set data.anchor)"),
    ],
)
def test_a_mistake_is_one_line(arguments: tuple[str, ...], message: str, command, tmp_path: Path) -> None:
    write(tmp_path / "pairs.jsonl", PAIRS)
    result = command("feedback", "task=negatives", "data.path=pairs.jsonl", *arguments)
    assert result.status != 0
    assert message in result.err
    assert result.err.count("\n") == 1
