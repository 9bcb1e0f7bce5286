"""Runs of train.py on several sources: losses and tokens by source, what is said, and what is refused in one line."""

import csv
import json
from pathlib import Path

import pytest

from tests.conftest import TINY

SMALL = (*TINY, "model.n_head=2", "data.workers=0", "precision=fp32", "logger=csv", "callbacks.export=false")
WEB, TALKS = "web: {path: web.txt, weight: 3}", "talks: {path: talks.jsonl, kind: chat, weight: 1, epochs: 1}"


def write(path: str, rows: list[dict]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def train(command, tmp_path: Path):
    """`train(*arguments)` in a folder with data of every kind."""
    Path("web.txt").write_text(" ".join(f"word{i} is {i * i}." for i in range(400)))
    write("talks.jsonl", [{"prompt": f"{i} and {i} is ", "completion": str(2 * i)} for i in range(40)])
    write("pairs.jsonl", [{"prompt": f"{i} is", "chosen": " good", "rejected": " bad"} for i in range(30)])
    write("more.jsonl", [{"prompt": f"{i} was", "chosen": " fine", "rejected": " bad"} for i in range(30)])
    return lambda *arguments: command("train", *SMALL, *arguments, "hydra.run.dir=run")


def rows(run: str) -> list[dict[str, str]]:
    with Path(run, "metrics.csv").open() as file:
        return [*csv.DictReader(file)]


def last_row() -> dict[str, float]:
    return {name: float(value) for name, value in rows("run")[-1].items() if value}


@pytest.mark.parametrize("objective", ["clm", pytest.param("sft", marks=pytest.mark.slow)])
def test_losses_tokens_and_shares_are_known_by_source(objective: str, train) -> None:
    kind = f"data.sources={{{WEB.replace('weight', 'kind: text, weight')}, {TALKS}}}"
    result = train(f"objective={objective}", kind, "trainer.max_steps=12", "trainer.limit_val_batches=1.0")
    assert result.status == 0, result.err
    assert "data        2 sources, mixed by tokens, each within one row of its share" in result.out
    assert "web: 75.00% of tokens; web.txt" in result.out
    row = last_row()
    given = row["train/tokens_seen/web"] + row["train/tokens_seen/talks"]
    assert row["train/share/web"] == row["train/tokens_seen/web"] / given
    assert abs(row["train/share/web"] - 0.75) * given < 33  # a row
    assert f"mixed       web: {row['train/tokens_seen/web']:,.0f} tokens" in result.out
    # the loss of all is a mean of those of the sources
    for part in ("train", "val"):
        losses = [row[f"{part}/loss{name}"] for name in ("/web", "", "/talks")]
        assert sorted(losses) in (losses, losses[::-1])


def test_pairs_of_several_sources_have_losses_of_their_own(train) -> None:
    sources = "data.sources={a: {path: pairs.jsonl}, b: {path: more.jsonl}}"
    result = train("objective=dpo", sources, "data.mix_by=examples", "objective.beta=1.0", "optimizer.lr=0.01")
    assert result.status == 0, result.err
    row = last_row()
    losses = [row[f"train/loss{name}"] for name in ("/a", "", "/b")]
    assert sorted(losses) in (losses, losses[::-1])
    assert losses[1] == pytest.approx((losses[0] + losses[2]) / 2, rel=1e-5)  # two rows of each in a batch
    assert {"val/loss/a", "val/loss/b"} <= row.keys()


@pytest.mark.parametrize(
    ("objective", "learns"),
    [
        (["dpo", "objective.loss=orpo"], ["chosen", "rejected"]),
        (["dpo", "objective.loss=cpo"], ["chosen", "rejected"]),
        (["reward"], ["completions"]),
        (["contrastive", "model=encoder_nano"], ["anchor", "positive"]),
    ],
    ids=["orpo", "cpo", "ranked", "contrastive"],
)
def test_the_loss_is_the_mean_of_those_of_two_sources_of_equal_size(
    objective: list[str], learns: list[str], train
) -> None:
    """Pairs and tokens are equally many in both, so that every normalizer weighs them alike."""
    texts = {"chosen": "good", "rejected": "bad", "completions": ["good", "fair", "bad"]}
    for file, sign in (("a.jsonl", "+"), ("b.jsonl", "-")):
        given = [{name: texts.get(name, f"{name} {i} {sign}") for name in learns} for i in range(10, 40)]
        write(
            file, [row if "anchor" in learns else {"prompt": f"{sign} {i}", **row} for i, row in enumerate(given, 10)]
        )
    sources = "data.sources={a: {path: a.jsonl}, b: {path: b.jsonl}}"
    name, *options = objective
    result = train(
        f"objective={name}", *options, sources, "data.mix_by=examples", "tokenizer=byte", "optimizer.lr=0.01"
    )
    assert result.status == 0, result.err
    row = last_row()
    for part in ("train", "val"):
        first, loss, second = (row[f"{part}/loss{name}"] for name in ("/a", "", "/b"))
        assert loss == pytest.approx((first + second) / 2, rel=1e-5)
        assert first != second


@pytest.mark.slow
def test_prompts_of_several_sources_have_scores_and_columns_of_their_own(train) -> None:
    write("sums.jsonl", [{"prompt": f"{i} + {i} =", "answer": str(2 * i)} for i in range(20)])
    write("poems.jsonl", [{"prompt": f"Line {i}:"} for i in range(20)])
    Path("rewards.py").write_text(
        "def reward(prompts, completions, answer, **columns):\n    return [-1.0 if a is None else 1.0 for a in answer]\n"
    )
    options = ("objective.reward=rewards.py:reward", "objective.max_new_tokens=4", "objective.group_size=2")
    sources = "data.sources={sums: {path: sums.jsonl, weight: 3}, poems: {path: poems.jsonl, weight: 1}}"
    result = train("objective=grpo", *options, sources, "data.mix_by=examples", "trainer.max_steps=3")
    assert result.status == 0, result.err
    row = last_row()
    assert (row["objective/scores/sums"], row["objective/scores/poems"]) == (1.0, -1.0)
    assert row["objective/scores"] == 0.5  # three prompts of four
    assert (row["val/scores/sums"], row["val/scores/poems"]) == (1.0, -1.0)
    assert row["train/share/sums"] == 0.75


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["data.sources={web: {path: nope.txt}}"], "data.sources.web.path=nope.txt: no such file or folder"),
        (
            ["data.sources={web: {path: web.txt, colum: x}}"],
            "data.sources.web.colum: no such option, did you mean column?",
        ),
        (["data.sources={web: {weight: 1}}"], "data.sources.web.path: missing; name its files"),
        (
            ["data.sources={web: {path: web.txt, kind: pairs}}"],
            "data.sources.web.kind=pairs: objective=clm reads text and chat",
        ),
        (
            ["objective=dpo", "data.sources={web: {path: web.txt, kind: text}}"],
            "data.sources.web.kind=text: objective=dpo reads preference",
        ),
        (["data.sources={web: {path: web.txt, batch_size: 3}}"], "it is of all sources together: data.batch_size"),
        (
            ["data.sources={web: {path: web.txt, weight: -1}}"],
            "data.sources.web.weight=-1: expected a number of at least 0",
        ),
        (["data.sources={web: {path: web.txt, weight: [[1, 1], [0, 2]]}}"], "pairs by increasing fraction"),
        (["data.sources={web: {path: web.txt, weight: 0}}"], "data.sources: every weight is 0"),
        ([f"data.sources={{{WEB}, b: {{path: web.txt}}}}"], "data.sources.b.weight: missing, and others have one"),
        (["data.sources={web: {path: web.txt, epochs: 0}}"], "data.sources.web.epochs=0: expected a whole number"),
        (
            ["data.sources={web: {path: web.txt, epochs: 1}}", "trainer.max_steps=1000"],
            "data.sources: all end by epochs or cap",
        ),
        (["data.sources=web.txt"], "data.sources=web.txt: expected names with options each"),
        (
            ["objective=grpo", "data=text", "data.sources={web: {path: pairs.jsonl, kind: prompts}}"],
            "data.sources.web.max_prompt_len: missing; give it, or data=prompts",
        ),
        (["data.mix_by=rows"], "data.mix_by=rows: expected one of tokens, examples"),
        (["data.mix_temperature=0"], "data.mix_temperature=0.0: expected a number above 0"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], error: str, train) -> None:
    result = train(*arguments)
    assert result.status in (1, 2)
    lines = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.err
    assert error in lines[0]
    assert "Traceback" not in result.err


