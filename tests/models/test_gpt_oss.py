"""gpt-oss in float64 against transformers' eager attention: logits, gradients, packing, cache; and files in MXFP4."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_against_transformers import TOKENS, build_ours, shaken
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, rms_norm
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm

from genai_pl.errors import CheckpointError, ConfigError
from genai_pl.models import load_pretrained, save_pretrained
from genai_pl.models.hf.folder import TensorFiles, read_json, write_json
from genai_pl.models.hf.mxfp4 import BLOCKS, SCALES
from genai_pl.models.hf.transformers_model import load_wrapped

SIZES = {
    "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "num_local_experts": 5, "num_experts_per_tok": 2, "vocab_size": 61, "max_position_embeddings": 64,
    "sliding_window": 5, "pad_token_id": 0,
}  # fmt: skip
ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 500.0}
MEMBERS = {
    "as published": {},
    "other numbers of the gate": {"swiglu_limit": 0.4, "swiglu_alpha": 1.1},  # a bound that is reached
    "without biases of attention": {"attention_bias": False, "rope_parameters": {**ROPE, "truncate": False}},
    "two full layers of three": {"layer_types": ["full_attention", "full_attention", "full_attention"]},
    "tied": {"tie_word_embeddings": True, "rope_parameters": {**ROPE, "truncate": True}, "num_experts_per_tok": 3},
}
OURS = {
    "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32, "vocab_size": 61, "max_seq_len": 24, "position": "rotary",
    "norm": "rmsnorm", "gated_mlp": True, "activation": "clamped_swiglu", "swiglu_limit": 0.5, "attention_sinks": True,
    "n_experts": 4, "expert_size": 24, "router_bias": True, "window": 5, "full_every": 2, "tie_embeddings": False,
}  # fmt: skip


def theirs_of(**values: object) -> GptOssForCausalLM:
    """A model of transformers whose every weight is drawn, sinks and biases among them."""
    config = GptOssConfig(**{**SIZES, **values}, attn_implementation="eager", experts_implementation="eager")
    return shaken(GptOssForCausalLM(config))


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(1, 61, (2, 17), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=MEMBERS.values(), ids=MEMBERS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[nn.Module, nn.Module]:
    """The same weights in float64 as a model of transformers and as one of ours."""
    theirs = theirs_of(**request.param)
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path, dtype=torch.float64)
    # transformers normalizes in float32 whatever the weights are, and rotary tables are float32 in both
    rotary = theirs.model.rotary_emb
    cos, sin = rotary(torch.zeros(1), torch.arange(24)[None])
    ours_cos, ours_sin = (table[0, 0, :, SIZES["head_dim"] // 2 :] for table in ours.rotary(torch.arange(24)))
    torch.testing.assert_close(ours_cos, cos[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours_sin, sin[0], rtol=0, atol=1e-5)
    rotary.forward = lambda x, positions: (ours_cos.double()[positions], ours_sin.double()[positions])
    for norm in [module for module in theirs.modules() if isinstance(module, GptOssRMSNorm)]:
        norm.forward = _in_double(norm)
    return theirs.double(), ours


def _in_double(norm: GptOssRMSNorm) -> Callable[[Tensor], Tensor]:
    return lambda x: rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def test_logits_and_all_gradients_are_those_of_transformers(pair: tuple, tmp_path: Path, ids: Tensor) -> None:
    theirs, ours = pair
    expected, actual = theirs(ids).logits, ours(ids)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    for logits in (expected, actual):
        cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    # gradients as files hold them: ours written by the family's table, each beside its name in transformers
    for model, name in ((theirs, "expected"), (ours, "actual")):
        for parameter in model.parameters():
            parameter.data = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        if name == "expected":
            model.save_pretrained(tmp_path / name)
        else:
            save_pretrained(model, tmp_path / name, token_ids=TOKENS)
    written, wanted = TensorFiles(tmp_path / "actual"), TensorFiles(tmp_path / "expected")
    assert {*written.files} == {*wanted.files}
    assert any(name.endswith("sinks") for name in wanted.files)
    for name in wanted.files:
        torch.testing.assert_close(written.read(name), wanted.read(name), rtol=0, atol=1e-10)
        assert wanted.read(name).abs().max() > 0


@torch.no_grad()
def test_packed_documents_and_cached_tokens_are_those_of_each_text_alone(pair: tuple, ids: Tensor) -> None:
    theirs, ours = pair
    segments = torch.tensor([[1] * 7 + [2] * 10, [0] * 4 + [1] * 13])
    packed = ours(ids, segments)
    for row, part in ((0, slice(0, 7)), (0, slice(7, 17)), (1, slice(4, 17))):
        expected = theirs(ids[row : row + 1, part]).logits
        torch.testing.assert_close(packed[row : row + 1, part], expected, rtol=0, atol=1e-10)
    cache = ours.new_cache(2, 17)
    steps = [ours(ids[:, :9], cache=cache), *(ours(ids[:, n : n + 1], cache=cache) for n in range(9, 17))]
    torch.testing.assert_close(torch.cat(steps, dim=1), theirs(ids).logits, rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_model_of_ours_is_read_by_transformers(tmp_path: Path, ids: Tensor) -> None:
    ours = build_ours(OURS)
    assert save_pretrained(ours, tmp_path, token_ids=TOKENS) == "GptOssForCausalLM"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    torch.testing.assert_close(theirs(ids).logits, ours(ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "change", [{"router_bias": False}, {"attention_sinks": False}, {"gated_mlp": False, "activation": "gelu"}], ids=str
)
@torch.no_grad()
def test_what_gpt_oss_has_not_stays_ours(change: dict, tmp_path: Path, ids: Tensor) -> None:
    ours = build_ours({**OURS, **change})
    assert save_pretrained(ours, tmp_path, token_ids=TOKENS) == "genai_pl"
    assert torch.equal(load_pretrained(tmp_path)(ids), ours(ids))


def test_options_that_exclude_each_other_are_refused() -> None:
    for change in ({"gated_mlp": False}, {"attention_kind": "window"}, {"swiglu_limit": 0.0}):
        with pytest.raises(ConfigError, match=r"gated_mlp|attention_sinks|swiglu_limit"):
            build_ours({**OURS, **change})


def mxfp4_folder(folder: Path) -> dict[str, Tensor]:
    """A folder as gpt-oss is published: experts in blocks and scales. Returns the experts' tensors as transformers reads them."""
    theirs_of().save_pretrained(folder)
    generator = torch.Generator().manual_seed(5)
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    expected = {}
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        E, width, out = tensors.pop(name).shape
        blocks = torch.randint(256, (E, out, width // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(119, 125, (E, out, width // 32), dtype=torch.uint8, generator=generator)
        tensors |= {name + BLOCKS: blocks, name + SCALES: scales}
        expected[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = read_json(folder / "config.json") | {"quantization_config": {"quant_method": "mxfp4"}}
    write_json(folder / "config.json", config)
    return expected


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_mxfp4_files_are_read_as_transformers_reads_them_and_written_plain(tmp_path: Path, ids: Tensor) -> None:
    expected = mxfp4_folder(tmp_path / "published")
    stored = TensorFiles(tmp_path / "published")
    for name, tensor in expected.items():
        assert torch.equal(stored.read(name), tensor)
        assert stored.shape(name) == tensor.shape
    ours = load_pretrained(tmp_path / "published")
    # transformers on the same numbers: it dequantizes on a CPU
    theirs = GptOssForCausalLM.from_pretrained(
        tmp_path / "published", attn_implementation="eager", dtype=torch.float32
    ).float()
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-5, atol=1e-5)
    wrapped = load_wrapped(str(tmp_path / "published"))
    torch.testing.assert_close(wrapped(ids), theirs(ids).logits, rtol=1e-5, atol=1e-5)
    for model, name in ((ours, "ours"), (wrapped, "wrapped")):
        save_pretrained(model, tmp_path / name, token_ids=TOKENS)
        assert "quantization_config" not in read_json(tmp_path / name / "config.json")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name, attn_implementation="eager", dtype=torch.float32)
        torch.testing.assert_close(again(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


def test_files_of_another_quantization_are_refused_with_the_fix(tmp_path: Path) -> None:
    mxfp4_folder(tmp_path)
    values = read_json(tmp_path / "config.json")
    write_json(tmp_path / "config.json", values | {"quantization_config": {"quant_method": "fp8"}})
    with pytest.raises(CheckpointError, match=r"fp8.*mxfp4.*dequantize"):
        load_pretrained(tmp_path)
    write_json(tmp_path / "config.json", values)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name = next(name for name in tensors if name.endswith(SCALES))
    save_file(
        {**tensors, name: tensors[name][..., :1, :].contiguous()},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(CheckpointError, match="MXFP4"):
        load_pretrained(tmp_path)
