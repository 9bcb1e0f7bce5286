"""llama.cpp continues texts with the tokens that our model does, from the files that we write, and tokenizes alike."""

from pathlib import Path

import pytest
import torch
from gguf_models import MODELS, write_model
from small_tokenizers import LINES, scored_sentencepiece_bpe

from genai_pl.cli.export_gguf import write_gguf_adapter, write_gguf_folder
from genai_pl.config.generation import GenerationConfig
from genai_pl.data import byte_tokenizer
from genai_pl.data.tokenizer import save_tokenizer
from genai_pl.generation import generate
from genai_pl.loading import load
from genai_pl.peft.lora import LoRALinear, lora

pytest.importorskip("gguf", reason="GGUF files are written by the package gguf")
llama_cpp = pytest.importorskip(
    "llama_cpp", reason="the oracle is llama.cpp, which is compiled: pip install llama-cpp-python"
)
TEXTS = [
    "Hello <|pad|>12 34567  日本 naïve\n\n\tit's é I'LL 🤗 <|endoftext|>a  b \r\n",
    " x=3.14;\n\n\n½ ٣ \u00a0b",
    "",
]


def opened(file: Path) -> "llama_cpp.Llama":
    """llama.cpp's model of a file, with keys and values in float32, as ours has them."""
    return llama_cpp.Llama(str(file), n_ctx=256, n_threads=1, verbose=False, type_k=0, type_v=0)


@pytest.mark.parametrize("kind", MODELS)
def test_llama_cpp_gives_the_same_greedy_tokens_and_tokenization(kind: str, tmp_path: Path):
    write_model(kind, tmp_path / "hf")
    loaded = load(str(tmp_path / "hf"))
    write_gguf_folder(loaded.model, loaded, tmp_path / "gguf", quantize="f32", name=kind)
    theirs = opened(tmp_path / "gguf" / "model.gguf")
    for text in TEXTS:
        assert theirs.tokenize(text.encode(), add_bos=True, special=True) == loaded.tokenizer(text)["input_ids"]
    prompt = loaded.tokenizer(TEXTS[0] * 2)["input_ids"]
    loaded.model.config.eos_token_ids = ()
    n = 64
    options = GenerationConfig(max_new_tokens=n, temperature=0.0)
    ours = generate(loaded.model, torch.tensor([prompt]), config=options)[0, len(prompt) :]
    steps = theirs.generate(prompt, temp=0.0)
    assert [next(steps) for _ in range(n)] == ours.tolist()
    theirs.close()


@pytest.mark.parametrize("make", [byte_tokenizer, scored_sentencepiece_bpe], ids=lambda make: make.__name__)
def test_llama_cpp_tokenizes_bytes_and_scores_alike(make, tmp_path: Path):
    tokenizer = make()
    write_model("llama", tmp_path / "hf", vocab_size=len(tokenizer) + 8)
    save_tokenizer(tokenizer, tmp_path / "hf")
    loaded = load(str(tmp_path / "hf"))
    write_gguf_folder(loaded.model, loaded, tmp_path / "gguf", quantize="f32", name="tokens")
    theirs = opened(tmp_path / "gguf" / "model.gguf")
    for text in [*TEXTS, *LINES, "a<s> b</s>c", "  two  spaces "]:
        # llama.cpp makes nothing of an empty text, this tokenizer a space
        if text:
            assert theirs.tokenize(text.encode(), add_bos=True, special=True) == loaded.tokenizer(text)["input_ids"]
    theirs.close()


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
def test_llama_cpp_adds_an_adapter_to_its_base_as_we_do(kind: str, tmp_path: Path):
    write_model(kind, tmp_path / "hf")
    loaded = load(str(tmp_path / "hf"))
    write_gguf_folder(loaded.model, loaded, tmp_path / "base", quantize="f32", name=kind)
    targets = ["q_proj", "v_proj", "down_proj"]
    model = lora(loaded.model, rank=3, alpha=5.0, target_modules=targets, rslora=True)
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            torch.nn.init.normal_(module.lora_B, std=0.5)
    write_gguf_adapter(model, tmp_path / "adapter", name=kind)
    prompt = loaded.tokenizer(TEXTS[0])["input_ids"]
    file, adapter = (str(tmp_path / name) for name in ("base/model.gguf", "adapter/adapter.gguf"))
    theirs = llama_cpp.Llama(
        file, lora_path=adapter, n_ctx=256, n_threads=1, verbose=False, type_k=0, type_v=0, logits_all=True
    )
    theirs.eval(prompt)
    found = torch.tensor(theirs.scores[: len(prompt)])
    with torch.no_grad():
        ours = model.eval()(torch.tensor([prompt]))[0]
        base = load(file).model(torch.tensor([prompt]))[0]
    assert (ours - base).abs().max() > 1
    torch.testing.assert_close(found, ours, atol=2e-2, rtol=1e-2)
    theirs.close()
