"""Episode: one conversation of the policy with an environment, as tokens of which only sampled ones are learned.

The tokens of an episode grow by completions, which the policy sampled, and by observations, which the environment gave.
Nothing is tokenized twice: a completion stays as it was sampled (`genai_pl/data/turns.py`).
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from genai_pl.data.columns import Place
from genai_pl.data.messages import Message, parse_messages
from genai_pl.data.turns import Turns
from genai_pl.environments.environment import Observation
from genai_pl.environments.tools import Tools
from genai_pl.environments.user_code import OneLineErrors, plain_number
from genai_pl.errors import ConfigError, DataError

# names of metrics that rollouts and policies log themselves
TAKEN = {"scores", "scored", "kl", "ended", "response_length", "entropy", "rlhf_reward", "targets"}
TAKEN |= {"equal_groups", "sampled_groups", "taught_groups"}
TAKEN |= {"turns", "episode_length", "done", "tool_calls", "tool_errors"}


class Rules(NamedTuple):
    """What all episodes of a run share.

    option: the option that names the environment, with its value, for errors. turns: renders prompts and observations.
    max_turns: completions of an episode. max_new_tokens: of a completion. context: tokens of an episode with its prompt.
    tool_timeout: seconds of one call of a tool.
    """

    option: str
    turns: Turns
    max_turns: int
    max_new_tokens: int
    context: int
    tool_timeout: float


@dataclass
class Episode:
    """One play of an environment.

    environment: the object that plays it. rules: see `Rules`.

    After `start`: prompt (token ids), tools. After each `answer`: tokens after the prompt; is_sampled, of each of them; rewards
    of turns; turn_ends, the number of sampled tokens up to the end of each; is_over, whether the environment was done, and
    whether the last completion ended.
    """

    environment: object
    rules: Rules
    prompt: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    is_sampled: list[bool] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    turn_ends: list[int] = field(default_factory=list)
    is_over: bool = False
    done: bool = False
    ended: bool = False
    n_calls: int = 0
    n_failed: int = 0

    async def start(self, row: Mapping[str, object], seed: int) -> None:
        """Reset the environment to a row of the data, and tokenize its first messages."""
        rules, environment = self.rules, self.environment
        with OneLineErrors(f"{rules.option}: tools"):
            tools = getattr(environment, "tools", None)
            tools = [] if tools is None else list(tools)
        self.tools = Tools(tools, option=rules.option, timeout=rules.tool_timeout)
        with OneLineErrors(f"{rules.option}: reset"):
            takes_seed = "seed" in inspect.signature(environment.reset).parameters
            given = await _awaited(environment.reset(row, seed=seed) if takes_seed else environment.reset(row))
        self.is_text = isinstance(given, str)
        first = _text(given) if self.is_text else _parsed(given)
        if not first:
            raise ConfigError(f"{rules.option}: reset gave {_shown(given)}: give messages, or a text")
        if not self.is_text and first[-1]["role"] == "assistant":
            raise ConfigError(f"{rules.option}: reset gave an answer as the last message: the policy is to answer")
        if self.is_text and self.tools.schemas:
            raise ConfigError(
                f"{rules.option}: reset gave a text, and tools are shown by a chat template: give messages"
            )
        if self.tools.schemas and rules.max_turns == 1:
            raise ConfigError(
                f"{rules.option}: its tools need objective.max_turns=2 or more: a call, and what is made of it"
            )
        self.messages = [] if self.is_text else first
        self.prompt = rules.turns.prompt(first if self.is_text else self.messages, self.tools.schemas)
        room = rules.context - rules.max_new_tokens
        if len(self.prompt) > room:
            raise ConfigError(
                f"{rules.option}: the first prompt has {len(self.prompt)} tokens, and beside objective.max_new_tokens="
                f"{rules.max_new_tokens} there is room for {room} (data.seq_len, model.max_seq_len)"
            )

    @property
    def context(self) -> list[int]:
        """All tokens so far: what the next completion continues."""
        return self.prompt + self.tokens

    async def answer(self, completion: Sequence[int], text: str, ended: bool) -> None:
        """Take a completion, and append what the environment answers.

        completion: sampled tokens, the end token included. text: of them without special tokens. ended: whether there is an
        end token. The completion of turn `max_turns` is the last one, as is one of a chat template that was cut off; these
        go to `step` even where they have calls, which are not run and are no part of what `step` gets.
        """
        self.ended = ended
        self.tokens += completion
        self.is_sampled += [True] * len(completion)
        self.turn_ends.append(sum(self.is_sampled))
        is_cut = not (ended or self.is_text)  # a turn of a chat template has an end
        is_last = is_cut or len(self.turn_ends) == self.rules.max_turns
        # calls are run, everything else is a step
        said, calls = text, []
        if self.tools.schemas:
            said, calls = self.rules.turns.calls.read(text, completion, self.tools.schemas)
        if calls and not is_last:
            named = [(self.rules.turns.calls.call_id(), call.name or "unknown") for call in calls]
            results = [await self.tools.run(call) for call in calls]
            self.n_calls += len(calls)
            self.n_failed += sum(not worked for _, worked in results)
            turns = [
                {"role": "tool", "tool_call_id": number, "name": name, "content": result}
                for (number, name), (result, _) in zip(named, results, strict=True)
            ]
            observation = Observation(turns)
        else:
            named = []
            with OneLineErrors(f"{self.rules.option}: step"):
                observation = await _awaited(self.environment.step(said))
            observation = self._checked(observation)
        # what follows, if there is room for another completion
        self.rewards.append(float(observation.reward))
        self.done = bool(observation.done)
        self.is_over = self.done or is_last
        if not self.is_over:
            self._append(named, observation)

    def _append(self, calls: Sequence[tuple[str, str]], observation: Observation) -> None:
        """Append the tokens of an observation; the episode is over where they leave no room for a completion."""
        rules = self.rules
        after = observation.messages
        ids, answer = rules.turns.observation(self.messages, calls, after, self.tools.schemas)
        if len(self.prompt) + len(self.tokens) + len(ids) + rules.max_new_tokens > rules.context:
            self.is_over = True
            return
        self.tokens += ids
        self.is_sampled += [False] * len(ids)
        if not self.is_text:
            self.messages += [answer, *after]

    def _checked(self, observation: object) -> Observation:
        """The observation of a step; ConfigError for what cannot be one."""
        option = self.rules.option
        if not isinstance(observation, tuple) or not 1 <= len(observation) <= 3:
            raise ConfigError(f"{option}: step gave {_shown(observation)}: give Observation(messages, reward, done)")
        messages, *numbers = Observation(*observation)
        observation = Observation(messages, *map(plain_number, numbers))
        if not _is_finite(observation.reward):
            raise ConfigError(f"{option}: step gave the reward {_shown(observation.reward)}: give a finite number")
        if not isinstance(observation.done, bool | np.bool_ | int) or observation.done not in (True, False):
            raise ConfigError(f"{option}: step gave done={_shown(observation.done)}: give True or False")
        if observation.done:
            return observation
        messages = observation.messages
        if isinstance(messages, Sequence) and not messages:
            raise ConfigError(f"{option}: step gave no messages, and done=False: there is nothing to answer")
        if self.is_text != isinstance(messages, str):
            kinds = ("a text", "messages") if self.is_text else ("messages", "a text")
            raise ConfigError(f"{option}: reset gave {kinds[0]}, and step {kinds[1]}: give the same")
        turns = _text(messages) if self.is_text else _parsed(messages)
        if not turns or (not self.is_text and any(turn["role"] == "assistant" for turn in turns)):
            raise ConfigError(f"{option}: step gave {_shown(messages)}: give messages of the user or of tools")
        return observation._replace(messages=turns)

    def metrics(self) -> dict[str, float]:
        """Numbers of the episode by name: those that all have, and the environment's own."""
        own = self._own_metrics()
        counts = {"turns": len(self.turn_ends), "episode_length": len(self.tokens), "done": self.done}
        if self.tools.schemas:
            counts |= {"tool_calls": self.n_calls, "tool_errors": self.n_failed}
        return {**own, **{k: float(v) for k, v in counts.items()}}

    def _own_metrics(self) -> dict[str, float]:
        """The environment's own numbers; ConfigError for what is none, and for names that others have."""
        option = self.rules.option
        with OneLineErrors(f"{option}: metrics"):
            own = getattr(self.environment, "metrics", dict)()
        if isinstance(own, Mapping):
            own = {name: plain_number(value) for name, value in own.items()}
        if not isinstance(own, Mapping) or not all(map(_is_number, own.values())):
            raise ConfigError(f"{option}: metrics gave {_shown(own)}: give numbers by name")
        if taken := sorted(TAKEN & own.keys()):
            raise ConfigError(f"{option}: metrics gave {taken[0]!r}, which every episode has: choose another name")
        return {str(name): float(value) for name, value in own.items()}


async def _awaited(value: object) -> object:
    return await value if inspect.isawaitable(value) else value


def _parsed(value: object) -> list[Message]:
    """Messages in the form that those of data have; none for anything else, a content that is no text among it."""
    try:
        return parse_messages(value, Place("environment", 1))
    except DataError:
        return []


def _text(value: str) -> str:
    """A text, or none for half of a surrogate pair, which has no tokens."""
    return value if value == value.encode("utf-8", "replace").decode() else ""


def _is_number(value: object) -> bool:
    """Whether a value is a number that a float holds, nan and infinity among them."""
    try:
        return isinstance(value, int | float) and float(value) is not None
    except OverflowError:
        return False


def _is_finite(value: object) -> bool:
    return _is_number(value) and math.isfinite(value)


def _shown(value: object) -> str:
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python writes no int of more than 4300 digits
        text = f"{type(value).__name__} of too many digits"
    return text if len(text) <= 60 else f"{text[:57]}..."
