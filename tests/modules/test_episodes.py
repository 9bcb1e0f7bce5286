"""Rollouts of episodes: only sampled tokens are learned, as they were sampled, with rewards at the ends of turns."""

import numpy as np
import pytest
import torch

from genai_pl.config.generation import GenerationConfig
from genai_pl.config.model import ModelConfig
from genai_pl.data import byte_tokenizer
from genai_pl.data.turns import Turns
from genai_pl.environments import Environment, Observation
from genai_pl.environments.episode import Rules
from genai_pl.environments.guess_number import GuessNumber
from genai_pl.errors import ConfigError
from genai_pl.models import Decoder
from genai_pl.modules.episodes import play_episodes
from genai_pl.modules.preference import token_logprobs
from genai_pl.modules.rollout import Rollout, gather_tokens
from genai_pl.objectives import IGNORED
from genai_pl.objectives.ppo import gae, kl_rewards
from tests.small_models import LLAMA

TOKENIZER = byte_tokenizer()
ROWS = [{"prompt": "Guess: ", "number": 3}, {"prompt": "Which number is it? ", "number": 7}]
SIZES = {**LLAMA, "n_layer": 1, "n_embd": 32, "vocab_size": len(TOKENIZER), "max_seq_len": 96}


class Echo(Environment):
    """Says back how long the completion was, for a number of turns that depends on the row."""

    def step(self, completion: str) -> Observation:
        self.turn = getattr(self, "turn", 0) + 1
        return Observation(f"|{'x' * self.turn}|", reward=float(self.turn), done=self.turn == self.n)

    def reset(self, row: dict) -> str:
        self.n = row["number"] // 2
        return row["prompt"]


def model(**changes: object) -> Decoder:
    torch.manual_seed(0)
    return Decoder(ModelConfig(**{**SIZES, **changes})).eval()


def play(policy: Decoder, *, make: type = Echo, copies: int = 3, share: bool = False, **rules: int) -> Rollout:
    limits = {"max_turns": 4, "max_new_tokens": 5, "context": 96, "tool_timeout": 1.0, **rules}
    return play_episodes(
        policy, ROWS, make, Rules("objective.environment=x", Turns(TOKENIZER), **limits), GenerationConfig(max_new_tokens=5),
        copies=copies, share_prompts=share, generator=torch.Generator().manual_seed(1), ends=[TOKENIZER.eos_token_id],
        pad=0, decode=lambda ids: TOKENIZER.decode(ids, skip_special_tokens=True),
    )[0]  # fmt: skip


