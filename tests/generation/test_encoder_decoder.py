"""Encoder-decoders decode in the loop of decoders: T5 as in transformers, the Transformer of 2017 as without a cache."""

import pytest
import torch
from torch import Tensor

from genai_pl.config.generation import GenerationConfig
from genai_pl.config.model import ModelConfig
from genai_pl.errors import ConfigError
from genai_pl.generation import OutputConstraints, beam_search, complete, decode, generate, left_pad
from genai_pl.models import EncoderDecoder

SOURCES = [[5, 6, 7, 8, 9, 1], [3, 4, 1], [12, 13, 14, 15, 1]]
VANILLA = {"position": "sinusoidal", "norm_order": "post", "activation": "relu", "scale_embeddings": True}


def greedy(n: int, **options: object) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=n, temperature=0, **options)


def starts(n: int = 3) -> Tensor:
    return torch.zeros(n, 1, dtype=torch.long)


def read(model: EncoderDecoder, sources: list[list[int]] = SOURCES):
    with torch.no_grad():
        return model.encode_source(*left_pad(sources, 0))


def their_tokens(model, **options: object):
    input_ids, segment_ids = left_pad(SOURCES, 0)
    return model.generate(input_ids, attention_mask=segment_ids, max_new_tokens=15, do_sample=False, **options)


@pytest.fixture
def vanilla() -> EncoderDecoder:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 300, "max_seq_len": 64, "init_std": 0.3}
    return EncoderDecoder(ModelConfig(shape="encoder_decoder", **sizes, **VANILLA)).eval()


def vanilla_logits(model: EncoderDecoder, source: list[int], written: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([source]), decoder_input_ids=torch.tensor([[0, *written]]))[0, -1]


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}])
def test_greedy_tokens_of_t5_equal_transformers(t5_pair, options):
    theirs, ours = t5_pair
    expected = their_tokens(theirs, **options)
    tokens = generate(read(ours), starts(), greedy(15, **options), eos_token_id=1)
    assert torch.equal(tokens, expected)
    assert tokens.unique().numel() > 5


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [1.0, 0.6])
def test_beams_of_t5_equal_transformers(t5_pair, early_stopping, length_penalty):
    theirs, ours = t5_pair
    options = {"num_beams": 3, "early_stopping": early_stopping, "length_penalty": length_penalty}
    outputs = {"num_return_sequences": 3, "return_dict_in_generate": True, "output_scores": True}
    expected = their_tokens(theirs, **options, **outputs)
    config = greedy(15, **options, num_return=3)
    hypotheses = [
        h
        for row in beam_search(read(ours), starts(), config, constraints=OutputConstraints(ends=frozenset({1})))
        for h in row
    ]
    rows = expected.sequences[:, 1:].tolist()
    assert [h.tokens for h in hypotheses] == [row[: len(h.tokens)] for h, row in zip(hypotheses, rows, strict=True)]
    assert [h.score for h in hypotheses] == pytest.approx(expected.sequences_scores.tolist(), rel=1e-4)


def test_samples_of_t5_share_one_reading_and_have_its_probabilities(t5_pair, chance_of_a_worse_fit):
    theirs, ours = t5_pair
    input_ids, segment_ids = left_pad(SOURCES[:2], 0)
    with torch.no_grad():
        expected = theirs(input_ids, attention_mask=segment_ids, decoder_input_ids=starts(2)).logits[:, 0].softmax(-1)
    n = 4000
    generator = torch.Generator().manual_seed(0)
    model = read(ours, SOURCES[:2])
    steps = decode(model, starts(2), GenerationConfig(max_new_tokens=2), generator=generator, num_samples=n)
    first = next(steps).view(2, n)
    assert next(steps).shape == (2 * n,)
    for row, probabilities in zip(first, expected, strict=True):
        assert chance_of_a_worse_fit(row, probabilities) > 1e-3


def test_greedy_tokens_of_the_transformer_of_2017_are_those_without_a_cache(vanilla):
    tokens = generate(read(vanilla), starts(), greedy(12))[:, 1:].tolist()
    for source, row in zip(SOURCES, tokens, strict=True):
        written: list[int] = []
        for _ in range(12):
            written.append(int(vanilla_logits(vanilla, source, written).argmax()))
        assert row == written


def test_beams_of_the_transformer_of_2017_are_those_without_a_cache(vanilla):
    hypotheses = beam_search(read(vanilla), starts(), greedy(6, num_beams=3, num_return=3))
    for source, of_source in zip(SOURCES, hypotheses, strict=True):
        state: list[tuple[list[int], float]] = [([], 0.0)]
        for _ in range(6):
            options = []
            for written, total in state:
                logprobs = vanilla_logits(vanilla, source, written).log_softmax(-1).tolist()
                options += [([*written, t], total + p) for t, p in enumerate(logprobs)]
            state = sorted(options, key=lambda option: -option[1])[:3]
        assert [h.tokens for h in of_source] == [written for written, _ in state]


def test_text_goes_in_and_text_comes_out(vanilla, byte_tokenizer):
    rows = [list(b"ab"), list(b"longer one")]
    completions = complete(vanilla, byte_tokenizer, rows, greedy(8), num_samples=2)
    for row, (first, second) in zip(rows, completions, strict=True):
        written: list[int] = []
        for _ in range(len(first.tokens)):
            written.append(int(vanilla_logits(vanilla, [*row, 256], written).argmax()))
        assert first.tokens == second.tokens == written


def test_an_encoder_decoder_speculates_not(vanilla, byte_tokenizer):
    with pytest.raises(ConfigError, match="need a decoder"):
        complete(vanilla, byte_tokenizer, [[1]], greedy(4, prompt_lookup=2))
