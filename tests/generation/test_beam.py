import itertools
import math

import pytest
import torch
from torch import Tensor

from genai_pl.config.generation import GenerationConfig
from genai_pl.errors import ConfigError
from genai_pl.generation import OutputConstraints, beam_search, complete, generate_text, left_pad
from genai_pl.generation.beam import Hypothesis
from genai_pl.models import Decoder, load_wrapped

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [3, 4], [12, 13, 14, 15]]
ROTARY = {"position": "rotary", "norm": "rmsnorm", "gated_mlp": True, "bias": False, "n_kv_head": 1}


def beams(n: int, k: int, **options: object) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=n, temperature=0, num_beams=k, num_return=k, **options)


def assert_equal_theirs(hypotheses: list[list[Hypothesis]], theirs: object, n_prompt: int) -> None:
    """Tokens and scores are equal; transformers pads a sequence after its end."""
    flat = [hypothesis for of_prompt in hypotheses for hypothesis in of_prompt]
    rows = theirs.sequences[:, n_prompt:].tolist()
    assert [h.tokens for h in flat] == [row[: len(h.tokens)] for h, row in zip(flat, rows, strict=True)]
    longest = max(len(h.tokens) for h in flat)
    assert {len(row) for row in rows} == {longest}
    assert [h.score for h in flat] == pytest.approx(theirs.sequences_scores.tolist(), rel=1e-4)


@pytest.mark.parametrize("ends", [(), (7,), (50, 7, 11)], ids=["no_end", "one_end", "three_ends"])
@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -1.0])
def test_beams_of_unequal_prompts_equal_transformers(pair, early_stopping, length_penalty, ends):
    theirs, ours = pair
    input_ids, segment_ids = left_pad(PROMPTS, 0)
    options = {"length_penalty": length_penalty, "early_stopping": early_stopping}
    expected = theirs.generate(
        input_ids, attention_mask=segment_ids, max_new_tokens=12, do_sample=False, pad_token_id=0, num_beams=3,
        num_return_sequences=3, eos_token_id=list(ends) or None, return_dict_in_generate=True, output_scores=True,
        **options,
    )  # fmt: skip
    constraints = OutputConstraints(ends=frozenset(ends))
    hypotheses = beam_search(ours, input_ids, beams(12, 3, **options), segment_ids=segment_ids, constraints=constraints)
    assert_equal_theirs(hypotheses, expected, 7)


def test_beams_with_penalties_and_exclusions_equal_transformers(pair):
    theirs, ours = pair
    input_ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    words = [[28], [9, 10], [50, 50, 3]]
    options = {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 5}
    expected = theirs.generate(
        input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=15, do_sample=False, pad_token_id=0,
        eos_token_id=50, num_beams=4, num_return_sequences=4, bad_words_ids=words, return_dict_in_generate=True,
        output_scores=True, **options,
    )  # fmt: skip
    constraints = OutputConstraints(ends=frozenset({50}), bad_words=tuple(map(tuple, words)))
    assert_equal_theirs(beam_search(ours, input_ids, beams(15, 4, **options), constraints=constraints), expected, 4)


def log_probability(model: Decoder, prompt: list[int], tokens: list[int]) -> float:
    logits = model(torch.tensor([[*prompt, *tokens]]))[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None]).sum().item()


@pytest.mark.parametrize("options", [{}, ROTARY])
def test_with_enough_beams_the_search_is_exhaustive(small_model, options):
    model, prompt = small_model(vocab_size=6, **options), [1, 2]
    everything = itertools.product(range(6), repeat=3)
    best = max(everything, key=lambda tokens: log_probability(model, prompt, list(tokens)))
    hypothesis = beam_search(model, torch.tensor([prompt]), beams(3, 36))[0][0]
    assert hypothesis.tokens == list(best)
    assert hypothesis.score == pytest.approx(log_probability(model, prompt, list(best)) / 3, rel=1e-5)


