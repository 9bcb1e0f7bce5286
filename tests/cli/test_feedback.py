"""Judgements of a model: both orders asked, revisions by principle, rows that are done not done again."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from genai_pl.training.ai_feedback import compare, critique, remote_writer
from tests.conftest import TINY
from tests.serving.servers import write_model
from tests.serving.test_tools import TEMPLATE


class LongerIsBetter:
    """A judge that likes long answers, and the first place a little."""

    concurrent = False
    asked: list[str]

    def __init__(self) -> None:
        self.asked = []

    def preference(self, prompt: str, options: list[str]) -> list[float]:
        self.asked.append(prompt)
        first, second = (len(part.split("\n\n")[0]) for part in prompt.split("Answer A: ")[1].split("Answer B: "))
        return [0.5 * first + 0.2, 0.5 * second]

    def answer(self, prompt: str) -> str:
        self.asked.append(prompt)
        return f"answer {len(self.asked)}"


def test_both_orders_are_asked_and_averaged() -> None:
    judge = LongerIsBetter()
    row = compare(judge, "p", "short", "much longer", rubric="")
    assert (row["chosen"], row["rejected"]) == ("much longer", "short")
    assert len(judge.asked) == 2
    swapped = compare(judge, "p", "much longer", "short", rubric="")
    assert swapped["chosen"] == row["chosen"]
    assert swapped["margin"] == pytest.approx(row["margin"])
    even = compare(judge, "p", "same", "same", rubric="")
    assert even["position_bias"] == pytest.approx(0.0498, abs=1e-4)  # sigmoid(0.2) - 1/2
    assert even["margin"] == pytest.approx(0.0, abs=1e-9)


def test_each_principle_criticizes_and_revises_the_answer_before() -> None:
    writer = LongerIsBetter()
    row = critique(writer, "p", [{"critique": "C1", "revision": "R1"}, {"critique": "C2", "revision": "R2"}])
    assert (row["rejected"], row["chosen"]) == ("answer 1", "answer 5")
    assert "C1" in writer.asked[1]
    assert "answer 1" in writer.asked[1]
    assert "answer 2" in writer.asked[2]
    assert "R1" in writer.asked[2]
    assert "answer 3" in writer.asked[3]


class Endpoint(BaseHTTPRequestHandler):
    failures = 0

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if Endpoint.failures:
            Endpoint.failures -= 1
            self.send_error(500)
            return
        assert self.path == "/v1/chat/completions"
        assert self.headers["Authorization"] == "Bearer secret"
        reply = {"choices": [{"message": {"content": "B" if body["max_tokens"] == 4 else f"from {body['model']}"}}]}
        data = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("KEY", "secret")
    monkeypatch.setattr("time.sleep", lambda _: None)
    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_an_endpoint_is_asked_again_when_it_fails(endpoint: str) -> None:
    writer = remote_writer(endpoint, model="m", key_variable="KEY", retries=2)
    Endpoint.failures = 2
    assert writer.answer("p") == "from m"
    a, b = writer.preference("p", [" A", " B"])
    assert b > a


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_labels_are_written_once_and_train_a_policy(endpoint: str, command, tmp_path: Path) -> None:
    data = [{"prompt": f"p{i}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(6)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    arguments = ("feedback", f"judge={endpoint}", "key_variable=KEY", "data.path=prompts.jsonl", "out=pairs.jsonl")
    first = command(*arguments, "limit=4")
    assert first.status == 0, first.err
    with (tmp_path / "pairs.jsonl").open("a") as file:
        file.write('{"row": 4, "prom')  # a crash
    assert command(*arguments).status == 0
    labels = rows(tmp_path / "pairs.jsonl")
    assert [row["row"] for row in labels] == list(range(6))
    assert all(row["position_bias"] == pytest.approx(-0.5, abs=1e-3) for row in labels)  # it always says B
    trained = command("train", "objective=dpo", *TINY, "data.path=pairs.jsonl")
    assert trained.status == 0, trained.err


def test_a_local_model_criticizes_itself(command, tmp_path: Path) -> None:
    assert command("train", *TINY, "model.max_seq_len=256", "hydra.run.dir=run").status == 0
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "p"}\n{"prompt": "q"}\n')
    (tmp_path / "own.yaml").write_text("principles:\n- {critique: C, revision: R}\n")
    arguments = ("feedback", "checkpoint=run", "data.path=prompts.jsonl", "generation.max_new_tokens=4")
    result = command(*arguments, "task=critique", "constitution=own.yaml", "out=revised.jsonl")
    assert result.status == 0, result.err
    assert set(rows(tmp_path / "revised.jsonl")[0]) == {"row", "prompt", "completion", "chosen", "rejected", "record"}
    assert command(*arguments, "out=pairs.jsonl").status == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("task=both",), "task=both is not one of label, critique"),
        (("limit=-1",), "limit=-1 must be at least 1"),
        (("workers=0",), "workers=0 must be at least 1"),
        (("retries=-1",), "retries=-1 must be at least 0"),
        (("out=.",), "out=.: a folder, or else no file: name a file to write, as feedback.jsonl"),
        (
            ("out=prompts.jsonl/pairs.jsonl", "judge=http://127.0.0.1:1", "checkpoint=http://127.0.0.1:1"),
            "out=prompts.jsonl/p",
        ),
        (("data.prompt=question",), "no column 'question'; found: prompt (set data.prompt)"),
        (("task=critique", "constitution=nowhere.yaml", "checkpoint=http://127.0.0.1:1"), "constitution=nowhere.yaml"),
    ],
)
def test_a_mistake_is_one_line(arguments: tuple[str, ...], message: str, command, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "p"}\n')
    result = command("feedback", "data.path=prompts.jsonl", *arguments)
    assert result.status in (1, 2)
    assert message in result.err
    assert result.err.count("\n") == 1


CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]}
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
}


def test_answers_with_calls_are_compared_and_train_a_policy(command, tmp_path: Path) -> None:
    """Twice: by a judge that reads them as text, and by a reward model that reads them in its template."""
    chosen = [CALL, {"role": "tool", "content": "4"}, {"role": "assistant", "content": "It is 4."}]
    rejected = [{"role": "assistant", "content": "It is 5."}]
    prompt = [{"role": "user", "content": "2+2?"}]
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "tools": [TOOL]}
    (tmp_path / "prompts.jsonl").write_text(lines(*[row] * 4))
    judge = LongerIsBetter()
    compared = compare(judge, prompt, chosen, rejected, rubric="")
    assert (
        'Answer A: assistant calls add({"a": 2})\ntool: 4\nassistant: It is 4.\n\nAnswer B: It is 5.' in judge.asked[0]
    )
    assert compared["chosen"] == chosen
    base = write_model(tmp_path / "base", template=False, max_seq_len=512)
    (base / "chat_template.jinja").write_text(TEMPLATE)
    own = [option for option in TINY if not option.startswith(("model", "tokenizer", "trainer.max_steps"))]
    tiny = (*own, "init_from=base", "trainer.max_steps=1", "data.path=prompts.jsonl")
    trained = command("train", "objective=reward", *tiny, "hydra.run.dir=judge")
    assert trained.status == 0, trained.err
    arguments = ("feedback", "judge=judge", "data.path=prompts.jsonl", "out=pairs.jsonl")
    assert command(*arguments, "limit=2").status == 0
    labelled = command(*arguments)
    assert labelled.status == 0, labelled.err
    for line in rows(tmp_path / "pairs.jsonl"):
        assert line["tools"] == [TOOL]
        assert rejected in (line["chosen"], line["rejected"])
        assert any(len(line[name]) == 3 and "tool_calls" in line[name][0] for name in ("chosen", "rejected"))
    result = command("train", "objective=dpo", *tiny[:-1], "data.path=pairs.jsonl")
    assert result.status == 0, result.err


PAIRS = [{"prompt": f"p{i}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(3)]
LABEL = {"row": 0, "prompt": "p0", "chosen": "a0", "rejected": "b0", "margin": 1.0, "position_bias": 0.0}
REVISED = {"row": 0, "prompt": "p0", "completion": "a", "chosen": "a", "rejected": "b", "record": []}


def lines(*values: object) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a letter to a friend\nand no more", "line 1 is not what task=label writes"),
        ("no line end", "line 1 is not what task=label writes"),
        (lines(*PAIRS), "line 1 is not what task=label writes"),
        (lines(LABEL) + "1", "line 2 is not what task=label writes"),
        ("1\n", "line 1 is not what task=label writes"),
        (lines(LABEL) + '{"row": 1, "pro\n' + lines({**LABEL, "row": 2}), "line 2 is not what task=label writes"),
        (lines({**LABEL, "chosen": 1}), "line 1 is not what task=label writes"),
        (lines(REVISED), "line 1 is not what task=label writes"),
        (lines(LABEL, LABEL), "line 2 is a row twice"),
        (lines(LABEL, {**LABEL, "row": 1}), "line 2 is about 'p0', which is not row 2 of data.path=prompts.jsonl"),
        (lines({**LABEL, "row": 7}), "line 1 is about 'p0', which is not row 8 of data.path=prompts.jsonl"),
        (lines({**LABEL, "chosen": "x"}), "line 1 compares other answers than row 1 has"),
    ],
)
def test_a_file_that_is_not_of_this_command_and_data_is_refused_and_left_as_it_is(
    text: str, message: str, endpoint: str, command, tmp_path: Path
) -> None:
    (tmp_path / "prompts.jsonl").write_text(lines(*PAIRS))
    (tmp_path / "mine.jsonl").write_text(text)
    result = command("feedback", f"judge={endpoint}", "data.path=prompts.jsonl", "out=mine.jsonl")
    assert result.status == 2
    assert f"out=mine.jsonl: {message}; name a new file" in result.err
    assert result.err.count("\n") == 1
    assert (tmp_path / "mine.jsonl").read_text() == text


def test_labels_in_the_file_of_a_critique_are_refused(endpoint: str, command, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(lines(*PAIRS))
    (tmp_path / "mine.jsonl").write_text(lines(LABEL))
    result = command("feedback", "task=critique", f"checkpoint={endpoint}", "data.path=prompts.jsonl", "out=mine.jsonl")
    assert result.status == 2
    assert "out=mine.jsonl: line 1 is not what task=critique writes; name a new file" in result.err


def test_the_data_are_not_written_over(endpoint: str, command, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(lines(LABEL))
    result = command("feedback", f"judge={endpoint}", "data.path=prompts.jsonl", "out=./prompts.jsonl")
    assert result.status == 2
    assert "out=./prompts.jsonl: data.path=prompts.jsonl is read from it; name a new file" in result.err
    assert (tmp_path / "prompts.jsonl").read_text() == lines(LABEL)


def test_nothing_is_written_before_the_judge_is_there(command, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(lines(*PAIRS))
    text = lines(LABEL) + '{"row": 1, "prom'
    (tmp_path / "pairs.jsonl").write_text(text)
    for judge in ("judge=nowhere", "judge=null"):
        assert command("feedback", judge, "data.path=prompts.jsonl", "out=pairs.jsonl").status
        assert command("feedback", judge, "data.path=prompts.jsonl", "out=new/pairs.jsonl").status
        assert (tmp_path / "pairs.jsonl").read_text() == text
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("end", ["", '{"row": 1, "prompt": "\u00e9'.encode()[:-1], "{"])
def test_a_last_line_is_kept_where_whole_and_dropped_where_cut(
    end: str | bytes, endpoint: str, command, tmp_path: Path
) -> None:
    (tmp_path / "prompts.jsonl").write_text(lines(*PAIRS))
    own = {**LABEL, "margin": 0.25}
    complete = lines(own).encode()
    (tmp_path / "pairs.jsonl").write_bytes(
        complete + (end if isinstance(end, bytes) else end.encode()) if end else complete[:-1]
    )
    arguments = ("feedback", f"judge={endpoint}", "key_variable=KEY", "data.path=prompts.jsonl", "out=pairs.jsonl")
    result = command(*arguments, "limit=2")
    assert result.status == 0, result.err
    assert [row["row"] for row in rows(tmp_path / "pairs.jsonl")] == [0, 1]
    assert rows(tmp_path / "pairs.jsonl")[0] == own
    assert command(*arguments, "limit=1").status == 0  # more is there than the limit asks for


def test_answers_given_as_messages_are_judged(endpoint: str, command, tmp_path: Path) -> None:
    def talk(*texts: str) -> list[dict[str, str]]:
        return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]

    data = [{"prompt": f"p{i}", "chosen": talk(f"p{i}", "a"), "rejected": talk(f"p{i}", "b")} for i in range(4)]
    (tmp_path / "ultra.jsonl").write_text(lines(*data))
    arguments = ("feedback", f"judge={endpoint}", "key_variable=KEY", "out=pairs.jsonl")
    for _ in range(2):
        result = command(*arguments, "data.path=ultra.jsonl")
        assert result.status == 0, result.err
    labels = rows(tmp_path / "pairs.jsonl")
    assert [(row["prompt"], {row["chosen"], row["rejected"]}) for row in labels] == [
        (talk(f"p{i}"), {"a", "b"}) for i in range(4)
    ]
    longer = [{"prompt": "p", "chosen": talk("p", "a", "q", "r"), "rejected": talk("p", "b")}]
    (tmp_path / "longer.jsonl").write_text(lines(*longer))
    result = command(*arguments[:-1], "data.path=longer.jsonl", "out=other.jsonl")
    assert result.status == 0, result.err
    (line,) = rows(tmp_path / "other.jsonl")
    assert sorted([line["chosen"], line["rejected"]], key=len) == [talk("p", "b")[1:], talk("p", "a", "q", "r")[1:]]
    (tmp_path / "asked.jsonl").write_text(lines({"prompt": talk("p", "a"), "chosen": "a", "rejected": "b"}))
    result = command(*arguments[:-1], "data.path=asked.jsonl", "out=third.jsonl")
    assert "row 1: column 'prompt': ends with the assistant; a judge is asked about what follows" in result.err
    assert result.err.count("\n") == 1


def test_a_reward_model_chooses_the_answer_that_evaluation_scores_higher(command, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(lines(*({**row, "prompt": f"{row['prompt']} " * 3} for row in PAIRS)))
    data = ("data.path=pairs.jsonl", "data.val_path=pairs.jsonl")
    options = ("optimizer.lr=1e-2", "trainer.max_steps=3", "trainer.limit_val_batches=0")
    trained = command("train", *TINY, "objective=reward", *data, *options, "hydra.run.dir=judge")
    assert trained.status == 0, trained.err
    arguments = ("feedback", "data.path=pairs.jsonl", "out=new/labels.jsonl")
    refused = {
        ("judge=judge", "rubric=short"): "rubric: not read by a reward model (judge=judge); leave it out",
        (
            "checkpoint=judge",
            "data.first=none",
        ): "checkpoint=judge: a reward model, which writes no answers; give it as",
    }
    for options, message in refused.items():
        result = command(*arguments, *options)
        assert (result.status, result.err.count("\n")) == (2, 1)
        assert message in result.err
        assert not (tmp_path / "new").exists()
    result = command(*arguments, "judge=judge", "data.first=rejected", "data.second=chosen")
    assert result.status == 0, result.err
    assert "bias" not in result.out
    labels = rows(tmp_path / "new" / "labels.jsonl")
    assert all(row["position_bias"] == 0.0 < row["margin"] < 1.0 for row in labels)
    judged = command("evaluate", "checkpoint=judge", "data.path=new/labels.jsonl")
    assert judged.status == 0, judged.err
    assert judged.out.splitlines()[0].split() == ["accuracy", "1.0000"]