def test_an_option_of_one_source_beside_several_is_said_to_be_unused(train) -> None:
    result = train("data.sources={web: {path: nope.txt}}", "data.path=web.txt")
    assert result.status == 1
    assert "data.path=web.txt: has no effect: each of data.sources has its own" in result.out


def test_files_that_change_are_refused_on_resume(train, command) -> None:
    result = train(f"data.sources={{{WEB}, {TALKS}}}", "callbacks.checkpoint.every_n_steps=2")
    assert result.status == 0, result.err
    write("talks.jsonl", [{"prompt": f"{i} less {i} is ", "completion": "0"} for i in range(40)])
    result = command("train", "resume=run", "trainer.max_steps=6")
    assert result.status != 0
    assert "error: data.sources.talks.path: its contents have changed since" in result.err


@pytest.mark.slow
def test_a_mixture_of_files_goes_on_with_other_batches(train, command) -> None:
    sources = f"data.sources={{{WEB}, {TALKS}}}"
    options = ("scheduler=constant", "scheduler.warmup_steps=0", "optimizer=adamw", "trainer.limit_val_batches=0")
    whole = command("train", *SMALL, *options, sources, "trainer.max_steps=8", "hydra.run.dir=whole")
    first = train(*options, sources, "trainer.max_steps=4")
    rest = command(
        "train", "resume=run", "data.batch_size=2", "trainer.accumulate_grad_batches=2", "trainer.max_steps=8"
    )
    assert (whole.status, first.status, rest.status) == (0, 0, 0), rest.err
    expected, got = (rows(run) for run in ("whole", "run"))
    for ours, theirs in zip(got, expected, strict=True):
        assert float(ours["train/loss"]) == pytest.approx(float(theirs["train/loss"]), rel=1e-5)
        assert ours["train/tokens_seen/talks"] == theirs["train/tokens_seen/talks"]