@pytest.mark.parametrize("share", [False, True])
def test_only_sampled_tokens_have_labels_and_each_is_the_one_that_was_sampled(share: bool) -> None:
    rollout = play(model(), share=share)
    labels, n = rollout.batch["labels"], len(rollout.completions)
    # the tokens of an episode without its observations, which are known by heart
    for i, tokens in enumerate(rollout.completions):
        turns = ROWS[i // 3]["number"] // 2
        text = list(tokens)
        for turn in range(1, turns):
            seen = TOKENIZER(f"|{'x' * turn}|")["input_ids"]
            start = next(k for k in range(len(text)) if text[k : k + len(seen)] == seen and k >= 5 * turn)
            del text[start : start + len(seen)]
        at = rollout.token_positions[i][rollout.mask[i]]
        assert labels.reshape(len(labels), -1)[i if not share else i // 3, at].tolist() == text
    assert int((labels != IGNORED).sum()) == int(rollout.mask.sum())
    assert rollout.mask.shape[0] == n == 6


def test_rewards_stand_at_the_last_token_of_each_turn() -> None:
    rollout = play(model())
    for rewards, mask, row in zip(rollout.turn_rewards, rollout.mask, [r for r in ROWS for _ in range(3)], strict=True):
        turns = row["number"] // 2
        assert rewards[rewards != 0].tolist() == [float(turn) for turn in range(1, turns + 1)]
        assert rewards[mask][-1] == turns
        assert rewards.sum() == turns * (turns + 1) / 2
    assert rollout.metrics["turns"].tolist() == [1] * 3 + [3] * 3
    assert rollout.metrics["done"].tolist() == [1] * 6


@pytest.mark.parametrize("share", [False, True])
def test_the_log_probabilities_of_sampled_tokens_are_those_of_their_whole_context(share: bool) -> None:
    policy = model()
    rollout = play(policy, share=share)
    shared = {k: rollout.batch[k] for k in ("shared_prompt_len",) if k in rollout.batch}
    with torch.no_grad():
        hidden = policy.features(rollout.batch["input_ids"], rollout.batch["segment_ids"], **shared)
        found = gather_tokens(token_logprobs(policy, rollout.batch, hidden=hidden), rollout.token_positions)
        for i, tokens in enumerate(rollout.completions):
            prompt = TOKENIZER(ROWS[i // 3]["prompt"])["input_ids"]
            logprobs = policy(torch.tensor([prompt + tokens])).log_softmax(-1)[0, len(prompt) - 1 : -1]
            own = logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            n = int(rollout.mask[i].sum())
            own = own[torch.tensor(sampled_flags(i, tokens))]
            torch.testing.assert_close(found[i, :n], own, atol=1e-5, rtol=0)


def sampled_flags(i: int, tokens: list[int]) -> list[bool]:
    """Which tokens of an episode of Echo were sampled: five a turn, or up to an end token."""
    flags, turn, k = [], 0, 0
    while k < len(tokens):
        turn += 1
        run = tokens[k : k + 5]
        n = run.index(TOKENIZER.eos_token_id) + 1 if TOKENIZER.eos_token_id in run else len(run)
        observation = turn + 2 if turn < ROWS[i // 3]["number"] // 2 else 0
        flags += [True] * n + [False] * observation
        k += n + observation
    return flags


def test_advantages_pass_over_observations_to_the_next_turn() -> None:
    rollout = play(model())
    mask, rewards = rollout.mask, rollout.turn_rewards
    values = torch.zeros(mask.shape)
    given = kl_rewards(rewards.sum(1), torch.zeros(mask.shape), mask, kl_coef=0.1, turn_rewards=rewards)
    assert torch.equal(given, rewards)
    advantages, _ = gae(given, values, mask, gamma=1.0, gae_lambda=1.0)
    # with gamma and lambda 1 and no values: the sum of all rewards to come, by NumPy
    expected = np.cumsum(rewards.numpy()[:, ::-1], axis=1)[:, ::-1] * mask.numpy()
    np.testing.assert_allclose(advantages.numpy(), expected, rtol=1e-6)
    # a penalty for the whole is at the last token
    less = kl_rewards(rewards.sum(1) - 2, torch.zeros(mask.shape), mask, kl_coef=0.1, turn_rewards=rewards)
    assert (less - rewards).sum(1).tolist() == [-2.0] * 6
    assert ((less - rewards)[torch.arange(6), mask.sum(1) - 1] == -2).all()


def test_a_batch_of_episodes_is_the_same_again_and_ends_in_time() -> None:
    first, second = play(model(), max_turns=2), play(model(), max_turns=2)
    assert first.completions == second.completions
    assert first.metrics["turns"].max() == 2
    assert first.metrics["done"].tolist() == [1] * 3 + [0] * 3


def test_a_reset_that_draws_for_itself_is_refused() -> None:
    class Drawn(Echo):
        count = 0

        def reset(self, row: dict) -> str:
            Drawn.count += 1
            return f"{super().reset(row)}{Drawn.count}"

    with pytest.raises(ConfigError, match="reset gave one row two prompts; take `seed`"):
        play(model(), make=Drawn)


def test_a_number_that_is_drawn_is_one_for_all_episodes_of_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers, reset = [], GuessNumber.reset

    def recorded(self: GuessNumber, row: dict, seed: int) -> object:
        prompt = reset(self, row | {"number": None}, seed)
        numbers.append(self.number)
        return prompt

    monkeypatch.setattr(GuessNumber, "reset", recorded)
    play(model(), make=GuessNumber)
    assert len(set(numbers[:3])) == len(set(numbers[3:])) == 1
