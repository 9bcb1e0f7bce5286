import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from genai_pl.config.generation import GenerationConfig
from genai_pl.config.model import ModelConfig
from genai_pl.errors import ConfigError
from genai_pl.generation import Acceptance, complete, generate, process
from genai_pl.generation.output_constraints import OutputConstraints
from genai_pl.generation.speculative import DraftModel, PromptLookup, TargetModel, speculate
from genai_pl.models import Decoder, KVCache
from tests.conftest import some

ROTARY = {"position": "rotary", "norm": "rmsnorm", "gated_mlp": True, "bias": False, "n_kv_head": 1}
PROMPT = [5, 6, 7, 5, 6]


def near(model: Decoder, build, amount: float, **options: object) -> Decoder:
    """A draft that is often right: the model with noise on its weights."""
    draft = build(**options)
    draft.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter += amount * torch.randn(parameter.shape, generator=generator)
    return draft


def drafted(model: Decoder, draft: Decoder, config: GenerationConfig, n_prompt: int) -> DraftModel:
    sizes = {"n_tokens": n_prompt + config.max_new_tokens, "vocab_size": model.config.vocab_size}
    return DraftModel(draft, config, **sizes)


def generated(target: TargetModel, proposer, seed: int = 0, **options: object) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [int(token) for token in speculate(target, proposer, generator=generator, **options)]


@pytest.mark.parametrize("options", [{}, ROTARY, {"position": "alibi"}, {"window": 4}])
@pytest.mark.parametrize("draft_tokens", [1, 4, 9])
@pytest.mark.parametrize("noise", some([0.02, 0.0, 5.0]))
def test_greedy_tokens_with_a_draft_are_those_without(small_model, options, draft_tokens, noise):
    model = small_model(**options)
    config = GenerationConfig(max_new_tokens=40, temperature=0, draft_tokens=draft_tokens, repetition_penalty=1.1)
    counts = Acceptance()
    draft = near(model, small_model, noise, **options)
    tokens = generated(TargetModel(model, PROMPT, config), drafted(model, draft, config, 5), acceptance=counts)
    assert tokens == generate(model, torch.tensor([PROMPT]), config)[0, 5:].tolist()
    assert counts.generated == 40
    assert counts.forward_passes + counts.accepted == 40
    if noise == 0.02:
        assert 0 < counts.accepted < counts.proposed


@pytest.mark.parametrize("prompt_lookup", [1, 3])
def test_greedy_tokens_with_prompt_lookup_are_those_without(small_model, prompt_lookup):
    model = small_model(vocab_size=12)
    config, counts = GenerationConfig(max_new_tokens=50, temperature=0), Acceptance()
    tokens = generated(TargetModel(model, PROMPT, config), PromptLookup(prompt_lookup), acceptance=counts)
    assert tokens == generate(model, torch.tensor([PROMPT]), config)[0, 5:].tolist()
    assert 0 < counts.accepted < counts.proposed


@pytest.mark.parametrize("max_seq_len", [6, 16])
def test_past_the_context_length_too(small_model, max_seq_len):
    model = small_model(max_seq_len=max_seq_len)
    config = GenerationConfig(max_new_tokens=50, temperature=0, draft_tokens=4)
    expected = generate(model, torch.tensor([PROMPT]), config)[0, 5:].tolist()
    for proposer in (
        PromptLookup(2),
        drafted(model, near(model, small_model, 0.02, max_seq_len=max_seq_len), config, 5),
    ):
        target = TargetModel(model, PROMPT, config)
        assert generated(target, proposer) == expected
        assert generated(target, proposer) == expected  # the prompt is no more in the cache


def test_what_the_text_held_before_is_proposed():
    lookup = PromptLookup(3)
    assert lookup.propose([1, 2, 3, 4, 9, 2, 3, 5, 6, 2, 3], 2, None) == ([5, 6], None)  # the latest place
    assert lookup.propose([1, 2, 3, 4, 2, 3, 7, 8, 1, 2, 3], 3, None) == ([4, 2, 3], None)  # the longest likeness
    assert lookup.propose([1, 2, 3], 3, None) == ([], None)


