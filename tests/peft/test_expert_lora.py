"""LoRA and DoRA on tensors of experts: equal to adapting each expert's matrix alone, and to PEFT's `target_parameters`."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from genai_pl.errors import CheckpointError, ConfigError
from genai_pl.models import Decoder, ModelConfig, load_pretrained, save_pretrained
from genai_pl.models.experts import ExpertLinear, sort_by_expert
from genai_pl.peft import load_adapter, lora, merge, save_adapter
from genai_pl.peft.adapter import Adapter, RowWeights, adapters_of
from genai_pl.peft.lora import ExpertLoRA, LoRALinear

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*"),
    # PEFT compares its patterns with names of modules only, and uses them for parameters all the same
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys"),
]
SIZES = {
    "n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 61, "max_seq_len": 24, "position": "rotary", "norm": "rmsnorm",
    "activation": "silu", "gated_mlp": True, "bias": False, "tie_embeddings": False, "n_experts": 3, "expert_size": 24,
}  # fmt: skip
FAMILIES = {
    "MixtralForCausalLM": {},
    "Qwen3MoeForCausalLM": {"qk_norm": True, "n_dense_layers": 1},
    "OlmoeForCausalLM": {"qk_norm": True, "qk_norm_joint": True, "normalize_top_k": False},
    "GptOssForCausalLM": {
        "bias": True, "attention_sinks": True, "router_bias": True, "activation": "clamped_swiglu", "window": 8, "full_every": 2,
    },
}  # fmt: skip
EXPERTS = ["experts.gate_proj", "experts.up_proj", "experts.down_proj"]
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}


def build(**options: object) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(ModelConfig(**{**SIZES, **options})).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def shaken(model: nn.Module) -> nn.Module:
    """The model with drawn adapter weights: B starts at zero, which would hide mistakes."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3, generator=generator)
        if "magnitude" in name:
            parameter.data.mul_(1.3)
    return model


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(61, (2, 17), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"init": "pissa"}, {"rslora": True}], ids=str)
def test_each_experts_rows_change_as_lora_on_its_matrix_alone(options: dict) -> None:
    torch.manual_seed(0)
    base = ExpertLinear(3, 8, 6, bias=True)
    for parameter in base.parameters():
        nn.init.normal_(parameter)
    common = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "rslora": False, "dora": False, "init": "default", **options}
    ours = shaken(ExpertLoRA(base, Adapter("lora", {}), **common))
    x, experts = torch.randn(7, 8), torch.tensor([0, 2, 1, 2, 0, 0, 2])
    dispatch = sort_by_expert(experts[:, None], 3, tokens_per_row=7)
    y = ours(x[dispatch.order], dispatch)[dispatch.inverse]
    for e in range(3):
        single = nn.Linear(8, 6)
        single.weight.data, single.bias.data = base.weight.data[e], base.bias.data[e]
        alone = LoRALinear(single, Adapter("lora", {}), **common)
        with torch.no_grad():
            for name, parameter in ours.named_parameters():
                if not name.startswith("base."):
                    alone.get_parameter(name).copy_(parameter[e])
        if ours.start_A is not None:
            alone.start_A, alone.start_B = ours.start_A[e], ours.start_B[e]
        torch.testing.assert_close(y[experts == e], alone(x[experts == e]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"init": "pissa"}], ids=str)
@torch.no_grad()
def test_merged_experts_compute_what_the_adapter_computes(options: dict, ids: Tensor) -> None:
    start = build()(ids)
    model = lora(build(), rank=2, target_modules=[*EXPERTS, "q_proj"], **options)
    torch.testing.assert_close(model(ids), start, rtol=0, atol=1e-5)  # it begins as its base
    adapted = shaken(model)(ids)
    assert (adapted - start).abs().max() > 0.01
    torch.testing.assert_close(merge(model)(ids), adapted, rtol=0, atol=1e-4)


