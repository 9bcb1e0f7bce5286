"""What rewards may give and how they may be named: TRL 1.16 is followed where it has a say, the rest is one line."""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from genai_pl.errors import ConfigError
from genai_pl.evaluation import pair_windows, reward_scores
from genai_pl.loading import load
from genai_pl.training.rewards import load_rewards

PROMPTS, SAID = ["p0", "p1", "p2"], ["a", "bb", "ccc"]

CODE = """
import functools
import numpy as np
import torch
from beside import FACTOR

async def later(prompts, completions, **columns):
    return [float(len(said)) for said in completions]

class Judge:
    def __init__(self, factor):
        self.factor = factor
    def __call__(self, prompts, completions, **columns):
        return [self.factor * len(said) for said in completions]
    @staticmethod
    def still(prompts, completions, **columns):
        return [1.0] * len(prompts)

def length(prompts, completions, scale=1, **columns):
    return [scale * len(said) for said in completions]

judge, double = Judge(FACTOR), functools.partial(length, scale=2)

def answer(prompts, completions, answer, **columns):
    return [float(a == said) for a, said in zip(answer, completions)]

def only_first(prompts, completions, **columns):
    return [1.0] + [None] * (len(prompts) - 1)

def keys(prompts, completions, **columns):
    return [float(len(columns))] * len(prompts)

def fails(prompts, completions, **columns):
    return [{}["answer"] for _ in prompts]

def swapped(completions, prompts, **columns):
    return [float(len(said)) if asked[0] == "p" else -1.0 for said, asked in zip(completions, prompts)]

def as_trl_documents(completions, answer, **kwargs):
    assert kwargs["prompts"][0] == "p0"
    return [float(a == said) for a, said in zip(answer, completions)]

def second(prompts, answer, **kwargs):
    return [float(a == said) for a, said in zip(answer, kwargs["completions"])]

def keywords(**kwargs):
    return [float(a == said) for a, said in zip(kwargs["answer"], kwargs["completions"])]

def keyword_only(*, completions, answer, **kwargs):
    return [float(a == said) for a, said in zip(answer, completions)]

def by_position(p, c, **columns):
    return [float(len(said)) if asked[0] == "p" else -1.0 for said, asked in zip(c, p)]

def any_position(*given, **columns):
    return by_position(*given)

def half_named(prompts, c):
    return by_position(prompts, c)

@functools.wraps(swapped)
def wrapped(*given, **named):
    return swapped(*given, **named)

@functools.wraps(length)
def wrapped_by_position(p, c, **columns):
    return length(p, c)

def no_prompts(completions, other):
    return [0.0] * len(completions)

def leaves(prompts, completions, **columns):
    raise SystemExit(3)

async def leaves_later(prompts, completions, **columns):
    raise SystemExit(3)

def fails_while_giving(prompts, completions, **columns):
    yield 1.0
    raise RuntimeError("half")

async def fails_later(prompts, completions, **columns):
    raise RuntimeError("the judge\\nis away")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with rewards in several places; each test has modules of its own."""
    import sys

    (tmp_path / "lib" / "inner").mkdir(parents=True)
    for place in (tmp_path / "judges_here.py", tmp_path / "lib" / "inner" / "judges_there.py"):
        place.write_text(CODE)
        (place.parent / "beside.py").write_text("FACTOR = 3\n")
    (tmp_path / "broken_here.py").write_text("1 / 0\n")
    (tmp_path / "leaving_here.py").write_text("raise SystemExit(1)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("judges_here", "judges_there", "broken_here", "beside", "lib", "lib.inner", "lib.inner.judges_there"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def loaded(*names: str, weights: list[float] | None = None) -> Callable[..., list[float]]:
    return load_rewards(names, weights, policy=torch.nn.Module(), device=torch.device("cpu"))


@pytest.fixture
def give(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[float]]:
    """Scores by a reward that gives these values."""
    import sys
    from types import ModuleType

    def scores(*functions: object, weights: list[float] | None = None) -> list[float]:
        module = ModuleType("given_here")
        for n, values in enumerate(functions):
            setattr(module, f"f{n}", lambda prompts, completions, values=values: values)
        monkeypatch.setitem(sys.modules, "given_here", module)
        return loaded(*(f"given_here:f{n}" for n in range(len(functions))), weights=weights)(PROMPTS, SAID)

    return scores


@pytest.mark.parametrize(
    "values",
    [
        [1, 2.0, True],
        (1, 2, 1),
        np.array([1, 2, 1]),
        np.array([[1.0], [2.0], [1.0]], dtype=np.float32),
        torch.tensor([1.0, 2.0, 1.0], requires_grad=True),
        torch.tensor([[1], [2], [1]]),
        [torch.tensor(1.0), np.float32(2), np.bool_(True)],
        [torch.tensor([1.0]), [2.0], np.array([1])],
        (x for x in (1.0, 2.0, 1.0)),
    ],
    ids=lambda values: type(values).__name__,
)
def test_a_reward_may_give_its_numbers_in_any_form(values: object, give: Callable[..., list[float]]) -> None:
    assert give(values) == [1.0, 2.0, 1.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, "objective.reward gave None for 3 completions (given_here:f0)"),
        (1.0, "objective.reward gave 1.0 for 3 completions (given_here:f0)"),
        ("abc", "objective.reward gave 'abc' for 3 completions (given_here:f0)"),
        ({0: 1.0, 1: 2.0, 2: 3.0}, "for 3 completions (given_here:f0)"),
        ([1.0, 2.0], "objective.reward gave (2,) numbers for 3 completions (given_here:f0)"),
        (np.zeros((3, 2)), "objective.reward gave (3, 2) numbers for 3 completions (given_here:f0)"),
        (torch.zeros(1, 3), "objective.reward gave (1, 3) numbers for 3 completions (given_here:f0)"),
        (torch.tensor(1.0), "objective.reward gave () numbers for 3 completions (given_here:f0)"),
        ([1.0, math.nan, 1.0], "objective.reward=given_here:f0: nan for completion 1 (prompt 'p1')"),
        ([1.0, 1.0, -math.inf], "objective.reward=given_here:f0: -inf for completion 2 (prompt 'p2')"),
        (["1.0", 1.0, 1.0], "objective.reward=given_here:f0: '1.0' for completion 0 (prompt 'p0')"),
        ([1.0, [1.0, 2.0], 1.0], "objective.reward=given_here:f0: [1.0, 2.0] for completion 1 (prompt 'p1')"),
        ([10**400, 1.0, 1.0], "objective.reward=given_here:f0: 1000"),
        ([10**5000, 1.0, 1.0], "objective.reward=given_here:f0: int of too many digits for completion 0"),
        ([1.0, np.complex64(1j), 1.0], "objective.reward=given_here:f0: np.complex64(1j) for completion 1"),
        ([1j, 1.0, 1.0], "objective.reward=given_here:f0: 1j for completion 0 (prompt 'p0')"),
    ],
)
def test_what_is_no_number_for_each_completion_is_one_line_that_names_the_reward_and_the_row(
    values: object, message: str, give: Callable[..., list[float]]
) -> None:
    with pytest.raises(ConfigError) as error:
        give(values)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_reward_that_gives_none_is_left_out_of_the_weighted_sum_as_in_trl(give: Callable[..., list[float]]) -> None:
    first, second, weights = [1.0, None, None], [10.0, 20.0, None], [2.0, 0.5]
    rewards = give(first, second, weights=weights)
    per_function = torch.tensor([[math.nan if x is None else x for x in row] for row in (first, second)]).T
    expected = (per_function * torch.tensor(weights)).nansum(1)  # GRPOTrainer of TRL 1.16
    expected[per_function.isnan().all(1)] = math.nan
    np.testing.assert_equal(np.array(rewards), expected.numpy())


