"""Two processes that divide a model compute the results of one: losses, gradients, and the most likely token."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from genai_pl.distributed.dtensor import full_tensor_on_cpu
from genai_pl.distributed.tensor_parallel_group import sum_gradients
from genai_pl.errors import ConfigError
from genai_pl.kernels import linear_cross_entropy
from genai_pl.models import Decoder, ModelConfig, build_model
from genai_pl.objectives import masked_accuracy, token_loss
from genai_pl.peft import lora
from genai_pl.strategies.tensor_parallel import check_split, split_model
from tests.small_models import GPT, LLAMA

V = 51  # words of one process: 26, of the other: 25
ENCODER = {**GPT, "shape": "encoder", "norm_order": "post", "embed_norm": True, "n_token_types": 2}
MODELS = {
    "gpt": GPT,
    "llama": {**LLAMA, "qk_norm": True, "logit_softcap": 5.0},
    "bert": {**ENCODER, "head": "transform", "head_bias": True},
    "t5": {**GPT, "shape": "encoder_decoder", "n_decoder_layer": 2, "position": "relative", "scale_head": True},
    "alibi": {**GPT, "position": "alibi", "norm_order": "sandwich", "bias": False},
    "longformer": {**LLAMA, "attention_kind": "window", "window": 3, "n_global": 1},
    "lora": GPT,
}
LOSSES = {
    "plain": {},
    "with all": {"bias": True, "softcap": 2.0, "label_smoothing": 0.1, "z_loss": 0.01, "chunk_tokens": 3},
    "frozen head": {"frozen": True, "chunk_tokens": 4},
}
Result = dict[str, Tensor]


def loss_of_parts(name: str, mesh: DeviceMesh) -> tuple[Result, Result]:
    """What two processes find, and what softmax over all words says."""
    options = dict(LOSSES[name])
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*size, generator=generator) for size in ((2, 7, 8), (V, 8), (V,)))
    labels = torch.randint(V, (2, 7), generator=generator)
    labels[0, :3] = -100
    learns, bias = not options.pop("frozen", False), bias if options.pop("bias", False) else None
    own = [None if x is None else distribute_tensor(x, mesh, [Shard(0)]).requires_grad_(learns) for x in (weight, bias)]
    tokens = hidden.clone().requires_grad_()
    loss = linear_cross_entropy(tokens, own[0], labels, bias=own[1], **options)
    (2 * loss).backward()
    found = {"loss": loss.detach(), "hidden": tokens.grad}
    found |= {n: x.grad.full_tensor() for n, x in zip(("weight", "bias"), own, strict=True) if x is not None and learns}
    found["correct"] = masked_accuracy(hidden, own[0], labels, bias=own[1])

    exact = [None if x is None else x.double().requires_grad_() for x in (hidden, weight, bias)]
    logits = F.linear(*exact)
    if "softcap" in options:
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    kept = labels != -100
    right = F.cross_entropy(
        logits[kept], labels[kept], reduction="sum", label_smoothing=options.get("label_smoothing", 0)
    )
    right = right + options.get("z_loss", 0.0) * logits[kept].logsumexp(-1).square().sum()
    (2 * right).backward()
    expected = {"loss": right.detach(), "hidden": exact[0].grad}
    expected |= {n: x.grad for n, x in zip(("weight", "bias"), exact[1:], strict=True) if x is not None and learns}
    expected["correct"] = (logits.argmax(-1) == labels)[kept].sum()
    return found, expected


def pass_of(model: nn.Module, shared: Callable[[], None] = lambda: None) -> Result:
    """The loss of seven tokens a row, logits, and the gradients of all parameters, summed over two batches."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        ids, labels = torch.randint(V, (2, 2, 7), generator=generator)
        segments = torch.tensor([[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 0, 0]])
        target = {"decoder_input_ids": ids.flip(1)} if model.config.shape.value == "encoder_decoder" else {}
        hidden = model.features(ids, segments, **target)
        head, softcap = model.lm_head, model.config.logit_softcap
        loss = token_loss(model.to_head(hidden), head.weight, labels, bias=head.bias, softcap=softcap)
        loss.backward()
    shared()
    result = {"loss": loss.detach(), "logits": model.logits(hidden).detach()}
    return result | {name: full_tensor_on_cpu(p.grad) for name, p in model.named_parameters() if p.requires_grad}


def parts_of(name: str, mesh: DeviceMesh, *, sequence_parallel: bool) -> tuple[Result, Result]:
    """What two processes find, and what one does."""
    torch.manual_seed(0)
    model = build_model(ModelConfig.from_dict({**MODELS[name], "vocab_size": V}))
    if name == "lora":
        model = lora(model, target_modules="all-linear")
    for parameter in model.parameters():  # norms and biases that do something
        parameter.data += 0.1 * torch.randn_like(parameter)
    expected = pass_of(copy.deepcopy(model))
    places = split_model(model, mesh, sequence_parallel=sequence_parallel)
    shared = [getattr(part, parameter) for part, parameter in places]
    return pass_of(model, lambda: sum_gradients(shared, mesh.get_group())), expected


def dropped_pieces(mesh: DeviceMesh) -> Result:
    """What dropout leaves of ones, by the process; twice from the same state, and what is drawn afterwards."""
    model = Decoder(ModelConfig(**{**GPT, "dropout": 0.5}))
    split_model(model, mesh, sequence_parallel=True)
    torch.manual_seed(mesh.size())
    state, ones = torch.get_rng_state(), torch.ones(1, 4, 16)
    first = model.blocks[0].dropout(ones)
    after = torch.rand(3)
    torch.set_rng_state(state)
    again = model.blocks[0].dropout(ones)
    return {"first": first, "again": again, "after": after}


def compute(rank: int, folder: Path) -> None:
    """What one of two processes finds, in a file."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (2,))
    results = {name: loss_of_parts(name, mesh) for name in LOSSES}
    for name in MODELS:
        results[f"{name} divided"] = parts_of(name, mesh, sequence_parallel=False)
        results[f"{name} in shards"] = parts_of(name, mesh, sequence_parallel=True)
    results["dropout"] = dropped_pieces(mesh)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("two")
    mp.spawn(compute, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


CASES = [*LOSSES, *(f"{name} {how}" for name in MODELS for how in ("divided", "in shards"))]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_find_the_losses_and_gradients_of_one(case: str, found: list[dict]) -> None:
    for results in found:
        ours, right = results[case]
        assert ours.keys() == right.keys()
        for name, expected in right.items():
            scale = expected.abs().max().clamp(min=0.1)  # the bias of keys changes nothing
            assert (ours[name] - expected).abs().max() <= 1e-5 * scale, name


def test_pieces_of_a_sequence_are_dropped_differently_and_again_after_a_resume(found: list[dict]) -> None:
    first, second = (results["dropout"] for results in found)
    for results in (first, second):
        assert set(results["first"].flatten().tolist()) == {0.0, 2.0}
        assert torch.equal(results["first"], results["again"])
    assert not torch.equal(first["first"], second["first"])
    assert torch.equal(first["after"], second["after"])  # what they share goes on being the same


REFUSED = {
    "vocab_size": {"vocab_size": 5},
    "n_head": {"n_head": 6, "n_embd": 66},
    "share_layers": {"share_layers": True, "shape": "encoder"},
}


@pytest.mark.parametrize("option", REFUSED)
def test_what_cannot_be_divided_is_named(option: str) -> None:
    model = build_model(ModelConfig.from_dict({**GPT, **REFUSED[option]}))
    with pytest.raises(ConfigError, match=option):
        check_split(model, 4, sequence_parallel=True)
