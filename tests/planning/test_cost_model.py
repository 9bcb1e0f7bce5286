"""Costs of a step against published figures, formulas written out by hand, and what autograd really saves."""

import pytest
import torch

from genai_pl.errors import ConfigError
from genai_pl.models import Decoder, ModelConfig, build_model, n_parameters
from genai_pl.optim import adamw, muon, sgd
from genai_pl.peft import lora
from genai_pl.planning.activation_memory import saved_tensor_bytes
from genai_pl.planning.cost_model import Layout, Machine, Share, loss_bytes, memory, states, step_time, traffic
from genai_pl.planning.count import (
    activation_bytes,
    fake_tensors,
    largest_part,
    local_model_config,
    moments,
    stage_sizes,
    training_flops,
)
from genai_pl.strategies import recompute
from tests.conftest import some
from tests.small_models import GPT, LLAMA
from tests.small_models import MODELS as DECODERS

EXPERTS = {**LLAMA, "n_experts": 4, "expert_size": 32, "n_shared_experts": 1}
MODELS = {
    **DECODERS,
    "experts": EXPERTS,
    "t5": {**GPT, "shape": "encoder_decoder", "n_decoder_layer": 2, "position": "relative"},
}
PLAIN = {"product": None, "every": None, "kind": "full", "fused": False}
A100 = Machine("a100", flops=312e12, memory=80e9, link=300e9, network=25e9)


@pytest.mark.parametrize(
    ("zero", "published"),
    [(0, (15, 15, 90)), (1, (15, 15, 1.4)), (2, (15, 0.23, 1.4)), (3, (0.23, 0.23, 1.4))],
)
def test_zero_divides_what_the_paper_says(zero: int, published: tuple[float, ...]):
    # Rajbhandari et al. 2020, figure 1: 7.5B parameters, 64 devices, 2 + 2 + 12 bytes: 120, 31.4, 16.6 and 1.9 GB
    n = 7_500_000_000
    actual = states(n, n, Layout(data=64, zero=zero), weight_bytes=2, gradient_bytes=2, optimizer_bytes=12)
    assert [size / 1e9 for size in actual] == pytest.approx(published, rel=0.03)
    assert sum(actual) / 1e9 == pytest.approx((120, 31.4, 16.6, 1.9)[zero], rel=0.03)


def test_mixed_precision_adam_takes_sixteen_bytes_a_parameter():
    actual = memory(Share(weights=1000, trained=1000, largest=100), Layout(), activations=0, loss=0)
    assert actual.total == 16 * 1000


def test_frozen_weights_have_neither_gradients_nor_states_and_steps_in_backward_keep_one_gradient():
    share = Share(weights=1000, trained=10, largest=100)
    actual = memory(share, Layout(), activations=7, loss=5)
    assert (actual.weights, actual.gradients, actual.optimizer, actual.total) == (4000, 40, 80, 4132)
    share = Share(weights=1000, trained=1000, largest=100, largest_gradient=50)
    assert memory(share, Layout(), activations=0, loss=0).gradients == 200


def test_data_parallelism_sends_twice_the_gradients_and_fsdp_three_times_the_weights():
    # Rajbhandari et al. 2020, section 7: 2 Psi and 3 Psi, for many devices
    share, n = Share(weights=1_000_000, trained=1_000_000, largest=1, weight_bytes=2, compute_bytes=2), 1024
    sizes = {"tokens": 1, "n_layer": 1, "n_embd": 1, "passes": 1, "recomputed": 0.0}
    for zero, times in ((0, 2), (3, 3)):
        sent = traffic(share, Layout(data=n, zero=zero), **sizes)
        assert sum(t.n_bytes for t in sent) == pytest.approx(times * 2e6 * (n - 1) / n)
    kept = traffic(share, Layout(data=n, zero=3, regathers=False), **sizes)
    assert sum(t.n_bytes for t in kept) == pytest.approx(2 * 2e6 * (n - 1) / n)


def test_tensor_parallelism_sums_hidden_states_four_times_a_layer():
    # Shoeybi et al. 2019, section 3: two all-reduces forward and two backward, of (B, T, C), each 2 (n - 1) / n on a ring;
    # and one each for embedding and head
    share = Share(weights=1, trained=1, largest=1, compute_bytes=2)
    sizes = {"tokens": 2048, "n_layer": 24, "n_embd": 1024, "passes": 3}
    (sent,) = traffic(share, Layout(tensor=8), **sizes, recomputed=0.0)
    crossing = (2 * 7 / 8) * 2048 * 1024 * 2
    assert sent.n_bytes == 3 * (24 * 4 + 2) * crossing
    (recomputed,) = traffic(share, Layout(tensor=8), **sizes, recomputed=1.0)
    assert recomputed.n_bytes == 3 * (24 * 6 + 2) * crossing
    # Korthikanti et al. 2022, 4.2.2: a gather and a scatter send what an all-reduce does; here one more of each around all
    (sharded,) = traffic(share, Layout(tensor=8, sequence=True), **sizes, recomputed=0.0)
    assert sharded.n_bytes == sent.n_bytes + 3 * crossing