def test_that_no_reward_applies_is_said_once(
    give: Callable[..., list[float]], caplog: pytest.LogCaptureFixture
) -> None:
    assert math.isnan(give([1.0, None, 2.0])[1])
    assert [record.message for record in caplog.records if "no reward applies" in record.message]


def test_an_aggregate_of_steps_without_a_process_reward_model_is_one_line(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"objective.step_rewards=min has no effect: no objective.reward"):
        load_rewards(
            ["judges_here:length"], None, step_rewards="min", policy=torch.nn.Module(), device=torch.device("cpu")
        )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("judges_here:length", [1, 2, 3]),
        ("judges_here.length", [1, 2, 3]),
        ("judges_here.py:length", [1, 2, 3]),
        ("lib/inner/judges_there.py:length", [1, 2, 3]),
        ("./lib/inner/judges_there.py:length", [1, 2, 3]),
        ("lib.inner.judges_there:length", [1, 2, 3]),
        ("lib.inner.judges_there.length", [1, 2, 3]),
        ("judges_here:later", [1, 2, 3]),
        ("judges_here:judge", [3, 6, 9]),
        ("judges_here:double", [2, 4, 6]),
        ("judges_here:Judge.still", [1, 1, 1]),
        ("judges_here:swapped", [1, 2, 3]),
        ("judges_here:wrapped", [1, 2, 3]),
        ("judges_here:wrapped_by_position", [1, 2, 3]),
        ("judges_here:by_position", [1, 2, 3]),
        ("judges_here:any_position", [1, 2, 3]),
        ("judges_here:half_named", [1, 2, 3]),
    ],
)
def test_a_reward_is_found_under_the_names_that_people_type(
    name: str, expected: list[int], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name.startswith("lib."):
        monkeypatch.syspath_prepend(folder)
        (folder / "beside.py").write_text("FACTOR = 3\n")
    assert loaded(name)(PROMPTS, SAID) == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "judges_here:nothing",
            "objective.reward=judges_here:nothing: cannot be imported (module 'judges_here' has no",
        ),
        ("judges_here.nothing", "objective.reward=judges_here.nothing: cannot be imported"),
        ("judges_her.length", "objective.reward=judges_her.length: no module judges_her to import"),
        ("lib/judges.py:length", "objective.reward=lib/judges.py:length: cannot be imported (no file"),
        ("broken_here:f", "objective.reward=broken_here:f: cannot be imported (ZeroDivisionError: division by zero)"),
        (
            "judges_here.py",
            "objective.reward=judges_here.py: name the function in the file too, as judges_here.py:FUNCTION",
        ),
        ("nowhere.py", "objective.reward=nowhere.py: name the function in the file too, as nowhere.py:FUNCTION"),
        ("leaving_here:f", "objective.reward=leaving_here:f: cannot be imported (SystemExit: 1)"),
        ("beside:FACTOR", "objective.reward=beside:FACTOR: not a function"),
    ],
)
def test_a_name_that_leads_nowhere_is_one_line(name: str, message: str, folder: Path) -> None:
    with pytest.raises(ConfigError) as error:
        loaded(name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fails", "objective.reward=judges_here:fails: raised KeyError, 'answer' (judges_here.py, line"),
        (
            "fails_later",
            "objective.reward=judges_here:fails_later: raised RuntimeError, the judge is away (judges_here.py",
        ),
        ("leaves", "objective.reward=judges_here:leaves: raised SystemExit, 3 (judges_here.py, line"),
        ("leaves_later", "objective.reward=judges_here:leaves_later: raised SystemExit, 3 (judges_here.py, line"),
        (
            "fails_while_giving",
            "objective.reward=judges_here:fails_while_giving: raised RuntimeError, half (judges_here.p",
        ),
        (
            "no_prompts",
            "objective.reward=judges_here:no_prompts: raised TypeError, no_prompts() got an unexpected keyword",
        ),
        ("as_trl_documents", "as_trl_documents: raised TypeError, as_trl_documents() missing 1 required positional"),
        ("answer", "objective.reward=judges_here:answer: raised TypeError, answer() missing 1 required positional"),
    ],
)
def test_what_a_reward_raises_is_one_line_with_its_place(name: str, message: str, folder: Path) -> None:
    with pytest.raises(ConfigError) as error:
        loaded(f"judges_here:{name}")(PROMPTS, SAID)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["as_trl_documents", "second", "keywords", "keyword_only"])
