"""Episodes: the tokens of scripted plays are those that transformers makes of the conversation, and tools run safely."""

import asyncio
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from genai_pl.data.chat_template import ChatTemplate
from genai_pl.data.tool_calls import Call, call_format
from genai_pl.data.turns import Turns
from genai_pl.environments import Environment, Observation
from genai_pl.environments.calculator import Calculator, is_right
from genai_pl.environments.episode import Episode, Rules
from genai_pl.environments.guess_number import GuessNumber
from genai_pl.environments.tools import Tools, as_text
from genai_pl.environments.user_code import run_all
from genai_pl.errors import ConfigError
from tests.data.test_chat_templates import PATHS, answer, tokenizer_of, user
from tests.data.test_tool_templates import tokenizer_with
from tests.small_tokenizers import byte_level_bpe

# as Qwen's, in short
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = '<tool_call>{"name": "calculate", "arguments": {"expression": "3 * 4"}}</tool_call>'
ROW = {"prompt": "3 times 4?", "answer": "12"}


def chat_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = tokenizer_with(TEMPLATE)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    return tokenizer


def play(
    environment: object,
    tokenizer: PreTrainedTokenizerBase,
    row: Mapping[str, object],
    *completions: str,
    **rules: float,
) -> Episode:
    """An episode in which the policy says these completions, as far as it lasts."""
    limits = {"max_turns": 8, "max_new_tokens": 200, "context": 4000, "tool_timeout": 5.0, **rules}
    episode = Episode(environment, Rules("objective.environment=x", Turns(tokenizer), **limits))
    run_all([episode.start(row, 7)])
    for text in completions:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        plain = tokenizer.decode(ids, skip_special_tokens=True)
        run_all([episode.answer(ids, plain, ended=text.endswith(("<|im_end|>", "<|endoftext|>")) or ids[-1] > 255)])
        if episode.is_over:
            break
    return episode


def test_a_tool_is_called_and_its_result_read_before_the_answer() -> None:
    tokenizer = chat_tokenizer()
    episode = play(Calculator(system="Compute."), tokenizer, ROW, f"I compute.{CALL}<|im_end|>", "It is 12.<|im_end|>")
    assert (episode.done, episode.rewards, episode.n_calls, episode.n_failed) == (True, [0.0, 1.0], 1, 0)
    call = {"type": "function", "function": {"name": "calculate", "arguments": {"expression": "3 * 4"}}}
    talk = [
        {"role": "system", "content": "Compute."},
        user("3 times 4?"),
        answer("I compute.", tool_calls=[call]),
        {"role": "tool", "content": "12"},
        answer("It is 12."),
    ]
    options = {"tools": [episode.tools.schemas[0]], "return_dict": True}
    whole = tokenizer.apply_chat_template(talk, **options)["input_ids"]
    assert episode.context == whole[:-1]  # the line break after the last turn is not sampled
    said = [tokenizer.decode([t for t, s in zip(episode.tokens, episode.is_sampled, strict=True) if s])]
    assert said == [f"I compute.{CALL}<|im_end|>It is 12.<|im_end|>"]
    assert episode.metrics() == {"calls_worked": 1, "turns": 2, "episode_length": len(episode.tokens), "done": 1} | {
        "tool_calls": 1,
        "tool_errors": 0,
    }


KNOWN = ("qwen2_5", "qwen3_instruct_2507", "llama3_1", "llama3_2", "gptoss", "glm4moe", "qwen3_8")


