"""Generative tasks: prompts that a model continues, in batches, and a scorer of its completions."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from genai_pl.config.generation import GenerationConfig
from genai_pl.config.tasks import GenerationTaskOptions
from genai_pl.errors import ConfigError
from genai_pl.evaluation.generative.rows import GenerativeRow, default_stop
from genai_pl.evaluation.generative.scorers import Scorer, metric_names, summarize
from genai_pl.evaluation.metrics import Metrics
from genai_pl.generation import Completion, complete, encode_prompt
from genai_pl.models import Model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Keep = Callable[[dict[str, object]], object]  # receives a row for each completion


class GenerativeTask(NamedTuple):
    """Tokenized prompts with their rows, and how completions are made and scored.

    prompts: ids. cut: prompts that were cut. decoding: settings. samples, ks, seed: completions of a prompt, the k of
    pass@k, and the seed that they are drawn by.
    """

    rows: list[GenerativeRow]
    prompts: list[list[int]]
    cut: int
    decoding: GenerationConfig
    samples: int
    ks: tuple[int, ...]
    seed: int
    scorer: Scorer

    @property
    def counts(self) -> dict[str, int]:
        """Rows of the data, tokens of prompts, and prompts that were cut."""
        return {"rows": len(self.rows), "tokens": sum(map(len, self.prompts)), "cut": self.cut}

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of its metrics."""
        return (*metric_names(self.scorer, self.ks), "unfinished")


def build_generative_task(
    rows: Sequence[GenerativeRow],
    tokenizer: "PreTrainedTokenizerBase",
    options: GenerationTaskOptions,
    scorer: Scorer,
    *,
    seq_len: int,
) -> GenerativeTask:
    """The task of these rows; prompts that leave no room for a completion in seq_len tokens are cut on the left."""
    room = seq_len - options.longest(seq_len)
    if room < 1:
        raise ConfigError(
            f"data.max_new_tokens={options.max_new_tokens}: the model's context of {seq_len} tokens leaves no room "
            f"for a prompt; lower it below {seq_len}"
        )
    if options.chat and tokenizer.chat_template is None:
        raise ConfigError("data.chat=true: the tokenizer has no chat template; leave it out")
    prompts = [encode_prompt(tokenizer, shown_prompt(row, chat=options.chat)) for row in rows]
    chats = options.chat or not isinstance(rows[0].prompt, str)
    decoding = options.decoding(default_stop(list(rows), chat=chats, extracts=options.extract is not None), seq_len)
    return GenerativeTask(
        list(rows),
        [prompt[-room:] for prompt in prompts],
        sum(len(prompt) > room for prompt in prompts),
        decoding,
        options.samples,
        tuple(dict.fromkeys(options.k)),
        options.seed,
        scorer,
    )


def shown_prompt(row: GenerativeRow, *, chat: bool) -> str | list[dict]:
    """What the model reads of a row: a question in the form of choices, or with `chat` as a message of the user.

    Spaces at the end of a text belong to its completion, as in `completion_windows`: tokens begin with them.
    """
    if not isinstance(row.prompt, str):
        return row.prompt
    if chat:
        return [{"role": "user", "content": row.prompt}]
    return f"Question: {row.prompt}\nAnswer:" if row.is_question else row.start.rstrip(" \t")


def measure_generative(
    task: GenerativeTask,
    model: Model,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    batch_tokens: int,
    on_batch: Callable[[int], object] | None = None,
    keep: Keep | None = None,
) -> Metrics:
    """Metrics of the model's completions; `unfinished` is the share of those that max_new_tokens cut off.

    on_batch: told how many more prompts are continued, then how many more completions are scored. keep: receives each
    completion with its prompt, number and note.
    """
    found = write_completions(task, model, tokenizer, batch_tokens=batch_tokens, on_batch=on_batch)
    texts = [[completion.text for completion in of_row] for of_row in found]
    scored = task.scorer(task.rows, texts, on_batch)
    if keep is not None:
        for n, (row, of_row) in enumerate(zip(task.rows, texts, strict=True), start=1):
            for text, value, note in zip(of_row, scored.values[n - 1], scored.notes[n - 1], strict=True):
                keep({"row": n, "prompt": row.prompt, "completion": text, task.scorer.name: value, "note": note})
    flat = [completion for of_row in found for completion in of_row]
    unfinished = sum(completion_is_cut(completion, task, model) for completion in flat) / len(flat)
    return {**summarize(scored, task.scorer, task.ks), "unfinished": unfinished}


def completion_is_cut(completion: Completion, task: GenerativeTask, model: Model) -> bool:
    """Whether a completion has as many tokens as it may, and the last one does not end it."""
    full = len(completion.tokens) >= task.decoding.max_new_tokens
    return full and completion.tokens[-1] not in model.config.eos_token_ids


def write_completions(
    task: GenerativeTask,
    model: Model,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    batch_tokens: int,
    on_batch: Callable[[int], object] | None = None,
) -> list[list[Completion]]:
    """Completions of every prompt, in the order of the rows.

    Prompts of like lengths share a batch of about batch_tokens tokens, completions included. Numbers come from a
    generator of the task alone: the random state of a training is untouched, and a second measurement draws the same.
    """
    order = sorted(range(len(task.prompts)), key=lambda n: len(task.prompts[n]))
    found: list[list[Completion]] = [[] for _ in order]
    generator = torch.Generator(next(model.parameters()).device).manual_seed(task.seed)
    while order:
        # as many prompts as fit, or one with as many of its samples as fit
        longest = len(task.prompts[order[-1]]) + task.decoding.max_new_tokens
        size = max(1, batch_tokens // (longest * task.samples))
        batch, order = order[-size:], order[:-size]
        per_pass = task.samples if size > 1 else min(task.samples, max(1, batch_tokens // longest))
        for start in range(0, task.samples, per_pass):
            n_samples = min(per_pass, task.samples - start)
            prompts = [task.prompts[n] for n in batch]
            written = complete(model, tokenizer, prompts, task.decoding, generator=generator, num_samples=n_samples)
            for n, of_prompt in zip(batch, written, strict=True):
                found[n] += of_prompt
        if on_batch is not None:
            on_batch(len(batch))
    return found