@torch.no_grad()
def test_rows_of_a_batch_may_have_weights_of_their_own(ids: Tensor) -> None:
    model = shaken(lora(build(), rank=2, target_modules=EXPERTS))
    (adapter,) = adapters_of(model)
    on = model(ids)
    adapter.weight = 0.0
    off = model(ids)
    with RowWeights([(adapter, torch.tensor([1.0, 0.0]))]).applied():
        mixed = model(ids)
    torch.testing.assert_close(mixed, torch.stack([on[0], off[1]]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "targets", [EXPERTS, ["experts.down_proj"], ["experts.up_proj", "v_proj"]], ids=["all", "down", "up"]
)
@pytest.mark.parametrize(("class_name", "options"), FAMILIES.items(), ids=FAMILIES)
@torch.no_grad()
def test_peft_loads_our_files(class_name: str, options: dict, targets: list[str], tmp_path: Path, ids: Tensor) -> None:
    model = build(**options)
    assert save_pretrained(model, tmp_path / "base", token_ids=TOKENS) == class_name
    model = shaken(lora(model, rank=2, alpha=8.0, dropout=0.1, target_modules=targets)).eval()
    save_adapter(model, tmp_path / "adapter", base=str(tmp_path / "base"))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=0, atol=1e-5)
    again = load_adapter(load_pretrained(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(again.eval()(ids), model(ids), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "parameters", [["gate_up_proj", "experts.down_proj"], ["experts.gate_up_proj"]], ids=["both", "one"]
)
@pytest.mark.parametrize(("class_name", "options"), FAMILIES.items(), ids=FAMILIES)
def test_pefts_files_are_read(
    class_name: str, options: dict, parameters: list[str], tmp_path: Path, ids: Tensor
) -> None:
    save_pretrained(build(**options), tmp_path / "base", token_ids=TOKENS)
    config = LoraConfig(
        r=3, lora_alpha=5, target_modules=["v_proj"], target_parameters=parameters, task_type="CAUSAL_LM"
    )
    config.rank_pattern, config.alpha_pattern = {"experts.gate_up_proj": 2}, {"experts.gate_up_proj": 7}
    theirs = shaken(get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_adapter(load_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("class_name", ["MixtralForCausalLM", "GptOssForCausalLM"])
def test_a_trained_router_and_lora_on_attention_are_read_by_peft(class_name: str, tmp_path: Path, ids: Tensor) -> None:
    model = build(**FAMILIES[class_name])
    save_pretrained(model, tmp_path / "base", token_ids=TOKENS)
    model = shaken(lora(model, rank=2, modules_to_save=["router"]))
    for name, parameter in model.named_parameters():
        if "router.copy" in name:
            parameter.add_(0.3)
    save_adapter(model, tmp_path / "adapter", base=str(tmp_path / "base"))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{"n_shared_experts": 1}, {"qk_norm": True, "n_dense_layers": 1}, FAMILIES["GptOssForCausalLM"]],
    ids=["native", "dora", "gpt_oss"],
)
def test_adapters_that_peft_cannot_hold_come_back_here(options: dict, tmp_path: Path, ids: Tensor) -> None:
    save_pretrained(build(**options), tmp_path / "base", token_ids=TOKENS)
    model = shaken(lora(load_pretrained(tmp_path / "base"), rank=2, dora=True, target_modules=EXPERTS))
    save_adapter(model, tmp_path / "adapter", base=str(tmp_path / "base"))
    again = load_adapter(load_pretrained(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(again(ids), model(ids), rtol=0, atol=1e-6)


def test_targets_mean_what_they_say() -> None:
    model = lora(build(), target_modules="all-linear")
    assert not any(
        isinstance(module, ExpertLoRA) for module in model.modules()
    )  # as in PEFT: they are parameters there
    with pytest.raises(ConfigError, match="experts"):
        lora(build(), modules_to_save=["up_proj"])


def test_a_file_whose_parameter_is_unclear_is_refused(tmp_path: Path) -> None:
    save_pretrained(build(), tmp_path / "base", token_ids=TOKENS)
    config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config).save_pretrained(
        tmp_path / "adapter"
    )
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(file.read_text().replace("experts.down_proj", "experts.other"))
    with pytest.raises(CheckpointError, match="target_parameters"):
        load_adapter(load_pretrained(tmp_path / "base"), tmp_path / "adapter")
