"""OpenEnv: episodes with a server of the package, and runs that learn in it."""

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from genai_pl.environments.openenv import OpenEnv
from genai_pl.environments.user_code import event_loop, run_all
from genai_pl.errors import ConfigError
from genai_pl.training.environments import load_environment
from tests.conftest import TINY
from tests.training.test_alignment import table


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genai_pl.environments.openenv.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"the package openenv is missing: pip install 'genai_pl\[openenv\]'"):
        load_environment("openenv", {"url": "http://localhost:1"})


def test_the_text_of_an_observation_is_found() -> None:
    environment = object.__new__(OpenEnv)
    environment.text = None
    assert environment.shown({"message": "hi", "left": 3}) == "hi"
    assert environment.shown({"a": "x", "b": "y"}) == '{"a": "x", "b": "y"}'
    environment.text = "b"
    assert environment.shown({"a": "x", "b": "y"}) == "y"
    with pytest.raises(ConfigError, match="no field 'b' in the observation; found: a"):
        environment.shown({"a": "x"})


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    pytest.importorskip("openenv")
    import uvicorn
    from openenv.core.env_server import create_fastapi_app
    from openenv.core.env_server.interfaces import Environment
    from openenv.core.env_server.types import Action, Observation, State

    class Say(Action):
        message: str

    class Heard(Observation):
        message: str
        left: int

    class Letters(Environment):
        """A point for each completion of an even length; three turns, or as many as a column says."""

        SUPPORTS_CONCURRENT_SESSIONS = True

        def reset(self, seed=None, episode_id=None, turns=3, **more):
            self.left = turns
            return Heard(message=f"{turns} turns", left=turns, done=False, reward=None)

        def step(self, action, timeout_s=None, **more):
            self.left -= 1
            return Heard(
                message="go on", left=self.left, done=self.left == 0, reward=float(len(action.message) % 2 == 0)
            )

        @property
        def state(self):
            return State(step_count=0)

    app = create_fastapi_app(Letters, Say, Heard, max_concurrent_envs=64)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="critical", ws="websockets-sansio"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(20)


def test_an_episode_is_that_of_the_server(url: str) -> None:
    assert event_loop()
    environment = load_environment("openenv", {"url": url, "text": "message", "arguments": ["turns"]})()
    assert run_all([environment.reset({"prompt": "Say.", "turns": 2}, 0)]) == ["Say.\n2 turns"]
    assert run_all([environment.step("ab")]) == [("\ngo on\n", 1.0, False)]
    assert run_all([environment.step("abc")]) == [("\ngo on\n", 0.0, True)]
    assert not environment.is_open
    chat = load_environment("openenv", {"url": url, "text": "message"})()
    expected = [[{"role": "user", "content": "Say."}, {"role": "user", "content": "3 turns"}]]
    assert run_all([chat.reset({"prompt": [{"role": "user", "content": "Say."}]}, 0)]) == expected
    assert chat.metrics() == {}


@pytest.mark.slow
def test_a_policy_learns_in_it(url: str, command, tmp_path: Path) -> None:
    (tmp_path / "games.jsonl").write_text("".join(json.dumps({"prompt": f"{i}"}) + "\n" for i in range(8)))
    arguments = ("objective.environment=openenv", f"objective.environment_args={{url: '{url}', text: message}}")
    sizes = ("objective.max_new_tokens=4", "objective.group_size=2", "objective.max_turns=2", "data.batch_size=2")
    options = ("model.max_seq_len=64", "trainer.max_steps=2", "hydra.run.dir=run")
    result = command("train", "objective=grpo", *TINY, *sizes, *arguments, "data.path=games.jsonl", *options)
    assert result.status == 0, result.err
    assert 0 <= float(table(tmp_path / "run")[0]["objective/scores"]) <= 2