def test_a_step_waits_for_what_is_slowest():
    share = Share(weights=10**9, trained=10**9, largest=1)
    sizes = {"tokens": 1, "n_layer": 1, "n_embd": 1, "passes": 1, "recomputed": 0.0}
    for per_node, where, seconds in ((8, "computing", 1.0), (4, "over the network", 8e9 * 7 / 8 / 25e9)):
        layout = Layout(data=8, per_node=per_node)
        flops = A100.flops * A100.efficiency * (1.0 if per_node == 8 else 0.01)
        time = step_time(A100, layout, traffic(share, layout, **sizes), flops=flops)
        assert time.step == pytest.approx(seconds)
        assert where in time.bottleneck
    # Narayanan et al. 2021, section 2.2: (p - 1) / m of the work is waited for
    assert step_time(A100, Layout(stages=4, micro_batches=8), [], flops=A100.flops).compute == pytest.approx(
        (1 + 3 / 8) / A100.efficiency
    )


def test_llama_2_7b_takes_the_hours_that_meta_counted():
    # Touvron et al. 2023, table 2: 184,320 hours of an A100 for 2.0T tokens of context 4096
    values = {**LLAMA, "n_layer": 32, "n_head": 32, "n_kv_head": 32, "n_embd": 4096, "intermediate_size": 11008}
    values |= {"vocab_size": 32000, "max_seq_len": 4096}
    with torch.device("meta"):
        model = Decoder(ModelConfig(**values))
    assert n_parameters(model) == 6_738_415_616
    flops = training_flops(model, model.config, 4096, recomputed=0.0)
    matrices = n_parameters(model) - 32000 * 4096
    assert flops == pytest.approx(6 * matrices + 12 * 32 * 4096 * 4096, rel=1e-4)  # 6 N + 12 L C T
    hours = step_time(A100, Layout(), [], flops=flops * 2.0e12).step / 3600
    assert hours == pytest.approx(184_320, rel=0.15)


def test_a_layer_keeps_what_korthikanti_counted():
    # 34 s b h bytes in 16 bits (Korthikanti et al. 2022, section 4.1) without its two dropout masks of one byte each;
    # fused attention keeps no scores, and beside that a float32 log-sum-exp a head and two statistics a norm
    B, T, C, H = 2, 32, 64, 4
    sizes = []
    for n_layer in (1, 2):
        with fake_tensors(torch.bfloat16):
            model = Decoder(ModelConfig(**{**GPT, "n_layer": n_layer}))
            sizes.append(sum(activation_bytes(model, rows=B, seq_len=T, **PLAIN | {"fused": True})))
    assert sizes[1] - sizes[0] == pytest.approx(32 * B * T * C + B * T * 4 * (H + 2 * 2), rel=0.02)


@pytest.mark.parametrize("values", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "lora"])
def test_counting_without_memory_finds_what_autograd_holds(values: dict, adapter: bool):
    def build():
        model = build_model(ModelConfig.from_dict(ModelConfig.from_dict(values).to_dict()))
        return lora(model) if adapter else model

    with fake_tensors(torch.float32):
        counted = sum(activation_bytes(build(), rows=4, seq_len=32, **PLAIN))
    model, ids = build(), torch.zeros(4, 32, dtype=torch.long)
    target = {"decoder_input_ids": ids} if values.get("shape") == "encoder_decoder" else {}
    assert counted == saved_tensor_bytes(model, lambda: model.features(ids, **target))


def test_frozen_experts_save_the_flops_of_those_that_a_token_passes():
    config = ModelConfig(**EXPERTS)
    model = Decoder(config)
    every = training_flops(model, config, 32, recomputed=0.0)
    for block in model.blocks:
        block.mlp.experts.requires_grad_(False)
    # 2 FLOPs for each weight of 2 of 4 experts: three matrices of 64 x 32 in three layers
    assert every - training_flops(model, config, 32, recomputed=0.0) == 2 * 3 * 2 * 3 * 64 * 32


