import pytest
import torch
import transformers
from torch import Tensor

from genai_pl.config.generation import GenerationConfig
from genai_pl.generation import draw_token, process, sample
from genai_pl.generation.processors import (
    count_penalty,
    logit_bias,
    min_p,
    repetition_penalty,
    temperature,
    top_k,
    top_p,
)

BIAS = {3: 2.5, 7: -100.0, 49: 1.0}
NO_IDS = torch.zeros(1, 0, dtype=torch.long)


@pytest.fixture
def logits() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(5, 50, generator=generator)


@pytest.mark.parametrize("value", [0.1, 0.7, 1.0, 5.0])
def test_temperature_equals_transformers(logits, value):
    torch.testing.assert_close(
        temperature(logits, value), transformers.TemperatureLogitsWarper(value)(NO_IDS, logits), rtol=0, atol=0
    )


@pytest.mark.parametrize("k", [1, 7, 50, 1000])
def test_top_k_equals_transformers(logits, k):
    logits[:, 3] = logits[:, 4]  # ties
    assert torch.equal(top_k(logits, k), transformers.TopKLogitsWarper(k)(NO_IDS, logits))


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9, 0.999])
def test_top_p_equals_transformers(logits, p):
    assert torch.equal(top_p(logits, p), transformers.TopPLogitsWarper(p)(NO_IDS, logits))


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 1.0])
def test_min_p_equals_transformers(logits, p):
    assert torch.equal(min_p(logits, p), transformers.MinPLogitsWarper(p)(NO_IDS, logits))


@pytest.mark.parametrize("penalty", [0.5, 1.3, 10.0])
def test_repetition_penalty_equals_transformers(logits, penalty):
    ids = torch.randint(0, 50, (5, 12), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(5, 50, dtype=torch.bool).scatter(1, ids, True)
    theirs = transformers.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
    assert torch.equal(repetition_penalty(logits, seen, penalty), theirs)


def test_logit_bias_equals_transformers(logits):
    theirs = transformers.SequenceBiasLogitsProcessor([[[token], value] for token, value in BIAS.items()])
    assert torch.equal(logit_bias(logits, {**BIAS, 50: 9.0}), theirs(NO_IDS.expand(5, 0), logits))


def test_processors_run_in_the_order_of_transformers(logits):
    ids = torch.randint(0, 50, (5, 12), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(5, 50, dtype=torch.bool).scatter(1, ids, True)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=50))
    options = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3}
    biased = [[[token], value] for token, value in BIAS.items()]
    theirs, _ = model._prepare_generation_config(None, do_sample=True, sequence_bias=biased, **options)
    expected = model._get_logits_processor(theirs, input_ids_seq_length=12, device="cpu")(ids, logits)
    ours = process(logits, GenerationConfig(**options, logit_bias=BIAS), seen=seen)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    assert 1 < ours[0].isfinite().sum() < 20


def test_temperature_zero_and_top_k_one_are_the_argmax(logits):
    for config in (GenerationConfig(temperature=0), GenerationConfig(top_k=1), GenerationConfig(top_p=1e-9)):
        assert torch.equal(sample(logits, config), logits.argmax(-1))


def test_greedy_decoding_is_penalized_too():
    logits = torch.tensor([[2.0, 1.5, -1.0]])
    seen = torch.tensor([[True, False, False]])
    assert sample(logits, GenerationConfig(temperature=0, repetition_penalty=2.0), seen=seen) == 1


def test_low_precision_logits_are_processed_in_float32():
    assert process(torch.randn(2, 10).bfloat16(), GenerationConfig(top_p=0.9)).dtype == torch.float32


