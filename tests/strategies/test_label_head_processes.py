"""Two processes give a head for labels the steps of one, whose targets are pairs, queries, words or weights of classes."""

import json
from pathlib import Path

import pytest

from tests.strategies.processes import HALF, SMALL, WHOLE, assert_same, train

DECODER = ("model=llama", "model.n_head=4", "model.n_kv_head=2", "model.intermediate_size=64")
ENCODER = ("model=bert_nano", "model.n_head=4")
OBJECTIVES = {
    "classify": (*DECODER, "data.text=text", "objective.class_weights=[1.0,5.0,0.5]"),
    "rerank": (*ENCODER, "objective.loss=listwise"),
    "token_classify": DECODER,
}


def write_rows(folder: Path) -> None:
    rows = [
        {
            "text": "a" * (1 + n % 17),
            "label": "xyz"[n % 3],
            "query": f"q{n}",
            "documents": ["d" * (k + 1) for k in range(2 + n % 3)],
            "labels": [int(k == n % 2 and n % 5 > 0) for k in range(2 + n % 3)],
            "tokens": ["w"] * (1 + n % 7),
            "tags": ["O"] * (n % 7) + ["B-X"],
        }
        for n in range(200)
    ]
    (folder / "labelled.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_processes_give_the_losses_and_weights_of_one(objective: str, strategy: str, tmp_path: Path) -> None:
    write_rows(tmp_path)
    options = (
        *SMALL,
        f"objective={objective}",
        *OBJECTIVES[objective],
        "data.path=labelled.jsonl",
        "optimizer.lr=0.03",
    )
    train(tmp_path, *options, WHOLE, "hydra.run.dir=one")
    train(tmp_path, *options, HALF, f"trainer={strategy}", "trainer.devices=2", "hydra.run.dir=two")
    assert_same(tmp_path / "two", tmp_path / "one", ("train/loss", "train/grad_norm", "val/loss"), rounding=1e-6)