@pytest.mark.skipif(not PATHS, reason="trl is not installed")
@pytest.mark.parametrize("path", [p for p in PATHS if p.stem in KNOWN], ids=lambda p: p.stem)
def test_an_episode_has_the_tokens_that_transformers_makes_of_the_conversation(path: Path) -> None:
    tokenizer = tokenizer_of(path)
    template, tools = ChatTemplate(tokenizer), Tools(Calculator().tools, option="", timeout=1).schemas
    assert call_format(template) is not None
    call = {
        "id": "abcdefghi",
        "type": "function",
        "function": {"name": "calculate", "arguments": {"expression": "3 * 4"}},
    }
    result = {"role": "tool", "tool_call_id": "abcdefghi", "name": "calculate", "content": "12"}
    talk = [user("3 times 4?"), answer("", tool_calls=[call]), result]
    whole = template.render_with_spans(talk, tools=tools)
    # a model stops at the token that closes its turn
    said = tokenizer(whole.text[slice(*whole.spans[0])].rstrip(), add_special_tokens=False)["input_ids"]
    episode = Episode(Calculator(), Rules("x", Turns(tokenizer), 8, 200, 4000, 5.0))
    run_all([episode.start(ROW, 0)])
    run_all([episode.answer(said, tokenizer.decode(said, skip_special_tokens=True), ended=True)])
    expected = tokenizer.apply_chat_template(talk, tools=tools, add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    assert not episode.is_over
    assert episode.context == expected
    assert sum(episode.is_sampled) == len(said)
    assert said[-1] in episode.rules.turns.end_tokens(tools) or path.stem == "glm4moe"


@pytest.mark.parametrize(
    ("written", "told"),
    [
        (CALL.replace("3 * 4", "3 / 0"), "error: calculate: division by zero"),
        (CALL.replace("calculate", "search"), "error: there is no tool search, but calculate"),
        (CALL.replace("expression", "text"), "error: calculate: missing a required argument: 'expression'"),
        ("<tool_call>{broken</tool_call>", "error: the call is not JSON"),
        (CALL + CALL.replace("3 * 4", "5"), "12<|im_end|>\n<|im_start|>tool\n5<|im_end|>"),
    ],
)
def test_errors_of_calls_are_what_the_tool_answers(written: str, told: str) -> None:
    tokenizer = chat_tokenizer()
    episode = play(Calculator(), tokenizer, ROW, f"{written}<|im_end|>")
    assert not episode.is_over
    seen = [t for t, s in zip(episode.tokens, episode.is_sampled, strict=True) if not s]
    text = tokenizer.decode(seen)
    assert text.startswith(f"\n<|im_start|>tool\n{told}")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_a_tool_has_a_time_limit_in_threads_and_in_coroutines() -> None:
    def slow(seconds: float) -> str:
        """Wait.

        Args:
            seconds: How long.
        """
        time.sleep(seconds)
        return "late"

    async def slow_too(seconds: float) -> dict:
        """Wait.

        Args:
            seconds: How long.
        """
        await asyncio.sleep(seconds)
        return {"late": seconds}

    tools = Tools([slow, slow_too], option="", timeout=0.2)
    calls = [Call(name, {"seconds": s}) for name in ("slow", "slow_too") for s in (30, 0)]
    began = time.perf_counter()
    results = run_all([tools.run(call) for call in calls])
    assert time.perf_counter() - began < 10
    assert results == [
        ("error: slow gave no answer within 0.2 seconds", False),
        ("late", True),
        ("error: slow_too gave no answer within 0.2 seconds", False),
        ('{"late": 0}', True),
    ]


def test_the_last_turn_is_a_step_even_with_a_call_and_so_is_one_that_was_cut_off() -> None:
    tokenizer = chat_tokenizer()
    episode = play(Calculator(), tokenizer, ROW, f"{CALL}<|im_end|>", f"12{CALL}<|im_end|>", max_turns=2)
    assert (episode.n_calls, episode.is_over, episode.done, len(episode.rewards)) == (1, True, True, 2)
    # the numbers of a call that is not run are no answer
    episode = play(
        Calculator(), tokenizer, {**ROW, "answer": "4"}, f"{CALL}<|im_end|>", f"{CALL}<|im_end|>", max_turns=2
    )
    assert (episode.n_calls, episode.rewards) == (1, [0.0, 0.0])
    episode = play(Calculator(), tokenizer, ROW, "It is 12")
    assert (episode.is_over, episode.ended, episode.rewards) == (True, False, [1.0])


def test_tools_without_a_turn_for_their_answer_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"its tools need objective\.max_turns=2 or more"):
        play(Calculator(), chat_tokenizer(), ROW, max_turns=1)


def test_an_episode_ends_where_the_context_has_no_room_for_a_completion() -> None:
    tokenizer = chat_tokenizer()
    start = play(Calculator(), tokenizer, ROW)
    said = f"{CALL}<|im_end|>"
    context = len(start.prompt) + len(tokenizer(said, add_special_tokens=False)["input_ids"]) + 210
    episode = play(Calculator(), tokenizer, ROW, said, context=context)
    assert (episode.is_over, episode.done, all(episode.is_sampled)) == (True, False, True)
    with pytest.raises(ConfigError, match=r"the first prompt has \d+ tokens, and beside objective.max_new_tokens=200"):
        play(Calculator(), tokenizer, ROW, context=len(start.prompt) + 199)


