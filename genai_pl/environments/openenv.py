"""OpenEnv environments: servers that the package `openenv` talks to, played like any environment of ours.

A completion becomes one field of an action, and one field of the observation becomes the next message of the user. Each
episode is a session of its own; those of a rollout wait for the server together.
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec

from genai_pl.environments.environment import Environment, Messages, Observation
from genai_pl.environments.user_code import event_loop
from genai_pl.errors import ConfigError

INSTALL = "pip install 'genai_pl[openenv]'"


class OpenEnv(Environment):
    """An environment behind an address, http://host:port or ws://host:port.

    action: field of an action that holds the completion. text: field of an observation that is shown to the model; None for
    the only text in it, else all of it as JSON. arguments: columns of the data that `reset` is given by name. A row with a
    `prompt` begins with it, and the first observation follows; both may be empty.
    """

    def __init__(
        self, url: str, action: str = "message", text: str | None = None, arguments: Sequence[str] = ()
    ) -> None:
        if find_spec("openenv") is None:
            raise ConfigError(f"objective.environment=openenv: the package openenv is missing: {INSTALL}")
        from openenv import GenericEnvClient

        self.action, self.text, self.arguments = action, text, tuple(arguments)
        self.client = GenericEnvClient(base_url=url)
        self.is_open = self.is_text = False

    async def reset(self, row: Mapping[str, object], seed: int) -> Messages | str:
        """The row's prompt, and what the environment shows first."""
        missing = [name for name in self.arguments if name not in row]
        if missing:
            raise ConfigError(
                f"objective.environment_args: no column {missing[0]!r} in the data, which arguments names"
            )
        self.is_open = True
        result = await self.client.reset(seed=seed, **{name: row[name] for name in self.arguments})
        prompt, shown = row.get("prompt") or "", self.shown(result.observation)
        self.is_text = isinstance(prompt, str)
        if isinstance(prompt, str):
            return "\n".join(part for part in (prompt, shown) if part)
        return [*prompt, *([{"role": "user", "content": shown}] if shown else [])]

    async def step(self, completion: str) -> Observation:
        """What the environment answers to an action."""
        result = await self.client.step({self.action: completion})
        reward, shown = float(result.reward or 0.0), self.shown(result.observation)
        if result.done:
            await self.close()
        messages = f"\n{shown}\n" if self.is_text else [{"role": "user", "content": shown}]
        return Observation(messages, reward, bool(result.done))

    def shown(self, observation: Mapping[str, object]) -> str:
        """The text of an observation; ConfigError where the field that `text` names is missing."""
        if self.text is not None:
            if self.text not in observation:
                found = ", ".join(map(str, observation))
                raise ConfigError(
                    f"objective.environment_args: no field {self.text!r} in the observation; found: {found}"
                )
            return str(observation[self.text])
        texts = [value for value in observation.values() if isinstance(value, str)]
        return texts[0] if len(texts) == 1 else json.dumps(dict(observation), ensure_ascii=False, default=str)

    async def close(self) -> None:
        """End the session."""
        if self.is_open:
            self.is_open = False
            await self.client.close()

    def metrics(self) -> Mapping[str, float]:
        """Nothing to log; a session that max_turns cut off is ended."""
        if self.is_open:
            asyncio.run_coroutine_threadsafe(self.close(), event_loop())
        return {}
