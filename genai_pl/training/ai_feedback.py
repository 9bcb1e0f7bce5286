"""AI feedback: a model compares two answers, or criticizes and revises one, in place of people.

RLAIF (Lee et al. 2023) asks a judge which of two answers is better and reads the probabilities of " A" and " B", in
both orders, because judges prefer a position. Constitutional AI (Bai et al. 2022) lets a model criticize its answer
by a written principle and revise it; first and last answer are a preference pair, the last one a demonstration. The
judge is a local model, a reward model, or an endpoint of OpenAI's chat completions.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from genai_pl.config.generation import GenerationConfig
from genai_pl.data.prompt_tokens import Messages
from genai_pl.endpoints import Endpoint
from genai_pl.errors import ConfigError
from genai_pl.generation import encode_prompt, generate_text
from genai_pl.kernels import linear_logprobs
from genai_pl.loading import Loaded, load
from genai_pl.models.virtual_tokens import context_of
from genai_pl.training.rewards import Judge

COMPARISON = """Which answer to the request is better? {rubric}

Request: {prompt}

Answer A: {first}

Answer B: {second}

The better answer is Answer"""
CRITIQUE = "Request: {prompt}\n\nAnswer: {answer}\n\n{critique}\n\nCritique:"
REVISION = "Request: {prompt}\n\nAnswer: {answer}\n\nCritique: {criticism}\n\n{revision}\n\nRevised answer:"


class Writer(Protocol):
    """Interface of a model that answers prompts and compares continuations.

    concurrent: True if several threads may call it at once. answer: text of one completion. preference: a
    log-probability for each option as the continuation of the prompt; only differences matter.
    """

    concurrent: bool

    def answer(self, prompt: str | Messages) -> str: ...
    def preference(self, prompt: str, options: Sequence[str]) -> list[float]: ...


def as_text(value: str | Messages) -> str:
    r"""A prompt or answer as text for a judge: a lone message of the user or assistant is its content, a conversation is one
    `role: content` line per message, with a line for each call of a tool.

    >>> as_text([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
    'user: Hi\nassistant: Hello'
    >>> as_text([{"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}])
    'assistant calls add({"a": 1})'
    """
    if isinstance(value, str):
        return value
    if len(value) == 1 and value[0]["role"] in ("user", "assistant") and not value[0].get("tool_calls"):
        return value[0].get("content") or ""
    return "\n".join(line for message in value for line in _lines_of(message))


def _lines_of(message: Mapping[str, object]) -> list[str]:
    """What a message says, and the calls in it."""
    said = [f"{message['role']}: {message['content']}"] if message.get("content") else []
    calls = [call.get("function", call) for call in message.get("tool_calls") or ()]
    written = [(call["name"], json.dumps(call.get("arguments"), ensure_ascii=False)) for call in calls]
    return said + [f"{message['role']} calls {name}({arguments})" for name, arguments in written]


def compare(
    judge: Writer, prompt: str | Messages, first: str | Messages, second: str | Messages, *, rubric: str
) -> dict[str, object]:
    """Row of a preference data set: the better and the worse answer, by a judge that read them in both orders.

    margin: difference of the two probabilities, 0 to 1. position_bias: how far the first place alone raised a
    probability above one half.
    """
    forward = _probability_of_a(judge, prompt, first, second, rubric)
    backward = _probability_of_a(judge, prompt, second, first, rubric)
    wins = (forward + 1 - backward) / 2  # of the first answer
    chosen, rejected = (first, second) if wins >= 0.5 else (second, first)
    return {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "margin": abs(2 * wins - 1),
        "position_bias": (forward + backward) / 2 - 0.5,
    }


def _probability_of_a(
    judge: Writer, prompt: str | Messages, first: str | Messages, second: str | Messages, rubric: str
) -> float:
    """Probability that the judge names the answer shown first, of the two letters alone (softmax over " A" and "
    B").
    """
    question = COMPARISON.format(rubric=rubric, prompt=as_text(prompt), first=as_text(first), second=as_text(second))
    a, b = judge.preference(question, [" A", " B"])
    top = max(a, b)
    a, b = math.exp(a - top), math.exp(b - top)
    return a / (a + b)


def critique(writer: Writer, prompt: str | Messages, principles: Sequence[Mapping[str, str]]) -> dict[str, object]:
    """Row of a data set: an answer, criticized and revised by each principle in turn, and the record of it.

    principles: mappings with the instructions "critique" and "revision".
    """
    first = answer = writer.answer(prompt).strip()
    record = []
    for principle in principles:
        request = CRITIQUE.format(prompt=as_text(prompt), answer=answer, critique=principle["critique"])
        criticism = writer.answer(request).strip()
        revision_request = REVISION.format(
            prompt=as_text(prompt), answer=answer, criticism=criticism, revision=principle["revision"]
        )
        answer = writer.answer(revision_request).strip()
        record.append({"critique": criticism, "revision": answer})
    return {"prompt": prompt, "completion": answer, "chosen": answer, "rejected": first, "record": record}


def preference_for(judge: Writer | Judge, prompt: str | Messages, first: str, second: str, *, rubric: str) -> float:
    """Probability that the first of two answers is the better one, by a judge that reads them in both orders."""
    if isinstance(judge, Judge):
        a, b = judge([prompt, prompt], [first, second])
        return (1 + math.tanh((a - b) / 2)) / 2  # the logistic function
    forward = _probability_of_a(judge, prompt, first, second, rubric)
    return (forward + 1 - _probability_of_a(judge, prompt, second, first, rubric)) / 2


def compare_scores(
    judge: Judge, prompt: str | Messages, first: str | Messages, second: str | Messages, tools: object = None
) -> dict[str, object]:
    """Row of a preference data set, by a reward model, which reads each answer alone and so has no position bias.

    tools: cell of the data's column. margin: difference of the probabilities of the Bradley-Terry model, tanh of half the
    score difference (Bradley and Terry 1952).
    """
    a, b = judge([prompt, prompt], [first, second], None if tools is None else [tools, tools])
    chosen, rejected = (first, second) if a >= b else (second, first)
    margin = math.tanh(abs(a - b) / 2)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": margin, "position_bias": 0.0}


class _LocalWriter:
    """A model in this process, one prompt at a time.

    loaded: model and tokenizer. device: where it runs. options: fields of GenerationConfig. seed: of its
    sampling.
    """

    concurrent = False

    def __init__(self, loaded: Loaded, *, device: torch.device, options: dict[str, object], seed: int) -> None:
        """Move the model to the device."""
        self.model, self.tokenizer = loaded.model.to(device), loaded.tokenizer
        self.config = GenerationConfig(**options)
        self.generator = torch.Generator(device).manual_seed(seed)

    def answer(self, prompt: str | Messages) -> str:
        """One completion of the prompt."""
        with torch.inference_mode():
            return generate_text(self.model, self.tokenizer, [prompt], self.config, generator=self.generator)[0][0]

    @torch.inference_mode()
    def preference(self, prompt: str, options: Sequence[str]) -> list[float]:
        """Sum of the token log-probabilities of each option after the prompt, read in one forward pass per option."""
        device = self.model.embed.weight.device
        scores = []
        for option in options:
            prompt_ids = encode_prompt(self.tokenizer, prompt)
            option_ids = self.tokenizer(option, add_special_tokens=False)["input_ids"]
            ids = torch.tensor([(prompt_ids + option_ids)[-context_of(self.model) :]], device=device)
            # (1, T, C) -> the states that predict the option's tokens
            hidden = self.model.to_head(self.model.features(ids[:, :-1]))[:, -len(option_ids) :]
            head = self.model.lm_head
            token_logprobs = linear_logprobs(hidden, head.weight, ids[:, -len(option_ids) :], bias=head.bias)
            scores.append(float(token_logprobs.sum()))
        return scores


@dataclass
class _EndpointWriter:
    """An endpoint of OpenAI's chat completions. model: its name there."""

    endpoint: Endpoint
    model: str
    concurrent: bool = True

    def answer(self, prompt: str | Messages) -> str:
        """One completion of the prompt, at most 512 tokens."""
        return self._ask(prompt, max_tokens=512)

    def preference(self, prompt: str, options: Sequence[str]) -> list[float]:
        """0 for the option that the reply begins with, -10 for others: chat completions return no probability of a
        given text.
        """
        reply = self._ask(f"{prompt}: reply with one letter.", max_tokens=4).strip().upper()
        return [0.0 if reply.startswith(option.strip()) else -10.0 for option in options]

    def _ask(self, prompt: str | Messages, *, max_tokens: int) -> str:
        """Text of a reply; ConfigError when the last attempt fails."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        answer = self.endpoint.ask(
            "chat/completions", {"model": self.model, "messages": messages, "max_tokens": max_tokens}
        )
        try:
            return answer["choices"][0]["message"]["content"] or ""
        except (KeyError, IndexError, TypeError):
            raise self.endpoint.error("its answer is no chat completion") from None


def local_writer(
    name: str, *, option: str, device: torch.device, options: dict[str, object], seed: int
) -> Writer | Judge:
    """The model of a name; for option "judge" a reward model becomes a Judge. ConfigError names the option."""
    loaded = load(name, option=option)
    is_reward_model = loaded.model.config.is_reward
    if is_reward_model and option == "judge":
        return Judge(loaded, device)
    if is_reward_model:
        raise ConfigError(
            f"{option}={name}: a reward model, which writes no answers; give it as judge=, and here a language model"
        )
    if not loaded.model.config.writes:
        raise ConfigError(f"{option}={name}: it writes no text; name a language model")
    return _LocalWriter(loaded, device=device, options=options, seed=seed)


def remote_writer(url: str, *, model: str, key_variable: str, retries: int, option: str = "judge") -> Writer:
    """An endpoint whose key is read from an environment variable, so that no command line or run folder holds it."""
    return _EndpointWriter(Endpoint(url, option, os.environ.get(key_variable, ""), retries=retries), model)
