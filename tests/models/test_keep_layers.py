"""Layers kept of a deeper model: which, and that they compute what they did before."""

import pytest
import torch

from genai_pl.config.generation import GenerationConfig
from genai_pl.errors import ConfigError
from genai_pl.models import ModelConfig, build_model
from genai_pl.models.keep_layers import evenly_spaced, keep_layers
from genai_pl.modules.rollout import generate_rollout
from tests.small_models import GPT, LLAMA

WINDOWS = {**LLAMA, "n_layer": 6, "window": 4, "full_every": 3}


def test_a_student_of_half_the_depth_has_every_second_layer() -> None:
    assert evenly_spaced(6, 12) == [0, 2, 4, 7, 9, 11]  # DistilBERT of BERT
    assert evenly_spaced(1, 12) == [0]
    assert evenly_spaced(12, 12) == list(range(12))


def test_kept_layers_compute_what_they_did() -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(**{**GPT, "n_layer": 4})).eval()
    ids = torch.randint(200, (2, 9))
    whole = list(model.blocks)
    student = keep_layers(model, [1, 3])
    assert (student.config.n_layer, len(student.windows)) == (2, 2)
    assert [block is whole[n] for block, n in zip(student.blocks, (1, 3), strict=True)] == [True, True]
    again = build_model(student.config).eval()  # its configuration describes it
    again.load_state_dict(student.state_dict())
    torch.testing.assert_close(again(ids), student(ids))


@pytest.mark.parametrize("kind", ["full", "performer", "reformer"])
def test_kept_layers_decode_with_a_cache_and_are_loaded_as_the_same_model(kind: str) -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(**{**GPT, "n_layer": 4}, attention_kind=kind)).eval()
    student = keep_layers(model, [1, 3])
    ids = torch.randint(200, (1, 9))
    again = build_model(student.config).eval()
    again.load_state_dict(student.state_dict())
    torch.testing.assert_close(again(ids), student(ids))
    if kind == "full":  # the others have no cache
        options = {"generator": torch.Generator(), "ends": set(), "pad": 0}
        greedy = generate_rollout(
            student, [ids[0].numpy()], GenerationConfig(max_new_tokens=3, temperature=0), **options
        )
        row = greedy.batch["input_ids"]
        assert row[0, 9:].tolist() == student(row)[0, 8:-1].argmax(-1).tolist()


def test_fields_with_a_value_for_each_layer_follow() -> None:
    model = build_model(ModelConfig(**GPT, extra={"layer_types": ["a", "b", "c"], "other": [1, 2]}))
    assert keep_layers(model, 2).config.extra == {"layer_types": ["a", "c"], "other": [1, 2]}


def test_windows_stay_where_the_configuration_has_them() -> None:
    student = keep_layers(build_model(ModelConfig(**WINDOWS)), [0, 1, 2])
    assert student.windows == [4, 4, None]
    with pytest.raises(ConfigError, match="other layers would have windows"):
        keep_layers(build_model(ModelConfig(**WINDOWS)), 3)


@pytest.mark.parametrize("layers", [0, 4, [], [2, 1], [1, 1], [3], [-1]])
def test_numbers_that_the_model_has_not_are_an_error(layers: int | list[int]) -> None:
    with pytest.raises(ConfigError, match=r"^init_layers="):
        keep_layers(build_model(ModelConfig(**GPT)), layers)
