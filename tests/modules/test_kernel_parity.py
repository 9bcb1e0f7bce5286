"""Kernels do not change training: the losses are the same whichever of them computes."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton")

from genai_pl.models import ModelConfig, build_model
from genai_pl.modules import CausalLMModule, MaskedLMModule, PermutationModule, SpanCorruptionModule, TokenModule
from genai_pl.objectives import SpecialTokens

STEPS, T, V = 20, 32, 50
SPECIAL = np.arange(V) >= 40
VOCABULARY = SpecialTokens(
    size=V, pad=40, end=41, mask=42, sentinels=tuple(range(43, 50)), special=SPECIAL, n_bytes=np.ones(V, np.int64)
)
SIZES = {"n_layer": 1, "n_head": 2, "n_embd": 32, "vocab_size": V, "max_seq_len": T}
BERT = {**SIZES, "shape": "encoder", "position": "rotary", "head": "transform"}
T5 = {**SIZES, "shape": "encoder_decoder", "position": "relative", "attention_scale": 1.0, "norm": "rmsnorm"}
XLNET = {**SIZES, "shape": "encoder", "position": "xl", "norm_order": "post"}
CASES = {
    "clm": (CausalLMModule, {**SIZES, "n_kv_head": 1, "position": "rotary"}),
    "mlm": (MaskedLMModule, BERT),
    "span_corruption": (SpanCorruptionModule, T5),
    "permutation": (PermutationModule, XLNET),
}


def rows() -> Iterator[list[dict]]:
    """Packed rows in which every token is a random step above the one before."""
    generator = np.random.default_rng(0)
    for step in range(STEPS):
        tokens = generator.integers(1, 4, (2, T + 1)).cumsum(-1) % 40
        segments = ([1] * 10 + [2] * 22, [1] * 5 + [2] * 20 + [3] * 7)
        yield [
            {"input_ids": x[:T], "segment_ids": np.array(s), "key": (step, n)}
            for n, (x, s) in enumerate(zip(tokens, segments, strict=True))
        ]


def losses(kind: type[TokenModule], config: dict, backend: str) -> list[float]:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(replace(ModelConfig(**config), attention=backend))
    module = kind(model, vocabulary=VOCABULARY, seed=0, optimizer=None, schedule=None).to(device).train()
    # where a gradient is nothing but rounding, as that of a key's bias, a small eps would make it a step
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
    actual = []
    for batch in map(module.collator, rows()):
        loss = module.step({name: x.to(device) for name, x in batch.items()})["loss"] / batch["targets"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        actual.append(loss.item())
    return actual


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_training_with_triton_follows_the_losses_of_sdpa(case: str) -> None:
    expected = losses(*CASES[case], "sdpa")
    assert sum(expected[-5:]) < sum(expected[:5])
    assert losses(*CASES[case], "triton") == pytest.approx(expected, rel=1e-4)
