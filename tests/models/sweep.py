"""Changed folders, read by transformers and by us: equal numbers, a refusal of one line, or a fault."""

import json
import logging
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from safetensors.torch import load_file, save_file
from test_against_transformers import shaken
from torch import Tensor, nn
from transformers import AutoConfig

from genai_pl.config.enums import Head
from genai_pl.errors import CheckpointError, ConfigError
from genai_pl.models import load_pretrained
from genai_pl.models.hf.transformers_model import load_wrapped

REMOVED = object()
LENGTH = 17
COMMON = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40, "vocab_size": 61,
    "max_position_embeddings": 24,
}  # fmt: skip
LLAMA = {**COMMON, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
T5 = {
    "d_model": 32, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4, "d_kv": 6, "d_ff": 40, "vocab_size": 61,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "decoder_start_token_id": 0,
}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24, "vocab_size": 61}
XLNET = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 40, "vocab_size": 61}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 500.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16, "rope_theta": 500.0,
}  # fmt: skip
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MODERNBERT = {
    **COMMON, "local_attention": 6, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1,
    "sep_token_id": 2,
}  # fmt: skip
MODELS = {  # name: class, model_type, values
    "gpt2": ("GPT2LMHeadModel", "gpt2", GPT2),
    "gpt2_untied": ("GPT2LMHeadModel", "gpt2", {**GPT2, "tie_word_embeddings": False}),
    "gpt2_headless": ("GPT2Model", "gpt2", {**GPT2, "tie_word_embeddings": False}),
    "gpt2_score": ("GPT2ForSequenceClassification", "gpt2", {**GPT2, "num_labels": 1, "pad_token_id": 0}),
    "llama": ("LlamaForCausalLM", "llama", LLAMA),
    "llama_tied": ("LlamaForCausalLM", "llama", {**LLAMA, "tie_word_embeddings": True}),
    "llama_3": ("LlamaForCausalLM", "llama", {**LLAMA, "rope_parameters": LLAMA3}),
    "llama_headless": ("LlamaModel", "llama", LLAMA),
    "llama_score": ("LlamaForSequenceClassification", "llama", {**LLAMA, "num_labels": 1}),
    "mistral": ("MistralForCausalLM", "mistral", {**LLAMA, "sliding_window": 5}),
    "mistral_score": ("MistralForSequenceClassification", "mistral", {**LLAMA, "sliding_window": 5, "num_labels": 1}),
    "qwen2": ("Qwen2ForCausalLM", "qwen2", {**LLAMA, "head_dim": 8}),
    "qwen2_score": ("Qwen2ForSequenceClassification", "qwen2", {**LLAMA, "head_dim": 8, "num_labels": 1}),
    "qwen3": ("Qwen3ForCausalLM", "qwen3", {**LLAMA, "tie_word_embeddings": True}),
    "qwen3_yarn": ("Qwen3ForCausalLM", "qwen3", {**LLAMA, "rope_parameters": YARN}),
    "qwen3_score": ("Qwen3ForSequenceClassification", "qwen3", {**LLAMA, "num_labels": 1}),
    "gemma3": (
        "Gemma3ForCausalLM", "gemma3_text",
        {**LLAMA, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gemma3_score": ("Gemma3TextForSequenceClassification", "gemma3_text", {**LLAMA, "num_labels": 1}),
    "mixtral": ("MixtralForCausalLM", "mixtral", {**LLAMA, "num_local_experts": 3, "sliding_window": 5}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "qwen3_moe", {**LLAMA, **EXPERTS, "decoder_sparse_step": 2}),
    "olmoe": ("OlmoeForCausalLM", "olmoe", {**LLAMA, **EXPERTS, "head_dim": 8}),
    "dots1": (
        "Dots1ForCausalLM", "dots1",
        {**LLAMA, "head_dim": 8, "n_routed_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
         "first_k_dense_replace": 1, "n_shared_experts": 1},
    ),
    "gpt_oss": (
        "GptOssForCausalLM", "gpt_oss", {**LLAMA, "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 5}
    ),
    "gpt_oss_score": ("GptOssForSequenceClassification", "gpt_oss", {**LLAMA, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "bert": ("BertForMaskedLM", "bert", COMMON),
    "bert_untied": ("BertForMaskedLM", "bert", {**COMMON, "tie_word_embeddings": False}),
    "bert_pretraining": ("BertForPreTraining", "bert", COMMON),
    "bert_headless": ("BertModel", "bert", COMMON),
    "roberta": ("RobertaForMaskedLM", "roberta", COMMON),
    "roberta_headless": ("RobertaModel", "roberta", COMMON),
    "albert": ("AlbertForMaskedLM", "albert", {**COMMON, "embedding_size": 16}),
    "albert_headless": ("AlbertModel", "albert", {**COMMON, "embedding_size": 16}),
    "modernbert": ("ModernBertForMaskedLM", "modernbert", MODERNBERT),
    "modernbert_untied": ("ModernBertForMaskedLM", "modernbert", {**MODERNBERT, "tie_word_embeddings": False}),
    "modernbert_headless": ("ModernBertModel", "modernbert", MODERNBERT),
    "t5": ("T5ForConditionalGeneration", "t5", T5),
    "flan_t5": (
        "T5ForConditionalGeneration", "t5", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    ),
    "xlnet": ("XLNetLMHeadModel", "xlnet", XLNET),
    "xlnet_untied": ("XLNetLMHeadModel", "xlnet", {**XLNET, "tie_word_embeddings": False}),
    "xlnet_headless": ("XLNetModel", "xlnet", XLNET),
}  # fmt: skip
# further plausible values of keys, beside what is tried of every key by its kind
VALUES = {
    "hidden_act": ["relu", "silu", "gelu_new", "tanh"],
    "hidden_activation": ["gelu", "silu"], "classifier_activation": ["silu"], "classifier_pooling": ["mean", "max"],
    "local_attention": [4, 7, 100],
    "activation_function": ["relu", "gelu", "quick_gelu"],
    "ff_activation": ["relu", "gelu_new"],
    "feed_forward_proj": ["gelu", "gated-silu", "gated-relu", "silu", "gated-gelu-x"],
    "attn_type": ["uni"],
    "rope_parameters": [
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}, LLAMA3, YARN, {**YARN, "attention_factor": 0.7},
        {**YARN, "truncate": False}, {**YARN, "mscale": 0.7, "mscale_all_dim": 0.9}, {"rope_type": "dynamic", "factor": 2.0},
        {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"},
        {k: v for k, v in YARN.items() if k != "original_max_position_embeddings"},
        {k: v for k, v in LLAMA3.items() if k != "low_freq_factor"}, {"rope_type": "yarn"},
        {"rope_theta": 77.0}, {"rope_type": "default"}, {"type": "linear", "factor": 3.0}, {},
        {"rope_theta": 500.0, "rope_type": "default", "partial_rotary_factor": 0.5},
        {"full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 90.0}},
        {"full_attention": {"rope_theta": 90.0}, "sliding_attention": {"rope_theta": 33.0}},
        {"sliding_attention": {"rope_type": "linear", "factor": 2.0}},
        {"rope_theta": None, "rope_type": "default"}, {**LLAMA3, "low_freq_factor": 8.0},
    ],
    "layer_types": [
        ["full_attention"] * 2, ["sliding_attention"] * 2, ["full_attention", "sliding_attention"],
        ["sliding_attention", "full_attention"], ["full_attention"],
    ],
    "problem_type": ["regression"], "id2label": [{"0": "good"}, {"0": "a", "1": "b"}], "num_labels": [1, 3],
    "dtype": ["bfloat16", "float16"], "torch_dtype": ["float16"],
    "scale_decoder_outputs": [True, False],
    "architectures": [["Strange"], ["Strange", "Stranger"]],
    "sliding_window": [3, 5, 100], "sliding_window_pattern": [1, 2], "_sliding_window_pattern": [2],
    "mlp_only_layers": [[0], [1], [0, 1]], "decoder_sparse_step": [1, 2], "num_experts_per_tok": [1, 2],
    "num_local_experts": [2, 3], "swiglu_limit": [0.2], "swiglu_alpha": [0.7], "n_shared_experts": [2, 0],
    "first_k_dense_replace": [0, 2], "n_group": [1, 3], "topk_group": [1, 2], "moe_intermediate_size": [12],
    "pad_token_id": [1, 3], "decoder_start_token_id": [5], "d_head": [8, 4], "n_inner": [40], "n_ctx": [12],
}  # fmt: skip
ADDED = {  # keys that no folder of transformers 5 has, or not all
    "rope_theta": [500.0, None], "rope_scaling": [{"type": "linear", "factor": 4.0}, YARN, {"rope_type": "default"}],
    "rope_local_base_freq": [50.0], "partial_rotary_factor": [0.5, 1.0], "original_max_position_embeddings": [64],
    "is_causal": [False, True, None, 0], "is_decoder": [True, False], "add_cross_attention": [True],
    "is_encoder_decoder": [True, False], "use_sliding_window": [True], "max_window_layers": [0, 1],
    "attention_bias": [True], "mlp_bias": [True], "use_bidirectional_attention": [True], "head_dim": [8, 16],
    "tie_word_embeddings": [True, False, None, "yes", 1], "position_embedding_type": ["absolute", "relative_key"],
    "torch_dtype": ["float16"], "_name_or_path": ["x"], "transformers_version": ["4.1.0"], "attn_implementation": ["sdpa"],
    "_attn_implementation": ["eager"], "chunk_size_feed_forward": [4], "per_layer_config": [{"0": {"head_dim": 8}}],
    "quantization_config": [{"quant_method": "fp8"}], "tie_encoder_decoder": [True], "n_ctx": [12], "n_inner": [40],
    "num_hidden_layers": [1, 2, 3], "num_attention_heads": [2, 4], "hidden_size": [32, 16], "n_token": [61, 50],
    "max_position_embeddings": [24, 12], "num_labels": [1, 2], "id2label": [{"0": "good"}], "untie_r": [True, False],
    "output_hidden_states": [True], "return_dict": [True], "pruned_heads": [{"0": [1]}], "sliding_window": [4],
    "sliding_window_pattern": [2], "_sliding_window_pattern": [2], "layer_types": [["full_attention"] * 2],
    "decoder_start_token_id": [7], "scale_decoder_outputs": [True, False], "reorder_and_upcast_attn": [True],
    "no_key_of_anybody": [1, {"a": [1]}], "auto_map": [{"AutoModel": "x.Y"}], "architectures": [["Strange"]],
    "forced_eos_token_id": [3], "task_specific_params": [{"x": 1}], "max_length": [20], "temperature": [0.3],
    "clip_qkv": [0.1], "no_rope_layers": [[1, 0]], "no_rope_layer_interval": [2], "logits_scaling": [3.0], "logit_scale": [0.5],
    "attention_multiplier": [0.3], "residual_multiplier": [0.5], "embedding_multiplier": [2.0], "use_qk_norm": [True],
    "norm_topk_prob": [True, False], "routed_scaling_factor": [2.5], "num_experts": [3], "scoring_func": ["sigmoid"],
    "global_attn_every_n_layers": [1, 2, 5, 0], "global_rope_theta": [50.0, None], "local_rope_theta": [50.0, None],
    "alibi": [True], "parallel_attn": [True], "query_pre_attn_scalar": [24], "final_logit_softcapping": [5.0],
}  # fmt: skip
ABSURD = [10**12, -1, 0, 2.5, "2", True, None, [], {}, 1e400]


class Case(NamedTuple):
    """One change of a folder: of keys of config.json, or of tensors."""

    name: str
    keys: dict[str, object] = {}
    tensors: dict[str, object] = {}


class Verdict(NamedTuple):
    """equal, refused, wrong, or what transformers itself cannot read: strange where we can, and broken where none can."""

    kind: str
    why: str = ""


def quiet() -> None:
    """Silence: transformers warns of most of these changes."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def make(name: str, folder: Path) -> None:
    """Write the model as transformers does."""
    cls, kind, values = MODELS[name]
    model = shaken(getattr(transformers, cls)(AutoConfig.for_model(kind, **values)))
    model.save_pretrained(folder)


def key_cases(name: str, folder: Path) -> Iterator[Case]:
    """Each key that transformers knows: removed, changed, absurd; and keys that the file lacks."""
    _, kind, _ = MODELS[name]
    config = json.loads((folder / "config.json").read_text())
    known = {*config, *AutoConfig.for_model(kind).to_dict()} - {"model_type"}
    for key in sorted(known):
        yield Case(f"{key} gone", {key: REMOVED})
        tried = [*VALUES.get(key, ()), *_others(config.get(key))]
        for value in tried + [absurd for absurd in ABSURD if absurd not in tried]:
            yield Case(f"{key}={value!r}", {key: value})
    for key, values in ADDED.items():
        for value in values:
            yield Case(f"{key}:={value!r}", {key: value})


def _others(value: object) -> list[object]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value * 2, max(value - 1, 0)]
    if isinstance(value, float):
        return [value * 2, value + 0.5]
    return []


def tensor_cases(folder: Path) -> Iterator[Case]:
    """Each tensor removed, and of another size; tensors that are tied elsewhere, or that no model reads."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        yield Case(f"{name} gone", tensors={name: REMOVED})
        yield Case(f"{name} longer", tensors={name: torch.cat([tensor, tensor[:1]])})
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    embedding = next(name for name in shapes if name.endswith(EMBEDDINGS))
    width = shapes[embedding]
    generator = torch.Generator().manual_seed(3)
    for tie in (True, False, REMOVED):
        keys = {"tie_word_embeddings": tie}
        for name in TIED:
            size = width if name.endswith("weight") else width[:1]
            drawn = torch.randn(size, generator=generator) * 0.2
            yield Case(f"{name} drawn, {keys}", keys, {name: drawn})
            yield Case(f"{name} gone, {keys}", keys, {name: REMOVED})
            source = embedding if name.endswith("weight") else next((b for b in BIASES if b in tensors), None)
            if source:
                yield Case(f"{name} equal, {keys}", keys, {name: tensors[source].clone()})
                yield Case(f"{name} instead, {keys}", keys, {name: tensors[source].clone(), source: REMOVED})
    for name in (*EXTRA, *(n.replace("weight", "bias") for n in list(tensors)[:12])):
        if name not in tensors:
            yield Case(f"{name} added", tensors={name: torch.randn(32, generator=generator)})


EMBEDDINGS = (
    "wte.weight",
    "embed_tokens.weight",
    "word_embeddings.weight",
    "shared.weight",
    "word_embedding.weight",
    "tok_embeddings.weight",
)
BIASES = ("decoder.bias", "cls.predictions.bias", "lm_head.bias", "predictions.bias")
TIED = (
    "lm_head.weight", "lm_loss.weight", "cls.predictions.decoder.weight", "lm_head.decoder.weight",
    "predictions.decoder.weight", "cls.predictions.decoder.bias", "lm_head.decoder.bias", "predictions.decoder.bias",
    "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "decoder.weight", "decoder.bias",
)  # fmt: skip
EXTRA = (
    "bert.pooler.dense.bias", "roberta.pooler.dense.bias", "albert.pooler.bias", "pooler.dense.bias", "a.b.c.weight",
    "model.layers.7.input_layernorm.weight", "transformer.h.0.attn.bias", "score.bias", "lm_head.bias",
)  # fmt: skip


def changed(folder: Path, case: Case, into: Path) -> Path:
    """A copy of the folder with the change in it."""
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir(parents=True)
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in {**config, **case.keys}.items() if value is not REMOVED}
    (into / "config.json").write_text(json.dumps(config))
    if case.tensors:
        tensors = {**load_file(folder / "model.safetensors"), **case.tensors}
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not REMOVED}
        save_file(kept, into / "model.safetensors", metadata={"format": "pt"})
    else:
        (into / "model.safetensors").symlink_to(folder / "model.safetensors")
    return into


@torch.no_grad()
def judge(name: str, folder: Path) -> Verdict:
    """Read the folder by both, and compare."""
    cls = MODELS[name][0]
    try:
        ours = load_pretrained(folder)
    except CheckpointError as error:
        line = str(error)
        return Verdict("refused", line) if "\n" not in line else Verdict("wrong", f"more than a line: {line}")
    except Exception as error:
        return Verdict("wrong", f"{type(error).__name__}: {error}")
    if (ours.config.head is Head.none and not cls.endswith("Model")) or (
        cls == "GPT2LMHeadModel" and ours.lm_head is None
    ):
        cls = BASES[MODELS[name][1]]
    try:
        theirs = _theirs(cls, folder)
        ids = torch.randint(3, min(61, ours.config.vocab_size), (1, LENGTH), generator=torch.Generator().manual_seed(1))
        expected = _numbers_of_theirs(theirs, ids)
    except Exception as error:
        return Verdict("strange", f"{type(error).__name__}: {str(error).splitlines()[0]}")
    try:
        actual = _numbers_of_ours(ours, ids, expected)
    except Exception as error:
        return Verdict("wrong", f"{type(error).__name__}: {error}")
    if actual.shape == expected.shape and torch.allclose(actual, expected, rtol=1e-4, atol=1e-4):
        return Verdict("equal")
    return Verdict("wrong", f"{list(actual.shape)} and {list(expected.shape)} differ")


@torch.no_grad()
def judge_wrapped(name: str, folder: Path) -> Verdict:
    """Read the folder as model=hf does, and compare a row, and two documents of one, with transformers on each alone."""
    try:
        ours = load_wrapped(str(folder))
    except (CheckpointError, ConfigError) as error:
        return Verdict("refused" if "\n" not in str(error) else "wrong", str(error))
    except Exception as error:
        return Verdict("wrong", f"{type(error).__name__}: {error}")
    V = ours.config.vocab_size
    ids = torch.randint(3, min(61, V), (1, LENGTH), generator=torch.Generator().manual_seed(1))
    parts = ids.split([LENGTH - 7, 7], dim=1)
    try:
        theirs = _theirs(MODELS[name][0], folder)
        expected = [theirs(part).logits for part in (ids, *parts)]
    except Exception as error:
        return Verdict("strange", f"{type(error).__name__}: {str(error).splitlines()[0]}")
    try:
        segments = torch.tensor([[1] * (LENGTH - 7) + [2] * 7])
        actual = [ours(ids), *ours(ids, segments).split([LENGTH - 7, 7], dim=1)]
    except ConfigError as error:
        return Verdict("refused", str(error))
    except Exception as error:
        return Verdict("wrong", f"{type(error).__name__}: {error}")
    # up to a constant for each token, which no softmax sees
    pairs = [[x - x.mean(-1, keepdim=True) for x in pair] for pair in zip(actual, expected, strict=True)]
    is_equal = all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in pairs)
    return Verdict("equal") if is_equal else Verdict("wrong", "logits differ")


BASES = {
    "gpt2": "GPT2Model", "llama": "LlamaModel", "mistral": "MistralModel", "qwen2": "Qwen2Model", "qwen3": "Qwen3Model",
    "gemma3_text": "Gemma3TextModel", "mixtral": "MixtralModel", "qwen3_moe": "Qwen3MoeModel", "olmoe": "OlmoeModel",
    "dots1": "Dots1Model", "gpt_oss": "GptOssModel", "bert": "BertModel", "roberta": "RobertaModel", "albert": "AlbertModel",
    "xlnet": "XLNetModel", "modernbert": "ModernBertModel",
}  # fmt: skip


def _theirs(cls: str, folder: Path) -> nn.Module:
    options = {} if cls.startswith("XLNet") else {"attn_implementation": "eager"}
    if "layer_types" in json.loads((folder / "config.json").read_text()):  # as AutoConfig takes it
        cls = re.sub("^Mistral", "Ministral", cls)
    model, info = getattr(transformers, cls).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **options
    )
    drawn = [key for key in info["missing_keys"] if "pooler" not in key and "seq_relationship" not in key]
    if drawn:
        raise ValueError(f"draws {drawn}")
    return model.eval()


def _numbers_of_theirs(model: nn.Module, ids: Tensor) -> Tensor:
    extra_inputs = {"decoder_input_ids": ids[:, :9].flip(1)} if model.config.model_type == "t5" else {}
    outputs = model(ids, return_dict=True, **extra_inputs)
    for kind in ("logits", "prediction_logits", "last_hidden_state"):
        if kind in outputs:
            return outputs[kind]
    raise ValueError("says nothing")


def _numbers_of_ours(model: nn.Module, ids: Tensor, expected: Tensor) -> Tensor:
    if model.config.head is Head.score:
        return model.score(model.features(ids)[:, -1])
    extra_inputs = {"decoder_input_ids": ids[:, :9].flip(1)} if hasattr(model, "decoder") else {}
    hidden = model.features(ids, **extra_inputs)
    return hidden if expected.shape[-1] == model.config.n_embd else model.logits(hidden)
