"""Every class of model has the members that code outside `genai_pl.models` relies on, under those names."""

import pytest
import torch
from torch import nn

from genai_pl.errors import ConfigError
from genai_pl.models import CausalModel, LanguageModel, ModelConfig, PipelineModel, TensorParallelLayer, build_model
from genai_pl.models.hf.transformers_model import build_wrapped
from genai_pl.peft import bottleneck, lora
from genai_pl.strategies.pipeline_stages import parameter_stages
from genai_pl.strategies.tensor_parallel import check_split
from tests.small_models import GPT, LLAMA

GPT2 = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 2, "n_positions": 16, "vocab_size": 32}


def model_of(kind: str) -> nn.Module:
    if kind == "wrapped":
        return build_wrapped(GPT2)
    return build_model(ModelConfig(**{**GPT, "shape": kind}, **({"n_decoder_layer": 1} if "_" in kind else {})))


def members(protocol: type) -> set[str]:
    """Names that a protocol and those it extends declare."""
    own = {name for base in protocol.__mro__ for name in (*vars(base), *getattr(base, "__annotations__", {}))}
    return {name for name in own if not name.startswith("_")}


@pytest.mark.parametrize(
    ("kind", "protocols"),
    [
        ("decoder", (LanguageModel, CausalModel, PipelineModel)),
        ("encoder", (LanguageModel, PipelineModel)),
        ("encoder_decoder", (LanguageModel,)),
        ("wrapped", (LanguageModel, CausalModel)),
    ],
)
def test_a_model_has_every_member_of_its_protocols(kind: str, protocols: tuple[type, ...]) -> None:
    model = model_of(kind)
    assert members(LanguageModel) >= {"config", "embed", "lm_head", "blocks", "features", "to_head", "logits"}
    for protocol in protocols:
        assert [name for name in sorted(members(protocol)) if not hasattr(model, name)] == []
    assert all(callable(getattr(model, name)) for name in model.feature_methods)


def test_every_parameter_of_a_pipeline_belongs_to_the_stages_that_compute_with_it() -> None:
    model = build_model(ModelConfig(**{**GPT, "n_layer": 4, "tie_embeddings": True}))
    stages = parameter_stages(model, 2)
    assert list(stages) == list(model.parameters())
    expected = {"embed": (0, 1), "position": (0,), "norm": (1,), "lm_head": (0, 1)}
    expected |= {f"blocks.{n}": (n // 2,) for n in range(4)}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        prefix = next(prefix for prefix in expected if name.startswith(f"{prefix}."))
        assert stages[parameter] == expected[prefix], name


def test_a_model_that_keeps_some_blocks_computes_what_they_make_of_the_hidden_states_that_it_receives() -> None:
    model, whole = (build_model(ModelConfig(**{**GPT, "n_layer": 3})) for _ in range(2))
    whole.load_state_dict(model.state_dict())
    ids, states = torch.tensor([[1, 2, 3, 4]]), []
    for block in whole.blocks:
        block.register_forward_hook(lambda _, args, y: states.append(y))
    whole.features(ids)
    part = model.with_blocks(range(1, 2), lambda: states[0])
    assert torch.equal(part.features(ids), states[1])
    assert part.blocks[1] is model.blocks[1]
    assert torch.equal(model.features(ids), whole.features(ids))  # which stays whole


def test_parts_of_blocks_name_the_linear_layers_that_tensor_parallelism_divides() -> None:
    block = build_model(ModelConfig(**LLAMA)).blocks[0]
    assert all(isinstance(part, TensorParallelLayer) for part in block.parts)
    linear = {id(module) for module in block.modules() if isinstance(module, nn.Linear)}
    assert {id(layer) for part in block.parts for layer in (*part.column_layers, *part.row_layers)} == linear


def test_an_adapter_around_a_part_of_a_block_is_refused_by_tensor_parallelism() -> None:
    check_split(lora(build_model(ModelConfig(**LLAMA))), 2, sequence_parallel=False)
    with pytest.raises(ConfigError, match="of adapters only peft=lora"):
        check_split(bottleneck(build_model(ModelConfig(**LLAMA))), 2, sequence_parallel=False)
