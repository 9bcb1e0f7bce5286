"""Environment: the interface of a task of several turns, as Gymnasium has it, on messages.

An episode is one object of the class: `reset` gives the first prompt, then each completion of the policy goes to `step`,
which answers with an observation, until that is done. Functions in `tools` are offered to the model through its chat
template; a completion that calls some is answered with their results and does not reach `step`.

Any class with these two methods will do. Both may be coroutine functions; the episodes of a rollout then wait together.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

Messages = Sequence[Mapping[str, object]]


class Observation(NamedTuple):
    """What follows a completion.

    messages: turns for the model to read before its next completion, of any role but the assistant's; a text where `reset`
        gave a text. Those of the last step are not read.
    reward: for this turn; an episode's score is the sum over its turns.
    done: whether the episode has ended.
    """

    messages: Messages | str = ()
    reward: float = 0.0
    done: bool = False


class Environment:
    """A task of several turns; one object plays one episode.

    tools: functions that the model may call, with typed arguments and a docstring that describes each (Google's style).

    Episodes of one prompt are compared with each other, so `reset` depends on the row alone. One that draws something
    takes a second argument `seed`, the same for all episodes of the prompt and again after a resume.
    """

    tools: Sequence[Callable[..., object]] = ()

    def reset(self, row: Mapping[str, object]) -> Messages | str:
        """The first messages, or a text; row: the columns of the data, with the parsed `prompt`."""
        return row["prompt"]

    def step(self, completion: str) -> Observation:
        """The answer to a completion, given as text without special tokens."""
        raise NotImplementedError(f"{type(self).__name__} has no step")

    def metrics(self) -> Mapping[str, float]:
        """Numbers to log, asked for when the episode is over: `objective/NAME` is their mean over episodes."""
        return {}
