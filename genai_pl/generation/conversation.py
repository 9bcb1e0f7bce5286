"""Conversations: the tokens that ask for the next answer, of as many turns as fit into the model's context."""

from typing import TYPE_CHECKING, NamedTuple

from genai_pl.data.chat_template import Message
from genai_pl.errors import ConfigError
from genai_pl.generation.text import encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class NextPrompt(NamedTuple):
    """What the model is asked with next."""

    tokens: list[int]
    n_dropped: int  # messages that fitted before and do not any more


class Conversation:
    """Messages of a user and an assistant, after what the system says, if anything."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", *, context: int, system: str | None = None) -> None:
        """context: tokens that the model reads and writes at most; system: the first message."""
        if tokenizer.chat_template is None:
            raise ConfigError(
                "chat=true: the model has no chat template: train one with data=chat and messages, "
                "or let it continue a text with prompt="
            )
        self.tokenizer, self.context, self.system = tokenizer, context, system
        self.reset()

    def reset(self) -> None:
        """Forget all that was said, but for the system's message."""
        self.messages: list[Message] = []
        self.first = 0  # the oldest message that the model is still shown

    @property
    def head(self) -> list[Message]:
        """The system's message, or none."""
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def prompt(self, text: str, *, max_new_tokens: int) -> NextPrompt:
        """The prompt that ends with this message of the user and leaves max_new_tokens for an answer.

        Oldest turns are left out until it does; ConfigError where the message alone does not fit.
        """
        question = {"role": "user", "content": text}
        starts = [n for n in range(self.first, len(self.messages)) if self.messages[n]["role"] == "user"]
        for start in [*starts, len(self.messages)]:
            tokens = encode_prompt(self.tokenizer, [*self.head, *self.messages[start:], question])
            if len(tokens) + max_new_tokens <= self.context:
                return NextPrompt(tokens, start - self.first)
        raise ConfigError(
            f"the message has {len(tokens)} tokens with what the template adds, and the context is {self.context}, "
            f"of which an answer takes {max_new_tokens}: shorten it"
        )

    def add(self, text: str, answer: str, n_dropped: int) -> None:
        """Keep a turn: what the user said, and what the model answered to it."""
        self.first += n_dropped
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
