"""Training follows the same losses whichever kernels compute it."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need triton")

from genai_pl.models import Decoder, ModelConfig
from genai_pl.objectives import CausalLMCollator, causal_lm_loss

STEPS, T, VOCAB = 20, 32, 50
CONFIG = ModelConfig(n_layer=1, n_head=2, n_kv_head=1, n_embd=32, vocab_size=VOCAB, max_seq_len=T, position="rotary")
SEGMENTS = ([1] * 10 + [2] * 23, [1] * 5 + [2] * 20 + [0] * 8)


def batches() -> Iterator[dict[str, Tensor]]:
    """Packed rows in which every token is a random step above the one before."""
    generator = np.random.default_rng(0)
    for _ in range(STEPS):
        steps = generator.integers(1, 4, (2, T + 1))
        tokens = steps.cumsum(-1) % VOCAB
        rows = zip(tokens, SEGMENTS, strict=True)
        yield CausalLMCollator()([{"input_ids": x, "segment_ids": np.array(s)} for x, s in rows])


def losses(backend: str) -> list[float]:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Decoder(replace(CONFIG, attention=backend)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = []
    for batch in batches():
        batch = {name: x.to(device) for name, x in batch.items()}
        hidden = model.features(batch["input_ids"], batch["segment_ids"])
        loss = causal_lm_loss(hidden, model.lm_head.weight, batch["labels"]) / batch["targets"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_training_with_triton_follows_the_losses_of_sdpa() -> None:
    expected = losses("sdpa")
    assert expected[-1] < expected[0] / 1.2
    assert losses("triton") == pytest.approx(expected, rel=1e-4)