def test_experts_are_planned_under_fsdp_only():
    with pytest.raises(ConfigError, match="n_experts"):
        local_model_config(ModelConfig(**EXPERTS), Layout(tensor=2))
    assert local_model_config(ModelConfig(**EXPERTS), Layout(data=2, zero=3)).n_experts == 4


def test_experts_that_stay_are_not_gathered_and_their_tokens_travel_four_times():
    # 1000 parameters, 800 of them of experts, on 8 devices; 2 mixture layers of 3 experts a token
    share, options = Share(weights=1000, trained=1000, largest=0, experts=800, trained_experts=800), {"n_layer": 4}
    options |= {"tokens": 10, "n_embd": 5, "passes": 1, "recomputed": 0.0, "expert_rows": 6}

    def sent(experts: int) -> dict[str, float]:
        return {t.what: t.n_bytes for t in traffic(share, Layout(data=8, experts=experts, zero=3), **options)}

    assert sent(1) == {"all-gather of weights": 7000, "reduce-scatter of gradients": 3500}
    # 200 parameters among 8 devices as before; a quarter of the 800, with one other device
    others = 4 * (200 * 7 / 8 + 200 / 2)
    tokens = 4 * 6 * 10 * 5 * 4 * 3 / 4
    assert sent(4) == {
        "all-gather of weights": pytest.approx(2 * others),
        "reduce-scatter of gradients": pytest.approx(others),
        "all-to-all of tokens": pytest.approx(tokens),
    }
    # with as many as there are devices, experts are neither gathered nor summed
    assert sent(8)["reduce-scatter of gradients"] == pytest.approx(4 * 200 * 7 / 8)


def test_a_unit_that_is_gathered_has_the_experts_of_its_device():
    model = Decoder(ModelConfig(**{**EXPERTS, "tie_embeddings": True}))  # else embedding and head are larger
    routed = 3 * 4 * 64 * 32
    assert largest_part(model) - largest_part(model, experts=4) == routed * 3 // 4
    with pytest.raises(ConfigError, match=r"model.n_experts \(4\) must be divisible by strategy.expert_parallel_size"):
        local_model_config(ModelConfig(**EXPERTS), Layout(data=3, experts=3, zero=3))


def test_recomputed_blocks_keep_their_input_and_selected_ones_their_products_too():
    def count(every: int | None, kind: str = "full") -> float:
        with fake_tensors(torch.float32):
            options = {**PLAIN, "every": every, "kind": kind}
            return sum(activation_bytes(Decoder(ModelConfig(**GPT)), rows=2, seq_len=32, **options))

    def alive(every: int) -> int:
        model, ids = Decoder(ModelConfig(**GPT)), torch.zeros(2, 32, dtype=torch.long)
        recompute(model, every)
        return saved_tensor_bytes(model, lambda: model.features(ids))

    everything = count(None)
    one_block = (everything - alive(1)) / 3
    assert count(1) == pytest.approx(alive(1) + one_block)
    assert count(3) == pytest.approx(alive(3) + one_block, rel=0.01)
    # q, k, v, o of C each, 4 C and C of the MLP, and the attention's output, of 2 x 32 tokens in 3 layers
    products = 3 * 2 * 32 * 64 * (4 + 4 + 1 + 1) * 4
    assert alive(1) + products < count(1, "selective") < everything


