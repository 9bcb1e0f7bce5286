"""Families of transformers under model=hf: equal in all that a run does with a model, or refused in one line; never otherwise."""

import sys
from pathlib import Path

import pytest
import torch
from one_family import built, refusal_or_faults, wrapped
from test_against_transformers import shaken
from tiny_families import tiny_config
from transformers import masking_utils

from genai_pl.checkpoints.file import MARK
from genai_pl.config.enums import AttentionBackend
from genai_pl.data import byte_tokenizer
from genai_pl.data.tokenizer import tokenizer_files
from genai_pl.errors import ConfigError
from genai_pl.kernels import AttentionMask
from genai_pl.loading import load
from genai_pl.models.hf.transformers_attention import Packing, attend, rules
from genai_pl.models.hf.transformers_model import build_wrapped, load_wrapped
from genai_pl.peft import METHODS

DOCS = Path(__file__).parents[2] / "docs"
EQUAL = {
    "llama": {},
    "mistral": {"sliding_window": 3},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen2_moe": {},
    "mixtral": {},
    "gemma2": {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0},
    "gemma3_text": {},
    "gemma3": {},
    "deepseek_v3": {},
    "gpt2": {"scale_attn_by_inverse_layer_idx": True},
    "gpt_oss": {},
}
# fields of configurations met in the wild, which change numbers
FIELDS = {
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5},
    "cohere": {"logit_scale": 0.5},
    "olmo": {"clip_qkv": 0.1},
    "smollm3": {"no_rope_layers": [1, 0]},
    "phi": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}},
}
ROUTES = {  # a line of the log for each slower route
    "qwen3_next": ("documents of a packed row get a row each: documents",),
    "lfm2": ("documents of a packed row get a row each: documents",),
    "bloom": ("transformers computes attention: ",),
    "llama4_text": (
        "transformers computes attention: Llama4TextAttention has masks other than causal ones and windows",
    ),
    "gemma3n_text": ("there are no virtual tokens: its layers read more of a token than its embedding",),
}
REFUSED = [
    ("llama", {"is_causal": False}, "its tokens see those that come later"),
    ("bert", {}, "its head does more than one product"),
    ("inkling_text", {}, "its head does more than one product"),
]


class Config:
    model_type = "a_family"


@pytest.mark.parametrize("kind", EQUAL)
def test_a_family_that_runs_is_theirs_in_rows_text_gradients_and_folders(kind: str, tmp_path: Path):
    assert refusal_or_faults(built(kind, **EQUAL[kind]), tmp_path) == []


@pytest.mark.parametrize("kind", FIELDS)
def test_a_field_that_changes_numbers_is_computed(kind: str, tmp_path: Path):
    plain, changed = built(kind), built(kind, **FIELDS[kind])
    changed.load_state_dict(plain.state_dict())
    tokens = torch.arange(3, 16)[None]
    assert not torch.allclose(plain(tokens).logits, changed(tokens).logits, rtol=1e-3)
    assert refusal_or_faults(changed, tmp_path) == []


@pytest.mark.parametrize("kind", ROUTES)
def test_a_family_that_the_fast_route_cannot_compute_takes_a_slower_one_and_says_so(kind: str, tmp_path: Path):
    outcome = wrapped(built(kind), tmp_path)
    assert (outcome.refused, outcome.wrong) == (None, ())
    for start in ROUTES[kind]:
        assert any(note.startswith(start) for note in outcome.notes)


def test_attention_by_name_refuses_a_family_that_needs_its_own(tmp_path: Path):
    built("bloom").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.attention=reference asks for ours: set model\.attention=auto"):
        load_wrapped(str(tmp_path), attention=AttentionBackend.reference)


@pytest.mark.parametrize(("method", "kind"), [("prefix", "bloom"), ("prompt", "gemma3n_text")])
def test_virtual_tokens_are_refused_where_a_route_has_no_place_for_them(method: str, kind: str, tmp_path: Path):
    built(kind).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=rf"peft={method} gives .* choose peft=lora"):
        METHODS[method].make(load_wrapped(str(tmp_path)), n_tokens=2)


