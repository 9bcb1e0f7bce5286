"""Conversations: the prompt of the next answer, with as many earlier turns as fit into the model's context."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from genai_pl.data.chat_template import Message, Tools
from genai_pl.errors import ConfigError
from genai_pl.generation.text import encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class NextPrompt(NamedTuple):
    """The prompt of the next answer.

    tokens: ids of the formatted messages. n_dropped: messages in the previous prompt that did not fit into this one.
    """

    tokens: list[int]
    n_dropped: int  # messages that fitted before and do not any more


class Conversation:
    """The messages of a user and an assistant, with a window on those that the model is still given.

    Turns leave from the oldest one; the system message always stays. A dropped turn does not return, even if a later message is
    shorter, so that the model does not see the conversation with changing gaps.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        context: int,
        system: str | None = None,
        tools: Tools = (),
    ) -> None:
        """context: most tokens of prompt and answer together. system: text of the system message, or None. tools: schemas
        of functions that the model may call.

        ConfigError if the tokenizer has no chat template.
        """
        if tokenizer.chat_template is None:
            raise ConfigError(
                "chat=true: the model has no chat template: train one with data=chat and messages, "
                "or let it continue a text with prompt="
            )
        self.tokenizer, self.context, self.system, self.tools = tokenizer, context, system, tools
        self.reset()

    def reset(self) -> None:
        """Remove all messages except the system message."""
        self.messages: list[Message] = []
        self.first = 0  # index of the oldest message that is still in the prompt

    @property
    def head(self) -> list[Message]:
        """The system message as a list of one message, or an empty list."""
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def prompt(self, text: str, *, max_new_tokens: int, calls: Sequence[Message] = ()) -> NextPrompt:
        """The prompt that ends with the user's message `text` and leaves max_new_tokens of the context for the answer.

        calls: turns after the message: calls of tools and their results.

        Oldest turns are dropped until it fits; ConfigError if the message does not fit alone. Nothing is stored: `add` does that
        once the answer is complete, so an interrupted or empty answer leaves the conversation as it was.
        """
        question = {"role": "user", "content": text}
        # a prompt begins with a user message: most chat templates refuse other orders
        starts = [n for n in range(self.first, len(self.messages)) if self.messages[n]["role"] == "user"]
        for start in [*starts, len(self.messages)]:
            tokens = encode_prompt(self.tokenizer, [*self.head, *self.messages[start:], question, *calls], self.tools)
            if len(tokens) + max_new_tokens <= self.context:
                return NextPrompt(tokens, start - self.first)
        raise ConfigError(
            f"the message has {len(tokens)} tokens with what the template adds, and the context is {self.context}, "
            f"of which an answer takes {max_new_tokens}: shorten it"
        )

    def add(self, text: str, answer: str, n_dropped: int, calls: Sequence[Message] = ()) -> None:
        """Store a turn: the user's message, calls of tools with their results, and the model's answer.

        n_dropped: as in the prompts of that turn.
        """
        self.first += n_dropped
        self.messages += [{"role": "user", "content": text}, *calls, {"role": "assistant", "content": answer}]