def test_samples_have_the_frequencies_of_the_processed_probabilities():
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3))
    options = {"temperature": 0.8, "top_k": 9, "top_p": 0.95}
    scores = transformers.TemperatureLogitsWarper(0.8)(NO_IDS, logits[None])
    scores = transformers.TopPLogitsWarper(0.95)(NO_IDS, transformers.TopKLogitsWarper(9)(NO_IDS, scores))
    expected = scores.softmax(-1)[0].double()
    n = 20_000
    tokens = sample(logits.expand(n, -1), GenerationConfig(**options), torch.Generator().manual_seed(0))
    counts = tokens.bincount(minlength=12).double()
    possible = expected > 0
    assert 3 < possible.sum() < 10
    assert counts[~possible].sum() == 0
    statistic = ((counts - n * expected)[possible] ** 2 / (n * expected[possible])).sum()
    freedom = torch.tensor((possible.sum().item() - 1) / 2, dtype=torch.float64)
    assert torch.special.gammaincc(freedom, statistic / 2) > 1e-3  # the chance of a worse fit


def test_draws_from_a_wide_vocabulary_have_its_probabilities():
    probabilities = torch.rand(2, 20_000, generator=torch.Generator().manual_seed(0)).pow(8)
    probabilities[:, 12:] = 0.0  # a filter left twelve
    probabilities[1, :5] = 0.0
    generator, n = torch.Generator().manual_seed(0), 4000
    tokens = torch.stack([draw_token(probabilities, generator) for _ in range(n)])  # (n, 2)
    for row, expected in zip(tokens.T, probabilities[:, :12].double(), strict=True):
        expected = expected / expected.sum()
        counts, possible = row.bincount(minlength=12).double(), expected > 1e-3
        assert counts[expected == 0].sum() == 0
        statistic = ((counts - n * expected)[possible] ** 2 / (n * expected[possible])).sum()
        assert torch.special.gammaincc((possible.sum() - 1) / 2, statistic.float() / 2) > 1e-3
    same = draw_token(probabilities, torch.Generator().manual_seed(7))
    assert torch.equal(same, draw_token(probabilities, torch.Generator().manual_seed(7)))


def test_rounding_of_the_logits_hardly_changes_a_draw() -> None:
    n, generator = 1000, torch.Generator().manual_seed(0)
    logits = 2.4 * torch.randn(1, 49_152, generator=generator)
    moved = logits + 1e-5 * torch.randn(1, 49_152, generator=generator)  # float32's error after a few layers
    pairs = zip(*(draws(each.softmax(-1), n) for each in (logits, moved)), strict=True)
    assert sum(one != other for one, other in pairs) <= 1  # one number for all borders: 10 of 1,000


def draws(probabilities: Tensor, n: int) -> list[int]:
    """A token by each of the seeds 0 to n - 1."""
    return [int(draw_token(probabilities, torch.Generator().manual_seed(seed))) for seed in range(n)]


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_nothing_to_draw_from_is_an_error(value):
    with pytest.raises(RuntimeError, match="NaN"):
        draw_token(torch.full((1, 20_000), value))


def test_a_temperature_too_low_to_divide_by_takes_the_likeliest_token():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert sample(logits, GenerationConfig(temperature=1e-40)).tolist() == [1]


def test_count_penalties_follow_their_formula() -> None:
    # mu[j] -> mu[j] - c[j] * frequency - float(c[j] > 0) * presence, OpenAI's API reference
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.5]], dtype=torch.float64)
    counts = torch.tensor([[0.0, 1.0, 3.0, 0.0]], dtype=torch.float64)
    expected = torch.tensor([[0.3, -1.0 - 0.7 - 0.2, 2.0 - 3 * 0.7 - 0.2, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(count_penalty(logits, counts, 0.2, 0.7), expected)


def test_a_large_presence_penalty_repeats_no_token(small_model) -> None:
    from genai_pl.generation import generate

    model = small_model()
    prompt = torch.tensor([[1, 2, 3], [3, 2, 1]])
    plain = generate(model, prompt, GenerationConfig(max_new_tokens=12, temperature=0))[:, 3:]
    config = GenerationConfig(max_new_tokens=12, temperature=0, presence_penalty=1e4)
    assert any(len(set(row)) < 12 for row in plain.tolist())  # without it some are repeated
    assert all(len(set(row)) == 12 for row in generate(model, prompt, config)[:, 3:].tolist())
