"""Folders as families ship them, from SFT over DPO and GRPO to serving and export: transformers writes the same in the end."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.serving.servers import make_service, serving
from tests.small_tokenizers import TOKENIZERS

spec = find_spec("trl")
TEMPLATES = Path(spec.origin).parent / "chat_templates" if spec else Path("missing")
pytestmark = pytest.mark.skipif(not TEMPLATES.exists(), reason="trl, whose chat templates these are, is not installed")
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
QUESTIONS = {"Two and two?": "Four.", "Capital of France?": "Paris, naïve one."}
TRAIN = ("callbacks.samples.every_n_steps=null", "scheduler.warmup_steps=2", "data.val_fraction=0.2")


def named(kind: str, special: list[str], **names: str) -> PreTrainedTokenizerBase:
    """A tokenizer of a kind with a family's special tokens."""
    tokenizer = TOKENIZERS[kind]()
    tokenizer.add_tokens([AddedToken(token, special=True) for token in special], special_tokens=True)
    tokenizer.add_special_tokens(names)
    return tokenizer


def qwen3() -> tuple[PreTrainedTokenizerBase, PreTrainedModel, list[str]]:
    """Qwen3: two ends, of which the tokenizer knows one; thoughts."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = named("byte_level_bpe", special, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    config = Qwen3Config(vocab_size=len(tokenizer) + 5, tie_word_embeddings=True, **SIZES)
    return tokenizer, Qwen3ForCausalLM(config), ["<|im_end|>", "<|endoftext|>"]


def llama3() -> tuple[PreTrainedTokenizerBase, PreTrainedModel, list[str]]:
    """Llama 3: a token before every text, a turn that ends with another token than a text does."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|end_of_text|>"}
    tokenizer = named("byte_level_bpe", special, **names)
    bos = ("<|begin_of_text|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A $B", special_tokens=[bos]
    )
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=False, rope_theta=500_000.0, **SIZES)
    return tokenizer, LlamaForCausalLM(config), ["<|end_of_text|>", "<|eot_id|>"]


def gemma3() -> tuple[PreTrainedTokenizerBase, PreTrainedModel, list[str]]:
    """Gemma 3: SentencePiece, windows, an end of turns that the tokenizer does not call an end."""
    special = ["<start_of_turn>", "<end_of_turn>"]
    tokenizer = named("sentencepiece_bpe", special)
    options = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}
    config = Gemma3TextConfig(vocab_size=len(tokenizer), query_pre_attn_scalar=16, **options, **SIZES)
    return tokenizer, Gemma3ForCausalLM(config), ["</s>", "<end_of_turn>"]


FAMILIES = {"qwen3": qwen3, "llama3": llama3, "gemma3": gemma3}


def write_folder(name: str, folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer, model, ends = FAMILIES[name]()
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(ends)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def transformers_answer(folder: Path, question: str) -> str:
    """What transformers writes after a question, greedily."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    messages = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**ids, do_sample=False, max_new_tokens=24)
    return tokenizer.decode(tokens[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize(
    "name", ["qwen3", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name != "qwen3")]
)
def test_a_folder_goes_through_every_stage(name: str, command, tmp_path: Path) -> None:
    write_folder(name, tmp_path / "folder")
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS] * 10
    answers = [[{"role": "assistant", "content": text}] for text in QUESTIONS.values()] * 10
    write_rows(tmp_path / "chat.jsonl", [{"messages": q + a} for q, a in zip(conversations, answers, strict=True)])
    wrong = [{"role": "assistant", "content": "No."}]
    pairs = [{"prompt": q, "chosen": a, "rejected": wrong} for q, a in zip(conversations, answers, strict=True)]
    write_rows(tmp_path / "pairs.jsonl", pairs)
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": q} for q in conversations])
    (tmp_path / "judge.py").write_text(
        "def short(prompts, completions, **columns):\n    return [-len(c) for c in completions]\n"
    )

    def train(run: str, *options: str) -> None:
        result = command("train", *options, *TRAIN, f"hydra.run.dir={run}")
        assert result.status == 0, result.err

    train(
        "sft", "objective=sft", "init_from=folder", "data.path=chat.jsonl", "trainer.max_steps=60", "optimizer.lr=5e-3"
    )
    train("dpo", "objective=dpo", "init_from=sft", "data.path=pairs.jsonl", "trainer.max_steps=3", "optimizer.lr=1e-5")
    train(
        "grpo", "objective=grpo", "init_from=dpo", "data.path=prompts.jsonl", "trainer.max_steps=2", "optimizer.lr=1e-6",
        "objective.reward=judge:short", "objective.max_new_tokens=24", "objective.group_size=4", "data.batch_size=4",
    )  # fmt: skip
    result = command("export", "checkpoint=grpo", "format=hf", "out=out")
    assert result.status == 0, result.err

    ends = json.loads((tmp_path / "folder/generation_config.json").read_text())["eos_token_id"]
    assert set(json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"]) == set(ends)
    with serving(make_service(tmp_path / "grpo")) as client:
        for question, text in QUESTIONS.items():
            body = {"messages": [{"role": "user", "content": question}], "max_tokens": 24, "temperature": 0}
            choice = client.post("/v1/chat/completions", json=body).json()["choices"][0]
            answer = choice["message"]["content"]  # without its empty thoughts, which transformers leaves in
            assert answer == text
            assert choice["finish_reason"] == "stop"
            assert transformers_answer(tmp_path / "out", question) in (text, f"<think>\n\n</think>\n\n{text}")
