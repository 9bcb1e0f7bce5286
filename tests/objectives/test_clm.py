"""The causal language modelling loss against transformers' own."""

import pytest
import torch
import torch.nn.functional as F

from genai_pl.models import Decoder, ModelConfig
from genai_pl.objectives import CausalLMCollator, causal_lm_loss


def test_the_loss_is_transformers_loss_on_the_same_rows() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from genai_pl.models import load_pretrained

    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=60, n_positions=32)).eval()
    ids = torch.randint(0, 60, (3, 13))
    with torch.no_grad():
        expected = theirs(ids, labels=ids).loss.item()
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = load_pretrained(Path(folder))
    rows = [{"input_ids": row.numpy(), "segment_ids": torch.ones(13).numpy()} for row in ids]
    batch = CausalLMCollator()(rows)
    loss = causal_lm_loss(ours.features(batch["input_ids"]), ours.lm_head.weight, batch["labels"])
    assert loss.item() / batch["targets"].item() == pytest.approx(expected, rel=1e-5)


def test_label_smoothing_is_torchs_and_z_loss_is_the_squared_log_partition() -> None:
    torch.manual_seed(0)
    model = Decoder(ModelConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=60, max_seq_len=32))
    ids, labels = torch.randint(0, 60, (2, 9)), torch.randint(0, 60, (2, 9))
    hidden = model.features(ids)
    logits = model.logits(hidden).flatten(0, 1)
    expected = F.cross_entropy(logits, labels.flatten(), label_smoothing=0.2, reduction="sum")
    expected = expected + 0.01 * logits.logsumexp(-1).square().sum()
    loss = causal_lm_loss(hidden, model.lm_head.weight, labels, label_smoothing=0.2, z_loss=0.01)
    torch.testing.assert_close(loss, expected)
