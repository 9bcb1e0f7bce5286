"""Turns between answers: the tokens that a chat template puts between one answer of the model and the next.

While a policy acts in an environment, its context only grows: what it generated stays as it was generated, token for
token, and each observation is appended. The tokens of an observation are found by rendering the conversation with a
placeholder for the answer, and taking what follows it, up to and including the next generation prompt. So the tokens
that are learned are those that were sampled, and no answer is ever tokenized again.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from genai_pl.data.assistant_spans import PROBE_QUESTION
from genai_pl.data.chat_template import ChatTemplate, Messages, Tools
from genai_pl.data.prompt_tokens import encode_prompt
from genai_pl.data.token_boundaries import encode_continuations
from genai_pl.data.tool_calls import CallReader
from genai_pl.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAID = "An answer."  # in place of what the model said
Message = dict[str, object]


class Turns:
    """The tokens of prompts and observations of one tokenizer; texts need no chat template.

    reader: finds calls in answers; None as long as no messages came.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer, self.reader = tokenizer, None

    @property
    def template(self) -> ChatTemplate:
        """The chat template; DataError where the tokenizer has none."""
        return self.calls.template

    @property
    def calls(self) -> CallReader:
        """The reader of calls, made when it is first needed."""
        if self.reader is None:
            self.reader = CallReader(self.tokenizer)
        return self.reader

    def prompt(self, messages: Messages | str, tools: Tools = ()) -> list[int]:
        """The tokens of the first prompt."""
        template = None if isinstance(messages, str) else self.template
        return encode_prompt(self.tokenizer, messages, tools, template).tolist()

    def observation(
        self, before: Messages, calls: Sequence[tuple[str, str]], after: Messages | str, tools: Tools = ()
    ) -> tuple[list[int], Message]:
        """The tokens from the end of an answer to the next generation prompt, and the placeholder of that answer.

        before: messages up to the answer, whose own answers are placeholders. calls: (id, name) of those in the answer.
        after: the observation; a text is its own tokens. DataError where the template cannot show it.
        """
        if isinstance(after, str):
            return encode_continuations(self.tokenizer, [after])[0], {}
        # templates that take one call a turn get the first, and those that print none the answer alone
        for answer in [placeholder(some) for some in dict.fromkeys([tuple(calls), tuple(calls[:1]), ()])]:
            try:
                text = self._following_text([*before, answer], after, tools)
                return encode_continuations(self.tokenizer, [text])[0], answer
            except DataError as error:
                refusal = error
        raise refusal

    def _following_text(self, messages: Sequence[Message], after: Messages, tools: Tools) -> str:
        """The text after the last of the messages, an answer, up to and including the next generation prompt."""
        whole = [*messages, *after]
        rendering = self.template.render_with_spans(whole, len(messages) - 1, tools)
        start, end = rendering.spans[0]
        # a model stops at the special token that closes its turn, before the spaces that follow it in training
        said = rendering.text[start:end].rstrip()
        end = start + len(said) if self._closing(said) else end
        asked = self.template.render(whole, tools, add_generation_prompt=True)
        if asked[:end] != rendering.text[:end]:
            raise DataError("messages: the chat template renders an answer otherwise when it asks for the next")
        return asked[end:]

    def end_tokens(self, tools: Tools) -> set[int]:
        """The special tokens that close an answer, with calls and without; where calls have one of their own (gpt-oss)."""
        ends = set()
        for answer in (placeholder(), placeholder([("abcdefghi", tool["function"]["name"]) for tool in tools[:1]])):
            try:
                rendering = self.template.render_with_spans([PROBE_QUESTION, answer], tools=tools)
            except DataError:
                continue
            closing = self._closing(rendering.text[slice(*rendering.spans[-1])].rstrip())
            ends |= {self.tokenizer.convert_tokens_to_ids(token) for token in closing}
        return ends

    def _closing(self, text: str) -> list[str]:
        """The special token that ends a text, as a list of one or none."""
        return [match[0] for match in self.template.special.finditer(text) if match.end() == len(text)]


def placeholder(calls: Sequence[tuple[str, str]] = ()) -> Message:
    """An answer of the assistant, with calls of tools by (id, name) if it has any."""
    arguments = {"words": SAID}
    functions = [{"id": i, "type": "function", "function": {"name": name, "arguments": arguments}} for i, name in calls]
    return {"role": "assistant", "content": "" if calls else SAID, **({"tool_calls": functions} if calls else {})}
