"""Tokenizers whose ids are known beforehand, small models, and a model that says what it is told to."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from genai_pl.models import Decoder
from genai_pl.specs import ModelConfig


def bytes_to_unicode() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def byte_level(**special: str) -> PreTrainedTokenizerFast:
    """One token per byte, its id the byte, and the special tokens after them."""
    vocabulary = {char: byte for byte, char in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="session")
def byte_level_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return byte_level


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """The bytes and eos, which is 256."""
    return byte_level(eos_token="<eos>")


@pytest.fixture(scope="session")
def word_tokenizer() -> PreTrainedTokenizerFast:
    """Like SentencePiece's: a word carries its leading space, which is dropped at the start, and bytes fall back."""
    words = [f"▁{word}" for word in ("Hello", "world", "how", "are", "you")] + list("▁abcdefghijklmnopqrstuvwxyz")
    pieces = [("<unk>", 0.0)] + [(f"<0x{b:02X}>", -20.0) for b in range(256)]
    pieces += [(word, -3.0) for word in dict.fromkeys(words)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


class Scripted(nn.Module):
    """Stands in for a Decoder: row i continues with script[i] whatever was read, and then with its last token."""

    def __init__(self, script: list[list[int]], vocab_size: int = 512) -> None:
        super().__init__()
        self.embed = nn.Embedding(1, 1)
        self.config = SimpleNamespace(vocab_size=vocab_size, max_seq_len=100_000)
        self.script, self.n_read = script, 0

    def new_cache(self, batch_size: int, max_length: int) -> SimpleNamespace:
        return SimpleNamespace(length=0, max_length=max_length)

    def features(self, input_ids: Tensor, segment_ids: Tensor | None, *, cache: SimpleNamespace) -> Tensor:
        self.prompt = input_ids if cache.length == 0 else self.prompt
        cache.length += input_ids.shape[1]
        tokens = torch.tensor([row[min(self.n_read, len(row) - 1)] for row in self.script])
        self.n_read += 1
        return nn.functional.one_hot(tokens, self.config.vocab_size)[:, None].float()  # (B, 1, V)

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


@pytest.fixture
def scripted() -> Callable[..., Scripted]:
    def build(*rows: str | bytes | list[int]) -> Scripted:
        return Scripted([list(row.encode() if isinstance(row, str) else row) for row in rows])

    return build


@pytest.fixture
def small_model() -> Callable[..., Decoder]:
    def build(**options: object) -> Decoder:
        torch.manual_seed(0)
        sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 300, "max_seq_len": 64, "init_std": 0.3}
        return Decoder(ModelConfig(**{**sizes, **options})).eval()

    return build