def test_log_probabilities_are_those_of_the_model_without_penalties(small_model):
    model, prompt = small_model(), [1, 2, 3]
    config = beams(6, 3, repetition_penalty=1.5)
    for hypothesis in beam_search(model, torch.tensor([prompt]), config)[0]:
        assert sum(hypothesis.logprobs) == pytest.approx(log_probability(model, prompt, hypothesis.tokens), rel=1e-4)
        assert sum(hypothesis.logprobs) / 6 != pytest.approx(hypothesis.score, rel=1e-3)


def diverse_beams(model: Decoder, prompt: list[int], n: int, k: int, groups: int, penalty: float) -> list[list[int]]:
    """Algorithm 1 of Vijayakumar et al. 2018 with Hamming diversity, on lists, without a cache."""
    size = k // groups
    state: list[list[tuple[list[int], float]]] = [[([], 0.0)] for _ in range(groups)]
    for _ in range(n):
        taken: list[int] = []
        for g in range(groups):
            options = []
            for tokens, total in state[g]:
                logprobs = model(torch.tensor([prompt + tokens]))[0, -1].log_softmax(-1).tolist()
                options += [([*tokens, t], total + p) for t, p in enumerate(logprobs)]
            options.sort(key=lambda option: -(option[1] - penalty * taken.count(option[0][-1])))
            state[g] = options[:size]
            taken += [tokens[-1] for tokens, _ in state[g]]
    every = sorted((beam for group in state for beam in group), key=lambda beam: -beam[1])
    return [tokens for tokens, _ in every]


@pytest.mark.parametrize(("k", "groups", "penalty"), [(4, 2, 1.5), (6, 3, 0.7), (4, 4, 10.0)])
def test_diverse_groups_choose_as_the_paper_says(small_model, k, groups, penalty):
    model = small_model(vocab_size=30)
    config = beams(5, k, num_beam_groups=groups, diversity_penalty=penalty)
    prompts = [[5, 6, 7], [3, 4, 9]]
    hypotheses = beam_search(model, torch.tensor(prompts), config)
    for prompt, of_prompt in zip(prompts, hypotheses, strict=True):
        assert [h.tokens for h in of_prompt] == diverse_beams(model, prompt, 5, k, groups, penalty)


def test_groups_with_a_great_penalty_begin_with_unlike_tokens(small_model):
    config = beams(4, 4, num_beam_groups=4, diversity_penalty=1e4)
    [hypotheses] = beam_search(small_model(), torch.tensor([[1, 2, 3]]), config)
    assert len({h.tokens[0] for h in hypotheses}) == 4


def test_prompts_of_one_batch_do_not_disturb_each_other(small_model):
    model, config = small_model(), beams(10, 3)
    input_ids, segment_ids = left_pad(PROMPTS, 0)
    together = beam_search(model, input_ids, config, segment_ids=segment_ids)
    for prompt, hypotheses in zip(PROMPTS, together, strict=True):
        [alone] = beam_search(model, torch.tensor([prompt]), config)
        assert [h.tokens for h in alone] == [h.tokens for h in hypotheses]