def test_a_game_on_texts_needs_no_template() -> None:
    tokenizer = byte_level_bpe()
    row = {"prompt": "Guess: ", "number": 3}
    episode = play(GuessNumber(guesses=4), tokenizer, row, "5", "none", "3")
    assert tokenizer.decode(episode.context) == "Guess: 5\nLower.\nnone\nGive a number.\n3"
    assert (episode.rewards, episode.done) == ([0.0, 0.0, 0.5], True)
    assert episode.metrics() == {"found": 1, "guesses": 3, "turns": 3, "episode_length": len(episode.tokens), "done": 1}
    # without a number in the row the seed draws it
    drawn = {play(GuessNumber(), tokenizer, {"prompt": "Guess: "}).environment.number for _ in range(3)}
    assert len(drawn) == 1
    lost = play(GuessNumber(guesses=1), tokenizer, row, "5", "3")
    assert (lost.rewards, lost.done) == ([0.0], True)


def test_a_search_finds_the_line_with_most_words() -> None:
    environment = Calculator(text="facts")
    environment.reset({**ROW, "facts": "A horse eats 9 kg.\nA cow eats 20 kg of grass."})
    assert environment.search("how much GRASS does a cow eat") == "A cow eats 20 kg of grass."
    assert environment.search("zebra") == "nothing found"
    assert [is_right(text, "12") for text in ("12", "= 12.0", "11, so 12", "12 of 13", "")] == [
        True,
        True,
        True,
        False,
        False,
    ]


class Wrong(Environment):
    def __init__(self, gives: object) -> None:
        self.gives = gives

    def step(self, completion: str) -> object:
        if isinstance(self.gives, BaseException):
            raise self.gives
        return self.gives


@pytest.mark.parametrize(
    ("gives", "why"),
    [
        (None, r"step gave None: give Observation\(messages, reward, done\)"),
        (Observation([], float("nan")), "step gave the reward nan: give a finite number"),
        (Observation([], 10**400), "step gave the reward 1000000.*give a finite number"),
        (Observation([], 10**5000), "step gave the reward int of too many digits"),
        (Observation([], 0.0, np.zeros(2)), r"step gave done=array\(.*\): give True or False"),
        (Observation(np.zeros(2)), r"step gave array\(.*\): give messages of the user"),
        (Observation([{"role": "user", "content": None}]), "give messages of the user or of tools"),
        (Observation([{"role": "tool", "content": {"a": 1}}]), "give messages of the user or of tools"),
        (Observation(), "step gave no messages, and done=False"),
        (Observation("more"), "reset gave messages, and step a text"),
        (Observation([answer("I said.")]), "give messages of the user or of tools"),
        (ValueError("bad\nluck"), r"step: raised ValueError, bad luck \(test_episode.py, line \d+\)"),
        (ValueError("\ud83d"), r"step: raised ValueError, \\ud83d"),
        (asyncio.CancelledError(), "step: raised CancelledError, without a message"),
        (Observation([user("\ud83d")]), "give messages of the user or of tools"),
    ],
)
def test_what_an_environment_gives_wrongly_is_one_line(gives: object, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        play(Wrong(gives), chat_tokenizer(), {"prompt": [user("Hi")]}, "Hello.<|im_end|>")


def test_halves_of_surrogate_pairs_in_texts_of_a_game_are_one_line() -> None:
    def reset(row: Mapping[str, object]) -> str:
        return row["prompt"]

    game = SimpleNamespace(reset=reset, step=lambda completion: Observation("\ud83d"))
    with pytest.raises(ConfigError, match=r"reset gave '.ud83d': give messages, or a text"):
        play(game, chat_tokenizer(), {"prompt": "\ud83d"})
    with pytest.raises(ConfigError, match=r"step gave '.ud83d': give messages of the user"):
        play(game, chat_tokenizer(), {"prompt": "Hi"}, "Hello.")


@pytest.mark.parametrize("number", [np.array, torch.tensor, lambda x: np.array([x])])
def test_numbers_of_numpy_and_torch_are_rewards_and_metrics(number: Callable[[float], object]) -> None:
    class Numbers(Environment):
        def step(self, completion: str) -> Observation:
            return Observation(reward=number(0.5), done=number(True))

        def metrics(self) -> Mapping[str, object]:
            return {"half": number(0.5), "one": np.float32(1)}

    episode = play(Numbers(), chat_tokenizer(), {"prompt": [user("Hi")]}, "Hello.<|im_end|>")
    assert episode.rewards == [0.5]
    assert episode.done
    assert episode.metrics()["half"] == 0.5


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (np.zeros(2), r"reset gave array\(.*\): give messages, or a text"),
        ([{"role": "user", "content": None}], "reset gave .*: give messages, or a text"),
        ([{"role": "user", "content": {"a": 1}}], "reset gave .*: give messages, or a text"),
        ([], r"reset gave \[\]: give messages, or a text"),
    ],
)
def test_a_first_prompt_that_no_template_can_show_is_one_line(given: object, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        play(SimpleNamespace(reset=lambda row: given), chat_tokenizer(), {})


def test_messages_of_an_environment_are_read_as_those_of_data_are() -> None:
    tokenizer = chat_tokenizer()
    turn = {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]}
    given = [turn, {"role": "user", "content": 3, "tool_calls": []}]
    episode = play(SimpleNamespace(reset=lambda row: given, tools=None), tokenizer, {})
    same = [{"role": "system", "content": "Be brief."}, user("3")]
    assert episode.prompt == tokenizer.apply_chat_template(same, add_generation_prompt=True)["input_ids"]