@pytest.mark.parametrize(("kind", "values", "message"), REFUSED)
def test_a_family_that_would_compute_something_else_is_refused(kind: str, values: dict, message: str, tmp_path: Path):
    line = refusal_or_faults(built(kind, **values), tmp_path)
    assert isinstance(line, str)
    assert message in line
    assert line.startswith(f"model.name={tmp_path}")
    assert "\n" not in line


@pytest.mark.slow
def test_no_registered_family_is_wrong_and_the_page_says_what_each_does():
    sys.path.insert(0, str(DOCS))
    import make_families

    outcomes = make_families.outcomes()
    assert [kind for kind, cells in outcomes.items() if cells[0] == "wrong"] == []
    assert make_families.page(outcomes) == make_families.PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_low_precision_are_compared_exactly_and_stay_as_they_are(dtype: torch.dtype, tmp_path: Path):
    theirs = built("llama").to(dtype)
    theirs.save_pretrained(tmp_path / "llama")
    ours = load_wrapped(str(tmp_path / "llama"), dtype=dtype)
    for name, weight in theirs.state_dict().items():
        torch.testing.assert_close(ours.inner.state_dict()[name], weight, rtol=0, atol=0)
    built("qwen3_next").to(dtype).save_pretrained(tmp_path / "hybrid")
    assert not load_wrapped(str(tmp_path / "hybrid"), dtype=dtype).route.masks_documents


def test_an_argument_of_attention_that_nobody_calculates_with_is_refused_by_name():
    q = torch.randn(1, 2, 3, 8)
    arguments = (torch.nn.Linear(1, 1), q, q, q, AttentionMask(causal=True))
    expected = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2)
    actual, _ = attend(*arguments, packing=Packing(None, "auto"), sliding_window=None, new_bias=None)
    torch.testing.assert_close(actual, expected)
    with pytest.raises(ConfigError, match="Linear gives attention new_bias, which ours does not take"):
        attend(*arguments, packing=Packing(None, "auto"), new_bias=torch.zeros(1))
    with pytest.raises(ConfigError, match="a_family gives a mask new_rule, which ours does not take"):
        rules(mask_function=masking_utils.causal_mask_function, config=Config, new_rule=1)


@pytest.mark.parametrize("size", [1, 5, 4096])
def test_a_mask_is_taken_for_a_window_only_if_it_is_one_of_that_size(size: int):
    window = masking_utils.sliding_window_causal_mask_function(size)
    mask = rules(mask_function=window, local_size=size, config=Config)
    assert (mask.causal, mask.window) == (True, size)
    others = [
        masking_utils.sliding_window_causal_mask_function(size + 1),
        masking_utils.chunked_causal_mask_function(size + 1, torch.zeros(1, dtype=torch.long)),
        masking_utils.sliding_window_bidirectional_mask_function(size),
        masking_utils.bidirectional_mask_function,
    ]
    assert [rules(mask_function=other, local_size=size, config=Config) for other in others] == [None] * 4
    assert rules(mask_function=window, config=Config, kv_length=size + 1) is None  # a window that is not said


@pytest.mark.parametrize("with_lora", [False, True])
def test_a_checkpoint_of_a_family_that_does_not_run_is_refused_with_an_adapter_too(with_lora: bool, tmp_path: Path):
    for kind in ("llama", "bert"):
        model = build_wrapped(tiny_config(kind).to_dict())
        contents = {"model": model.config.to_dict(), "tokenizer": tokenizer_files(byte_tokenizer())}
        if with_lora:
            options = {"target_modules": ["q_proj" if kind == "llama" else "query"], "rank": 2, "alpha": 4.0}
            model, contents["peft"] = METHODS["lora"].make(model, **options), {"method": "lora", "options": options}
        state = {f"model.{name}": value for name, value in shaken(model).state_dict().items()}
        torch.save({"state_dict": state, MARK: contents}, tmp_path / f"{kind}.ckpt")
    assert not load(str(tmp_path / "llama.ckpt")).model.training
    with pytest.raises(ConfigError, match=r"bert.ckpt.*more than one product"):
        load(str(tmp_path / "bert.ckpt"))
