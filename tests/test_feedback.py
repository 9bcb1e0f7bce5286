"""Judgements of a model: both orders asked, revisions by principle, rows that are done not done again."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from genai_pl.feedback import compare, critique, remote_writer
from tests.conftest import TINY


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
    found = compare(judge, "p", "short", "much longer", rubric="")
    assert (found["chosen"], found["rejected"]) == ("much longer", "short")
    assert len(judge.asked) == 2
    swapped = compare(judge, "p", "much longer", "short", rubric="")
    assert swapped["chosen"] == found["chosen"]
    assert swapped["margin"] == pytest.approx(found["margin"])
    even = compare(judge, "p", "same", "same", rubric="")
    assert even["position_bias"] == pytest.approx(0.0498, abs=1e-4)  # sigmoid(0.2) - 1/2
    assert even["margin"] == pytest.approx(0.0, abs=1e-9)


def test_each_principle_criticizes_and_revises_the_answer_before() -> None:
    writer = LongerIsBetter()
    found = critique(writer, "p", [{"critique": "C1", "revision": "R1"}, {"critique": "C2", "revision": "R2"}])
    assert (found["rejected"], found["chosen"]) == ("answer 1", "answer 5")
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
    given = ("feedback", f"judge={endpoint}", "key_variable=KEY", "data.path=prompts.jsonl", "out=pairs.jsonl")
    first = command(*given, "limit=4")
    assert first.status == 0, first.err
    with (tmp_path / "pairs.jsonl").open("a") as file:
        file.write('{"row": 4, "prom')  # a crash
    assert command(*given).status == 0
    found = rows(tmp_path / "pairs.jsonl")
    assert [row["row"] for row in found] == list(range(6))
    assert all(row["position_bias"] == pytest.approx(-0.5, abs=1e-3) for row in found)  # it always says B
    trained = command("train", "objective=dpo", *TINY, "data.path=pairs.jsonl")
    assert trained.status == 0, trained.err


def test_a_local_model_criticizes_itself(command, tmp_path: Path) -> None:
    assert command("train", *TINY, "model.max_seq_len=256", "hydra.run.dir=run").status == 0
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "p"}\n{"prompt": "q"}\n')
    (tmp_path / "own.yaml").write_text("principles:\n- {critique: C, revision: R}\n")
    given = ("feedback", "checkpoint=run", "data.path=prompts.jsonl", "generation.max_new_tokens=4")
    result = command(*given, "task=critique", "constitution=own.yaml", "out=revised.jsonl")
    assert result.status == 0, result.err
    assert set(rows(tmp_path / "revised.jsonl")[0]) == {"row", "prompt", "completion", "chosen", "rejected", "record"}
    assert command(*given, "out=pairs.jsonl").status == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("task=both",), "task=both is not one of label, critique"),
        (("data.prompt=question",), "no column 'question'; found: prompt (set data.prompt)"),
        (("task=critique", "constitution=nowhere.yaml", "checkpoint=http://127.0.0.1:1"), "constitution=nowhere.yaml"),
    ],
)
def test_a_mistake_is_one_line(given: tuple[str, ...], message: str, command, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "p"}\n')
    result = command("feedback", "data.path=prompts.jsonl", *given)
    assert result.status in (1, 2)
    assert message in result.err
    assert result.err.count("\n") == 1