def test_a_reward_is_called_by_keyword_as_in_trl(name: str, folder: Path) -> None:
    assert loaded(f"judges_here:{name}")(PROMPTS, SAID, answer=["a", "x", "ccc"]) == [1.0, 0.0, 1.0]


def test_columns_reach_a_reward_but_those_that_are_called_as_its_arguments(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert loaded("judges_here:answer")(PROMPTS, SAID, answer=["a", "x", "ccc"]) == [1.0, 0.0, 1.0]
    columns = {"prompts": [1, 2, 3], "completions": [4, 5, 6], "answer": SAID}
    assert loaded("judges_here:keys", "judges_here:answer", weights=[1.0, 10.0])(PROMPTS, SAID, **columns) == [11.0] * 3
    messages = [record.message for record in caplog.records]
    assert sum("column prompts of the data is not handed on" in line for line in messages) == 1
    assert sum("column completions of the data is not handed on" in line for line in messages) == 1


def test_coroutines_keep_one_event_loop() -> None:
    import asyncio
    import sys
    from types import ModuleType

    loops = []

    async def score(prompts: list[str], completions: list[str]) -> list[float]:
        loops.append(asyncio.get_running_loop())
        return [0.0] * len(prompts)

    module = ModuleType("loops_here")
    module.score = functools.partial(score)
    sys.modules["loops_here"] = module
    try:
        reward = loaded("loops_here:score")
        assert reward(PROMPTS, SAID) == reward(PROMPTS, SAID) == [0.0, 0.0, 0.0]
    finally:
        del sys.modules["loops_here"]
    assert loops[0] is loops[1]


def test_a_reward_model_reads_conversations_as_in_its_training_and_in_evaluation(command, tmp_path: Path) -> None:
    conversations = [[{"role": "user", "content": f"{n}?"}] for n in range(8)]
    rows = [{"prompt": prompt, "chosen": "good", "rejected": "bad"} for prompt in conversations]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = ("model.n_layer=1", "model.n_embd=32", "model.n_head=4", "tokenizer=byte", "trainer.max_steps=20")
    result = command(
        "train", "objective=reward", *sizes, "data.path=pairs.jsonl", "optimizer.lr=1e-2", "hydra.run.dir=judge"
    )
    assert result.status == 0, result.err
    judged = load("judge")
    tokens = [
        row.tokens for row in pair_windows(conversations, ["good"] * 8, judged.tokenizer, seq_len=256, judges=True)
    ]
    expected = reward_scores(judged.model, tokens).tolist()
    reward = load_rewards(["judge"], None, policy=judged.model, device=torch.device("cpu"))
    texts = [judged.tokenizer.decode(row, skip_special_tokens=True) for row in tokens]
    assert reward(texts, ["good"] * 8, conversations) == pytest.approx(expected, abs=1e-5)
    # what stands in a prompt decoded without its markers is another text
    assert reward(texts, ["good"] * 8) != pytest.approx(expected, abs=1e-5)