def without_cache(model: Decoder, prompt: list[int], n: int, k: int) -> list[list[int]]:
    """Beam search without end tokens and without a cache; a full context continues from its last half."""

    def steps(tokens: list[int]) -> Tensor:
        context, length = list(prompt), model.config.max_seq_len
        for token in [*tokens, None]:
            context = context if len(context) <= length else context[-(length // 2) :]
            if token is None:
                return model(torch.tensor([context]))[0, -1].log_softmax(-1)
            context.append(token)
        raise AssertionError

    state: list[tuple[list[int], float]] = [([], 0.0)]
    for _ in range(n):
        options = [([*tokens, t], total + p) for tokens, total in state for t, p in enumerate(steps(tokens).tolist())]
        state = sorted(options, key=lambda option: -option[1])[:k]
    return [tokens for tokens, _ in state]


def test_past_the_context_length_beams_go_on_from_the_last_half(small_model):
    model = small_model(max_seq_len=8, vocab_size=40)
    [hypotheses] = beam_search(model, torch.tensor([[1, 2, 3, 4, 5]]), beams(12, 3))
    assert [h.tokens for h in hypotheses] == without_cache(model, [1, 2, 3, 4, 5], 12, 3)


def test_texts_of_beams_end_before_stop_strings(small_model, byte_tokenizer):
    model, config = small_model(vocab_size=128), beams(12, 4)
    longest = complete(model, byte_tokenizer, [[104, 105]], config)[0]
    text = next(c.text for c in longest if len(c.text) >= 4)
    stop = text[2:4]
    completions = complete(model, byte_tokenizer, [[104, 105]], beams(12, 4, stop=[stop], early_stopping="never"))[0]
    assert all(stop not in c.text for c in completions)
    finished = [c for c in completions if len(c.tokens) < 12]
    assert finished
    for completion in finished:
        decoded = byte_tokenizer.decode(completion.tokens)
        assert decoded.endswith(stop)
        assert completion.text == decoded[: -len(stop)]
    totals = [sum(c.logprobs) / len(c.tokens) for c in completions]
    assert totals == pytest.approx([c.score for c in completions], rel=1e-4)


def test_the_best_beams_are_returned_and_shown(small_model, byte_tokenizer):
    shown: dict[int, str] = {}
    config = GenerationConfig(max_new_tokens=8, temperature=0, num_beams=4, num_return=2)
    texts = generate_text(
        small_model(vocab_size=128),
        byte_tokenizer,
        ["ab", "c"],
        config,
        on_text=lambda n, piece: shown.update({n: piece}),
    )
    assert [len(of_prompt) for of_prompt in texts] == [2, 2]
    assert shown == dict(enumerate(text for of_prompt in texts for text in of_prompt))


def test_one_beam_is_greedy(small_model, byte_tokenizer):
    model = small_model()
    [[wide]] = beam_search(model, torch.tensor([[1, 2, 3]]), beams(10, 1))
    greedy = complete(model, byte_tokenizer, [[1, 2, 3]], GenerationConfig(max_new_tokens=10, temperature=0))[0][0]
    assert wide.tokens == greedy.tokens
    assert math.isclose(wide.score, sum(wide.logprobs) / 10, rel_tol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, "temperature=0"),
        ({"num_beams": 2, "num_return": 3, "temperature": 0}, "num_return=3"),
        ({"num_beams": 4, "num_beam_groups": 3, "temperature": 0}, "multiple of generation.num_beam_groups"),
        ({"early_stopping": "sometimes"}, "early_stopping=sometimes"),
        ({"num_beams": 2, "temperature": 0, "prompt_lookup": 2}, "prompt_lookup"),
    ],
)
def test_options_that_do_not_fit_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        GenerationConfig(**options)


def test_a_model_that_transformers_runs_searches_and_speculates_too(pair, tmp_path, byte_tokenizer):
    theirs, _ = pair
    theirs.save_pretrained(tmp_path)
    model = load_wrapped(str(tmp_path))
    input_ids, segment_ids = left_pad(PROMPTS, 0)
    expected = theirs.generate(
        input_ids, attention_mask=segment_ids, max_new_tokens=12, do_sample=False, pad_token_id=0, num_beams=3,
        eos_token_id=None, num_return_sequences=3, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    assert_equal_theirs(beam_search(model, input_ids, beams(12, 3), segment_ids=segment_ids), expected, 7)
    greedy = {"max_new_tokens": 20, "temperature": 0}
    [[plain, again]] = complete(model, byte_tokenizer, [[5, 6, 5]], GenerationConfig(**greedy), num_samples=2)
    [[fast]] = complete(model, byte_tokenizer, [[5, 6, 5]], GenerationConfig(**greedy, prompt_lookup=2))
    assert plain == again == fast
