"""Scored steps: what generate.py prints of a process reward model."""

from collections.abc import Iterator, Sequence

from genai_pl.data.stepwise import split_steps
from genai_pl.evaluation.steps import step_scores
from genai_pl.loading import Loaded
from genai_pl.models.virtual_tokens import n_virtual


def scored_steps(
    loaded: Loaded, prompts: Sequence[str], query: str | None, separator: str
) -> Iterator[dict[str, object]]:
    """For each prompt, the steps of an answer to query, with the probability that each is correct."""
    steps = [[step for step, _ in split_steps(prompt, separator)] for prompt in prompts]
    options = {"separator": separator, "max_length": loaded.model.config.max_seq_len - n_virtual(loaded.model)}
    found = step_scores(loaded.model, loaded.tokenizer, [query or ""] * len(prompts), steps, **options)
    for prompt, own, scores in zip(prompts, steps, found, strict=True):
        yield ({} if query is None else {"query": query}) | {"prompt": prompt, "steps": own, "scores": scores}