class Markov(nn.Module):
    """Stub of a Decoder without cost: the last token alone determines the logits."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(table)  # (V, V) logits
        self.config = SimpleNamespace(vocab_size=len(table), max_seq_len=100)

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        sizes = ModelConfig(n_layer=1, n_head=1, n_embd=1)
        return KVCache(sizes, batch_size, max_length, device=torch.device("cpu"), dtype=torch.float32)

    def features(self, input_ids: Tensor, segment_ids: Tensor | None, *, cache: KVCache) -> Tensor:
        cache.advance(input_ids.shape[1])
        return self.embed(input_ids)

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


def exact(table: Tensor, last: int, config: GenerationConfig, n: int) -> Tensor:
    """The probability of each continuation of n tokens, (V ** n,), from processed probabilities (V, V)."""
    steps = process(table, config).softmax(-1)
    probabilities = steps[last]
    for _ in range(n - 1):
        probabilities = (probabilities[..., None] * steps).reshape(-1, len(table))
    return probabilities.flatten()


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 3}])
@pytest.mark.parametrize("kind", ["near_draft", "far_draft", "prompt_lookup"])
def test_samples_have_the_probabilities_of_the_model(chance_of_a_worse_fit, kind, options):
    V, n, generator = 4, 3, torch.Generator().manual_seed(0)
    table, noise = torch.randn(2, V, V, generator=generator)
    config, counts = GenerationConfig(max_new_tokens=n, draft_tokens=2, **options), Acceptance()
    draft = Markov(table + noise * (0.3 if kind == "near_draft" else 3.0))
    target = TargetModel(Markov(table), [1, 2, 3, 1, 2], config)
    proposer = PromptLookup(2) if kind == "prompt_lookup" else drafted(target.state.model, draft, config, 5)
    codes = []
    for _ in range(1500):
        tokens = [int(t) for t in speculate(target, proposer, generator=generator, acceptance=counts)]
        codes.append(sum(t * V ** (n - 1 - i) for i, t in enumerate(tokens)))
    assert chance_of_a_worse_fit(torch.tensor(codes), exact(table, 2, config, n)) > 1e-3
    assert 0.02 < counts.accepted / counts.proposed < 0.98


def test_rules_hold_for_tokens_that_are_proposed(small_model):
    model = small_model(vocab_size=12)
    config = GenerationConfig(max_new_tokens=20, temperature=0, no_repeat_ngram_size=2)
    constraints = OutputConstraints(bad_words=((3,), (5, 6)), prefix=(8, 9))
    expected = generate(model, torch.tensor([PROMPT]), config, constraints=constraints)[0, 5:].tolist()
    assert generated(TargetModel(model, PROMPT, config, constraints), PromptLookup(1)) == expected


def test_the_caller_may_finish_in_the_middle_of_accepted_tokens(small_model):
    model, config = small_model(), GenerationConfig(max_new_tokens=20, temperature=0)
    finished, tokens = torch.zeros(1, dtype=torch.bool), []
    for token in speculate(TargetModel(model, PROMPT, config), drafted(model, model, config, 5), finished=finished):
        tokens.append(int(token))
        finished[0] = len(tokens) == 3
    assert tokens == generate(model, torch.tensor([PROMPT]), config)[0, 5:8].tolist()


@pytest.mark.parametrize("options", [{"prompt_lookup": 2}, {"draft": "small"}])
def test_texts_stops_and_log_probabilities_are_those_without(small_model, byte_tokenizer, options):
    model, rows = small_model(vocab_size=128), [list(b"abcabc"), list(b"x")]
    common = {"max_new_tokens": 30, "temperature": 0, "repetition_penalty": 1.5}
    stop = complete(model, byte_tokenizer, rows, GenerationConfig(**common))[0][0].text[9:11]
    shown: dict[int, str] = {}

    def show(n: int, delta: str) -> None:
        shown[n] = shown.get(n, "") + delta

    arguments = {"num_samples": 2, "logprobs": True}
    config = GenerationConfig(**common, stop=[stop], **options)
    completions = complete(model, byte_tokenizer, rows, config, draft=model, on_text=show, **arguments)
    plain = complete(model, byte_tokenizer, rows, GenerationConfig(**common, stop=[stop]), **arguments)
    for ours, theirs in zip(itertools.chain(*completions), itertools.chain(*plain), strict=True):
        assert (ours.text, ours.tokens) == (theirs.text, theirs.tokens)
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
    assert shown == {n: completion.text for n, completion in enumerate(itertools.chain(*completions))}
    assert 0 < len(completions[0][0].tokens) < 30


def test_a_draft_that_nobody_loaded_is_named(small_model, byte_tokenizer):
    with pytest.raises(ConfigError, match=r"generation\.draft=small"):
        complete(small_model(), byte_tokenizer, [[1]], GenerationConfig(draft="small"))


def test_a_draft_of_another_vocabulary_size_proposes_what_the_model_knows(small_model):
    model, config = small_model(), GenerationConfig(max_new_tokens=20, draft_tokens=3)
    for size in (290, 310):
        target = TargetModel(model, PROMPT, config)
        tokens = generated(target, drafted(model, small_model(vocab_size=size), config, 5))
        assert len(tokens) == 20
        assert max(tokens) < 300