def test_pieces_of_sequences_leave_less_to_each_device():
    # Korthikanti et al. 2022, 4.2: s b h (8 + 24 / t) bytes a layer in 16 bits without dropout, of whose 8 the inputs of
    # two norms take 4, which shards divide, and those of attention and MLP 4, which are full here
    B, T, C, H, n = 2, 32, 64, 4, 2
    for n_shards, expected in ((1, 8 + 24 / n), (n, 4 + (4 + 24) / n)):
        sizes = []
        for n_layer in (1, 2):
            config = local_model_config(
                ModelConfig(**{**GPT, "n_layer": n_layer, "head_dim": C // H}), Layout(tensor=n)
            )
            with fake_tensors(torch.bfloat16):
                options = PLAIN | {"fused": True, "sequence_shards": n_shards}
                sizes.append(sum(activation_bytes(Decoder(config), rows=B, seq_len=T, **options)))
        statistics = B * T * 4 * (H / n + 2 * 2 / n_shards)
        assert sizes[1] - sizes[0] == pytest.approx(expected * B * T * C + statistics, rel=0.02)


def test_a_stage_holds_its_blocks_and_what_lies_at_its_end():
    with torch.device("meta"):
        model = Decoder(ModelConfig(**{**GPT, "n_layer": 4}))
    block = n_parameters(model.blocks[0])
    embed, position, norm = model.embed.weight.numel(), model.position.weight.numel(), n_parameters(model.norm)
    (first, learns), middle, last = stage_sizes(model, 4)[0], stage_sizes(model, 4)[1][0], stage_sizes(model, 4)[3][0]
    assert first == learns == block + embed + position
    assert (middle, last) == (block, block + embed + norm)  # whose head is the embedding


def test_early_stages_of_1f1b_hold_more_micro_batches():
    # Narayanan et al. 2019, section 3.2: as many as there are stages from one on; GPipe: all
    assert [Layout(stages=4, micro_batches=8).in_flight(stage) for stage in range(4)] == [4, 3, 2, 1]
    assert [Layout(stages=4, micro_batches=8, gpipe=True).in_flight(stage) for stage in range(4)] == [8] * 4
    share = Share(weights=0, trained=0, largest=0)
    assert memory(share, Layout(stages=4, micro_batches=8), activations=80, loss=5, stage=2).total == 20 + 5


def test_states_are_counted_by_what_the_optimizer_makes():
    model = Decoder(ModelConfig(**GPT))
    optimizer = muon(model.named_parameters(), lr=1e-3, weight_decay=0.0, **ADAM, **MUON)
    model(torch.zeros(1, 8, dtype=torch.long)).sum().backward()
    optimizer.step()
    held = sum(x.numel() for state in optimizer.state.values() for x in state.values() if x.ndim)
    assert moments("muon", model) * n_parameters(model) == pytest.approx(held)


MUON = {"adam_lr": None, "momentum": 0.9, "nesterov": True, "adjust_lr": "match_rms_adamw"}
ADAM = {"betas": (0.9, 0.95), "eps": 1e-8}
BUILDERS = {
    "adamw": (adamw, ADAM),
    "muon": (muon, {**ADAM, **MUON}),
    "sgd": (sgd, {"momentum": 0.9, "nesterov": False}),
}


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
def test_bytes_of_narrow_moments_are_those_that_a_step_makes(name: str, kind: str):
    model = Decoder(
        ModelConfig(**{**GPT, "n_embd": 80, "vocab_size": 60})
    )  # a table that is large enough, and rows with a rest
    build, options = BUILDERS[name]
    optimizer = build(model.named_parameters(), lr=1e-3, weight_decay=0.0, **options, moments=kind)
    model(torch.zeros(1, 8, dtype=torch.long)).sum().backward()
    optimizer.step()
    tensors = [x for state in optimizer.state.values() for x in state.values() if x.ndim]
    held = sum(x.numel() * x.element_size() for x in tensors)
    for width in (2, 4):
        numbers = moments(name, model, kind, weight_bytes=width)
        assert numbers * width * n_parameters(model) == pytest.approx(held)


def test_a_device_of_a_tensor_parallel_group_holds_its_heads_channels_and_words():
    config = ModelConfig(**LLAMA)
    part = local_model_config(config, Layout(tensor=2))
    with torch.device("meta"):
        full, half = Decoder(config), Decoder(part)
    matrices = sum(p.numel() for p in full.parameters() if p.ndim > 1)
    assert n_parameters(half) == n_parameters(full) - matrices // 2


def test_the_loss_holds_a_chunk_twice_and_the_gradients_of_head_and_hidden_states():
    sizes = {"tokens": 1000, "vocab_size": 500, "n_embd": 10, "compute_bytes": 2, "chunk_bytes": 10**9}
    assert loss_bytes(**sizes, head_learns=True) == 2 * 1000 * 500 * 4 + 10 * 500 * 4 + 10 * 1000 * 2
    assert loss_bytes(**{**sizes, "chunk_bytes": 100}, head_learns=False) == 200 + 20000


PLANS = {
    "fsdp": ("strategy=fsdp", "all-gather of weights", "reduce-scatter of gradients", "across nodes"),
    "ddp": ("strategy=ddp", "all-reduce of gradients", "DOES NOT FIT"),
    "tensor_parallel": ("strategy=tensor_parallel", "all-reduce of hidden states", "among 32"),
    "pipeline": ("strategy=pipeline", "send of hidden states", "among 32"),
}


@pytest.mark.parametrize("plan", some(PLANS))
def test_a_dry_run_plans_a_model_that_no_process_here_could_hold(plan: str, command):
    strategy, *said = PLANS[plan]
    devices = "trainer.devices=64" if plan in ("fsdp", "ddp") else "trainer.devices=32"
    result = command("train", "dry_run=true", strategy, devices, "model=llama_7b", "plan=a100")
    assert result.status == 0, result.err
    for words in (*said, "bottleneck: ", "tokens per second", "500 steps in", "total", "74.51 GiB of a100"):
        assert words in result.out
