"""Rollouts of episodes: a policy acts in an environment for several turns, all episodes of a batch together.

Each turn is one pass of the decoding loop over the episodes that are not over, padded on the left to the longest; then the
environments answer, and what they say is appended to the contexts. The result is a `Rollout` in which only sampled tokens
have labels, so that loss, KL, values and advantages know nothing of observations.
"""

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from genai_pl.config.generation import GenerationConfig
from genai_pl.environments.episode import Episode, Rules
from genai_pl.environments.user_code import run_all
from genai_pl.errors import ConfigError
from genai_pl.generation.prefix_cache import PrefixCache
from genai_pl.modules.rollout import Rollout, sample_completions, training_rows

Decode = Callable[[Sequence[int]], str]


def play_episodes(
    model: nn.Module,
    rows: Sequence[Mapping[str, object]],
    make: Callable[[], object],
    rules: Rules,
    config: GenerationConfig,
    *,
    copies: int,
    share_prompts: bool,
    generator: torch.Generator,
    ends: Collection[int],
    pad: int,
    decode: Decode,
) -> tuple[Rollout, list[list[int]]]:
    """(rollout, first prompts) of `copies` episodes for each row of the data, neighbours, sampled in evaluation mode.

    make: makes an environment. config: how to sample a completion. share_prompts, ends, pad: as of `generate_rollout`.
    decode: tokens to text without special tokens. ConfigError where a reset gives one row two different prompts: their
    episodes could not be compared.
    """
    # one environment for each episode; those of a row get one seed
    episodes = [Episode(make(), rules) for _ in range(len(rows) * copies)]
    seeds = torch.randint(2**31, (len(rows),), generator=generator, device=generator.device).tolist()
    run_all([episode.start(rows[i // copies], seeds[i // copies]) for i, episode in enumerate(episodes)])
    if any(episode.prompt != episodes[i // copies * copies].prompt for i, episode in enumerate(episodes)):
        raise ConfigError(f"{rules.option}: reset gave one row two prompts; take `seed` for what it draws")
    if not episodes[0].is_text:
        ends = {*ends, *rules.turns.end_tokens(episodes[0].tools.schemas)}
    # turns: sample for all that are not over, then let their environments answer
    cache = PrefixCache()  # what an episode has read and said is not read again in its next turn
    options = {"generator": generator, "ends": ends, "pad": pad, "prefix_cache": cache}
    playing, prompts, n = episodes, [episode.prompt for episode in episodes[::copies]], copies
    while playing:
        completions = sample_completions(model, prompts, config, copies=n, **options)
        answered = zip(playing, completions, strict=True)
        run_all([episode.answer(row, *_text(row, ends, decode)) for episode, row in answered])
        going_on = [i for i, episode in enumerate(playing) if not episode.is_over]
        cache.select(going_on)
        playing = [playing[i] for i in going_on]
        prompts, n = [episode.context for episode in playing], 1
    rollout = _rollout(episodes, copies=copies if share_prompts else 1, pad=pad, device=next(model.parameters()).device)
    return rollout, [episode.prompt for episode in episodes]


def _text(row: Sequence[int], ends: Collection[int], decode: Decode) -> tuple[str, bool]:
    """(text of a completion, whether it has an end token)."""
    ended = row[-1] in ends
    return decode(row[:-1] if ended else row), ended


def _rollout(episodes: Sequence[Episode], *, copies: int, pad: int, device: torch.device) -> Rollout:
    """The rollout of finished episodes."""
    continuations = [(episode.tokens, episode.is_sampled) for episode in episodes]
    prompts = [np.asarray(episode.prompt) for episode in episodes]
    batch, token_positions, mask = training_rows(prompts, continuations, copies=copies, pad=pad, device=device)
    # rewards at the last tokens of turns
    rewards = torch.zeros(mask.shape)
    for i, episode in enumerate(episodes):
        for end, reward in zip(episode.turn_ends, episode.rewards, strict=True):
            rewards[i, end - 1] += reward
    ended = torch.tensor([episode.ended for episode in episodes], device=device)
    return Rollout(
        batch,
        token_positions,
        mask,
        [episode.tokens for episode in episodes],
        ended,
        rewards.to(device),
        _metrics(episodes, device),
    )


def _metrics(episodes: Sequence[Episode], device: torch.device) -> dict[str, Tensor]:
    """Numbers of episodes (N,) by name; nan where an episode has none of that name."""
    rows = [episode.metrics() for episode in episodes]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: torch.tensor([row.get(name, float("nan")) for row in rows], device=device) for name in names}