@pytest.mark.parametrize("tools", [len, 3])
def test_tools_that_are_no_list_are_one_line(tools: object) -> None:
    with pytest.raises(ConfigError, match=r"objective.environment=x: tools: raised TypeError, .* is not iterable"):
        play(SimpleNamespace(reset=lambda row: [user("Hi")], tools=tools), chat_tokenizer(), {})


def test_coroutines_of_all_episodes_wait_together() -> None:
    class Slow(Environment):
        async def reset(self, row: Mapping[str, object]) -> list:
            await asyncio.sleep(0.2)
            return [user("Hi")]

    tokenizer = chat_tokenizer()
    rules = Rules("x", Turns(tokenizer), 8, 10, 1000, 1.0)
    began = time.perf_counter()
    run_all([Episode(Slow(), rules).start({}, 0) for _ in range(40)])
    assert time.perf_counter() - began < 4  # one after the other it would be 8 s


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"scores": 77.0}, "'scores', which every episode has"),
        ({"turns": 1}, "'turns', which every episode has"),
        ({"x": "abc"}, "give numbers by name"),
        ({"x": 10**400}, "give numbers by name"),
        (None, "give numbers by name"),
    ],
)
def test_numbers_of_an_environment_are_numbers_under_names_of_their_own(metrics: object, message: str) -> None:
    episode = Episode(SimpleNamespace(metrics=lambda: metrics), SimpleNamespace(option="objective.environment=e:E"))
    with pytest.raises(ConfigError, match=message):
        episode._own_metrics()


@pytest.mark.parametrize(
    "result",
    [b"\xff", object(), {(1, 2): 3}, [object()], "\ud83d", ["\ud83d"]],
    ids=["bytes", "object", "key", "in a list", "half a pair", "half a pair in a list"],
)
def test_a_result_that_is_no_text_is_an_error_that_the_model_reads(result: object) -> None:
    def look() -> str:
        """Look."""
        return result

    tools = Tools([look], option="objective.environment=e:E", timeout=5.0)
    [(text, worked)] = run_all([tools.run(Call("look", {}))])
    assert not worked
    assert text.startswith("error: look: ")
    assert "0x" not in text


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (StopIteration(), "StopIteration"),
        (asyncio.CancelledError(), "CancelledError"),
        (ValueError("\ud83d"), "\\ud83d"),
    ],
)
@pytest.mark.parametrize("is_async", [False, True])
def test_whatever_a_tool_raises_is_what_the_model_reads_at_once(error: Exception, told: str, is_async: bool) -> None:
    def look() -> str:
        """Look."""
        raise error

    async def look_later() -> str:
        """Look."""
        raise error

    function = look_later if is_async else look
    tools = Tools([function], option="objective.environment=e:E", timeout=60.0)
    [(text, worked)] = run_all([tools.run(Call(function.__name__, {}))])
    assert not worked
    assert text.startswith(f"error: {function.__name__}: ")
    assert told in text
    text.encode()


def test_numbers_of_numpy_and_dates_are_results() -> None:
    assert as_text({"n": np.int64(3), "day": date(2026, 1, 2)}) == '{"n": 3, "day": "2026-01-02"}'
