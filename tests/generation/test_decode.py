import pytest
import torch
import transformers
from torch import Tensor

from genai_pl.config.generation import GenerationConfig
from genai_pl.errors import ConfigError
from genai_pl.generation import decode, generate, left_pad
from genai_pl.models import Decoder

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [3, 4], [12, 13, 14, 15]]
ROTARY = {"position": "rotary", "norm": "rmsnorm", "gated_mlp": True, "bias": False, "n_kv_head": 1}


def greedy(n: int, **options: float) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=n, temperature=0, **options)


def without_cache(model: Decoder, prompt: list[int], n: int) -> list[int]:
    """Greedy tokens by one full forward pass per token; a full context continues from its last half."""
    context, length = list(prompt), model.config.max_seq_len
    tokens = []
    for _ in range(n):
        context = context if len(context) <= length else context[-max(1, length // 2) :]
        tokens.append(model(torch.tensor([context]))[0, -1].argmax().item())
        context.append(tokens[-1])
    return tokens


def their_tokens(model: transformers.PreTrainedModel, eos: int | None = None, **options: float) -> Tensor:
    input_ids, segment_ids = left_pad(PROMPTS, 0)
    return model.generate(
        input_ids, attention_mask=segment_ids, max_new_tokens=30, do_sample=False, pad_token_id=0, eos_token_id=eos,
        **options,
    )  # fmt: skip


def test_greedy_tokens_of_unequal_prompts_equal_transformers(pair):
    theirs, ours = pair
    input_ids, segment_ids = left_pad(PROMPTS, 0)
    tokens = generate(ours, input_ids, greedy(30), segment_ids=segment_ids)
    assert torch.equal(tokens, their_tokens(theirs))
    assert tokens[:, 7:].unique().numel() > 10  # not one token for ever


def test_rows_that_end_with_eos_equal_transformers(pair):
    theirs, ours = pair
    input_ids, segment_ids = left_pad(PROMPTS, 0)
    reference = their_tokens(theirs)[:, 7:].tolist()
    eos = next(token for token in reference[1][5:] if token not in reference[0])
    tokens = generate(ours, input_ids, greedy(30), segment_ids=segment_ids, eos_token_id=eos)
    assert torch.equal(tokens, their_tokens(theirs, eos))
    assert tokens.shape == (3, 37)
    assert (tokens[1] == eos).any()


def test_repetition_penalty_equals_transformers(pair):
    theirs, ours = pair
    input_ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    options = {"do_sample": False, "pad_token_id": 0, "repetition_penalty": 1.8, "max_new_tokens": 30}
    expected = theirs.generate(input_ids, attention_mask=torch.ones_like(input_ids), **options)
    assert torch.equal(generate(ours, input_ids, greedy(30, repetition_penalty=1.8)), expected)


@pytest.mark.parametrize("options", [{}, ROTARY, {"position": "alibi"}, {"position": "sinusoidal"}, {"window": 4}])
def test_the_cache_changes_no_token_of_any_row(small_model, options):
    model = small_model(**options)
    input_ids, segment_ids = left_pad(PROMPTS, 0)
    tokens = generate(model, input_ids, greedy(20), segment_ids=segment_ids)[:, 7:]
    assert tokens.tolist() == [without_cache(model, prompt, 20) for prompt in PROMPTS]


def test_repetition_penalty_ignores_padding(small_model):
    model, config = small_model(), greedy(20, repetition_penalty=3.0)
    input_ids, segment_ids = left_pad(PROMPTS, 17)
    together = generate(model, input_ids, config, segment_ids=segment_ids)[:, 7:]
    for row, prompt in enumerate(PROMPTS):
        alone = generate(model, torch.tensor([prompt]), config)[0, len(prompt) :]
        assert torch.equal(together[row], alone)


@pytest.mark.parametrize("options", [{}, ROTARY])
@pytest.mark.parametrize("prompt_length", [1, 5, 16])
def test_past_the_context_length_decoding_goes_on_from_the_last_half(small_model, options, prompt_length):
    model = small_model(max_seq_len=16, **options)
    prompt = list(range(1, 1 + prompt_length))
    tokens = generate(model, torch.tensor([prompt]), greedy(50))[0, prompt_length:]
    assert tokens.tolist() == without_cache(model, prompt, 50)


def test_past_the_context_length_padding_stays_hidden(small_model):
    model = small_model(max_seq_len=16)
    input_ids, segment_ids = left_pad([list(range(14)), [3]], 0)
    other = input_ids.masked_fill(segment_ids == 0, 99)
    tokens = generate(model, input_ids, greedy(40), segment_ids=segment_ids)
    assert torch.equal(tokens[:, 14:], generate(model, other, greedy(40), segment_ids=segment_ids)[:, 14:])
    assert tokens.shape == (2, 54)


@pytest.mark.parametrize("max_seq_len", [1, 2, 3])
def test_the_shortest_contexts_work(small_model, max_seq_len):
    model = small_model(max_seq_len=max_seq_len)
    assert generate(model, torch.tensor([[7]]), greedy(9))[0, 1:].tolist() == without_cache(model, [7], 9)


def test_max_new_tokens_is_exact(small_model):
    model, prompt = small_model(), torch.tensor([[1, 2, 3]])
    for n in (1, 2, 10):
        assert generate(model, prompt, GenerationConfig(max_new_tokens=n)).shape == (1, 3 + n)


def test_the_seed_decides(small_model):
    model, prompt, config = small_model(), torch.tensor([[1, 2, 3]]), GenerationConfig(max_new_tokens=20)
    first, same, other = (generate(model, prompt, config, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_top_k_one_is_greedy(small_model):
    model, prompt = small_model(), torch.tensor([[1, 2, 3]])
    sampled = generate(model, prompt, GenerationConfig(max_new_tokens=20, top_k=1, temperature=5.0))
    assert torch.equal(sampled, generate(model, prompt, greedy(20)))


def test_eos_ends_one_row_while_the_other_goes_on(scripted):
    model = scripted([1, 9, 5, 5, 5], [1, 2, 3, 4, 9, 5])
    tokens = generate(model, torch.tensor([[0], [0]]), greedy(10), eos_token_id=9, pad_token_id=7)
    assert tokens[:, 1:].tolist() == [[1, 9, 7, 7, 7], [1, 2, 3, 4, 9]]


def test_the_caller_may_finish_rows(scripted):
    finished = torch.zeros(2, dtype=torch.bool)
    steps = []
    for step in decode(
        scripted([1, 2, 3, 4], [5, 6, 7, 8]), torch.tensor([[0], [0]]), greedy(10), pad_token_id=99, finished=finished
    ):
        steps.append(step.tolist())
        finished[0] |= len(steps) == 2
        finished[1] |= len(steps) == 3
    assert steps == [[1, 5], [2, 6], [99, 7]]


def test_training_mode_comes_back_module_by_module_even_from_an_abandoned_iterator(small_model):
    model, prompt = small_model(dropout=0.5).train(), torch.tensor([[1, 2, 3]])
    model.norm.eval()
    steps = decode(model, prompt, greedy(5))
    next(steps)
    assert not any(module.training for module in model.modules())
    assert torch.is_grad_enabled()
    steps.close()
    assert all(module.training is (module is not model.norm) for module in model.modules())
    expected = without_cache(small_model(), [1, 2, 3], 5)
    assert generate(model, prompt, greedy(5))[0, 3:].tolist() == expected  # no dropout


def test_generated_tokens_can_be_trained_on(small_model):
    model = small_model()
    tokens = generate(model, torch.tensor([[1, 2, 3]]), greedy(5))
    model(tokens).sum().backward()
    assert model.embed.weight.grad.isfinite().all()


def test_a_prompt_that_is_too_long_names_both_numbers(small_model):
    with pytest.raises(ConfigError, match=r"65 tokens.* at most 64 .*max_seq_len"):
        generate(small_model(), torch.ones(1, 65, dtype=torch.long), greedy(5))


def test_an_empty_prompt_is_an_error(small_model):
    with pytest.raises(ConfigError, match="empty"):
        generate(small_model(), torch.ones(1, 0, dtype=torch.long), greedy(5))


def test_padding_on_the_right_is_an_error(small_model):
    with pytest.raises(ValueError, match="left"):
        generate(small_model(), torch.ones(1, 2, dtype=torch.long), greedy(5), segment_ids=torch.tensor([[1, 0]]))
