"""Plans of long rows and of looped pipelines against formulas written out by hand."""

import pytest
import torch

from genai_pl.kernels.mask import EVERYTHING
from genai_pl.models import Decoder, ModelConfig, n_parameters
from genai_pl.peft import lora
from genai_pl.planning.cost_model import Layout, Share, memory, traffic
from genai_pl.planning.count import activation_bytes, fake_tensors, keep_exact, quantized_weights, stage_sizes
from tests.small_models import GPT, LLAMA

PLAIN = {"product": None, "every": None, "kind": "full", "fused": False}


def test_a_device_that_computes_some_tokens_of_a_row_keeps_the_keys_and_values_of_all() -> None:
    # all but gathered keys and values is of T / n tokens; in float32: 2 K D numbers of 4 bytes for a token and layer
    B, T, n, kv, C = 2, 64, 4, 2 * 2 * 16 * 4, 64
    config = ModelConfig(**{**LLAMA, "n_layer": 2, "max_seq_len": T})
    with fake_tensors(torch.float32):
        alone, divided = (
            sum(activation_bytes(Decoder(config), rows=B, seq_len=T, **PLAIN | {"fused": True}, context=context))
            for context in (1, n)
        )
    gathered, gradients = 2 * B * T * kv * (1 - 1 / n), 2 * B * T * kv
    joined = 2 * B * T / n * C * 4  # of the two chunks of queries
    assert divided == pytest.approx(alone / n + gathered + gradients + joined, rel=0.01)


def test_keys_and_values_travel_once_each_way_and_weights_are_sharded_over_devices_that_divide_rows() -> None:
    # a ring of n sends (n - 1) / n of what it gathers or scatters; forward again where a block is recomputed
    share = Share(weights=1000, trained=1000, largest=1, compute_bytes=2)
    sizes = {"tokens": 512, "n_layer": 3, "n_embd": 64, "passes": 5, "kv_width": 2 * 2 * 16}
    layout = Layout(data=2, context=4, zero=3)
    for recomputed, times in ((0.0, 2), (1.0, 3)):
        *weights, keys = traffic(share, layout, **sizes, recomputed=recomputed)
        assert keys.n_bytes == 5 * 3 * times * 3 / 4 * (4 * 512) * (2 * 2 * 16) * 2
        assert [sent.group for sent in (*weights, keys)] == [8, 8, 4]
    assert (layout.devices, layout.shards) == (8, 8)
    assert memory(share, layout, activations=0, loss=0).optimizer == 1000 * 8 / 8


def test_fsdp_gathers_matrices_of_blocks_in_the_dtype_of_products_and_keeps_the_rest_exact() -> None:
    with fake_tensors(torch.bfloat16):
        model = Decoder(ModelConfig(**LLAMA))
        keep_exact(model)
        kinds = {name: p.dtype for name, p in model.named_parameters()}
        hidden = model.blocks[0](model.embed(torch.zeros(1, 4, dtype=torch.long)), EVERYTHING)
    rounded = {name for name, dtype in kinds.items() if dtype == torch.bfloat16}
    assert rounded == {name for name in kinds if name.startswith("blocks.") and "norm" not in name}
    assert hidden.dtype == torch.float32


def test_interleaved_stages_wait_less_and_hold_more_micro_batches() -> None:
    # Narayanan et al. 2021, 2.2: the wait is divided by the stages of a device; Qi et al. 2024, table 1: F + B - W of F + B + W
    eager, looped = (Layout(stages=4, micro_batches=8, loops=loops) for loops in (1, 2))
    split = Layout(stages=4, micro_batches=8, loops=2, zero_bubble=True)
    assert (eager.idle, looped.idle, split.idle) == (3 / 8, 3 / 16, pytest.approx(3 / 48))
    # passes before the first backward pass of device 0: 2 (p - 1) + (v - 1) p, and one more, of half the layers each
    assert [eager.in_flight(rank) for rank in range(4)] == [4, 3, 2, 1]
    assert [looped.in_flight(rank) for rank in range(4)] == [5.5, 4.5, 3.5, 2.5]
    model = Decoder(ModelConfig(**{**GPT, "n_layer": 8, "tie_embeddings": False}))
    block, (first, *_, last) = n_parameters(model.blocks[0]), stage_sizes(model, 2, 2)
    assert first[0] == 4 * block + n_parameters(model.embed) + n_parameters(model.position)
    assert last[0] == 4 * block + n_parameters(model.norm) + n_parameters(model.lm_head)


def test_codes_are_planned_in_place_of_weights_and_sent_in_place_of_them() -> None:
    # 0.5625 bytes a weight; the codes of two blocks are there at once, and one matrix in float32
    with fake_tensors(torch.float32):
        model = lora(
            Decoder(ModelConfig(**{**LLAMA, "intermediate_size": 192})),
            quantize="nf4",
            target_modules=["q_proj"],
            rank=4,
        )
        codes = quantized_weights(model)
        assert activation_bytes(model, rows=1, seq_len=8, **PLAIN).kept > 0  # the layers run without memory
    block = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 192 * 64
    assert codes == (3 * block, block, 36 / 64, 192 * 64)
    n = n_parameters(model)
    share, layout = Share(weights=n, trained=0, largest=block + 128, **codes._asdict()), Layout(data=4, zero=3)
    held = memory(share, layout, activations=0, loss=0)
    assert held.weights == pytest.approx(((n - 3 * block) * 4 + 3 * block * 36 / 64) / 4)
    assert held.gathered == 3 * 128 * 4 + 2 * block * 36 / 64
    assert held.dequantized == 4 * 192 * 64
    sent, _ = traffic(share, layout, tokens=8, n_layer=3, n_embd=64, passes=1, recomputed=0.0)
    assert sent.n_bytes == pytest.approx(2 * 3 / 4 * ((n - 3 * block) * 4 + 3 * block * 36 / 64))


def test_copies_of_a_sharded_model_divide_states_among_fewer_devices_and_sum_gradients_between_them() -> None:
    # HSDP (PyTorch FSDP, Zhao et al. 2023, section 3.2.2): F devices shard, N / F copies all-reduce 1 / F of the gradients
    share, layout = Share(weights=1000, trained=1000, largest=1), Layout(data=8, copies=2, zero=3, per_node=4)
    assert (layout.devices, layout.shards) == (8, 4)
    held = memory(share, layout, activations=0, loss=0)
    assert (held.weights, held.gradients, held.optimizer) == (4000 / 4, 4000 / 4, 8000 / 4)
    sizes = {"tokens": 8, "n_layer": 1, "n_embd": 8, "passes": 3, "recomputed": 0.0}
    gathered, scattered, between = traffic(share, layout, **sizes)
    assert (gathered.n_bytes, gathered.group, gathered.across_nodes) == (3 * 2 * 3 / 4 * 4000, 4, False)
    assert (scattered.n_bytes, scattered.group, scattered.across_nodes) == (3 * 3 / 4 * 4000, 4, False)
    assert (between.n_bytes, between.group, between.across_nodes) == (3 * 2 * 1 / 2 * 1000, 2, True)


def test_a_block_that_runs_again_is_there_for_one_micro_batch_of_a_pipeline() -> None:
    # 1F1B: the first of 4 stages keeps what 4 of 8 micro-batches leave, and one block of one of them
    layout, share = Layout(stages=4, micro_batches=8), Share(weights=0, trained=0, largest=0)
    sizes = {"activations": 800.0, "recomputed": 160.0, "loss": 0.0}
    assert [memory(share, layout, **sizes, stage=stage).activations for stage in (0, 3)] == [420, 120]
    assert memory(share, Layout(), **sizes).activations == 960
