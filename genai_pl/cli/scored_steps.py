"""Scored steps: what generate.py prints of a process reward model."""

from collections.abc import Sequence

from genai_pl.data.steps import split_steps
from genai_pl.evaluation.steps import step_scores, step_separator
from genai_pl.loading import Loaded
from genai_pl.models.virtual_tokens import context_of


def scored_steps(loaded: Loaded, prompts: Sequence[str], query: str | None) -> list[dict[str, object]] | None:
    """For each prompt, the steps of an answer to query, with the probability that each is correct; None for another model."""
    if (separator := step_separator(loaded.model)) is None:
        return None
    steps = [[step for step, _ in split_steps(prompt, separator)] for prompt in prompts]
    options = {"separator": separator, "max_length": context_of(loaded.model)}
    found = step_scores(loaded.model, loaded.tokenizer, [query or ""] * len(prompts), steps, **options)
    asked = {} if query is None else {"query": query}
    rows = zip(prompts, steps, found, strict=True)
    return [{**asked, "prompt": prompt, "steps": own, "scores": scores} for prompt, own, scores in rows]
