"""Tokenizers with known ids, small models, and a model that follows a script."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from genai_pl.config.enums import Shape
from genai_pl.config.model import ModelConfig
from genai_pl.models import Decoder, EncoderDecoder, load_pretrained


def bytes_to_unicode() -> dict[int, str]:
    """The printable character of each byte in a byte-level vocabulary (GPT-2's encoder.py)."""
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
    """Bytes, and eos with id 256."""
    return byte_level(eos_token="<eos>")


@pytest.fixture(scope="session")
def word_tokenizer() -> PreTrainedTokenizerFast:
    """Like SentencePiece: words carry their leading space, which is dropped at the start; other text becomes bytes."""
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
    """Stub of a Decoder: row i continues with script[i] whatever its prompt is, and then repeats its last token."""

    def __init__(self, script: list[list[int]], vocab_size: int = 512) -> None:
        super().__init__()
        self.embed = nn.Embedding(1, 1)
        self.config = SimpleNamespace(vocab_size=vocab_size, max_seq_len=100_000, shape=Shape.decoder, eos_token_ids=())
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


def gpt2() -> transformers.PreTrainedModel:
    config = transformers.GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=100, n_positions=64)
    config.initializer_range, config.eos_token_id, config.bos_token_id = 0.4, None, None
    return transformers.GPT2LMHeadModel(config)


def llama() -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=32, intermediate_size=64
    )
    config.vocab_size, config.max_position_embeddings, config.initializer_range = 100, 64, 0.4
    config.eos_token_id, config.bos_token_id = None, None
    return transformers.LlamaForCausalLM(config)


@pytest.fixture(scope="module", params=[gpt2, llama])
def pair(request, tmp_path_factory) -> tuple[transformers.PreTrainedModel, Decoder]:
    """A random model of transformers and a genai_pl model with its weights."""
    torch.manual_seed(0)
    theirs = request.param().eval()
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    return theirs, load_pretrained(folder)


def t5() -> transformers.PreTrainedModel:
    config = transformers.T5Config(num_layers=2, num_heads=4, d_model=32, d_kv=8, d_ff=64, vocab_size=100)
    config.eos_token_id, config.pad_token_id, config.decoder_start_token_id = 1, 0, 0
    config.relative_attention_num_buckets, config.relative_attention_max_distance = 8, 20
    model = transformers.T5ForConditionalGeneration(config)
    for parameter in model.parameters():  # its own first weights say one token for ever
        parameter.data.normal_(std=0.4)
    return model


@pytest.fixture(scope="module")
def t5_pair(tmp_path_factory) -> tuple[transformers.PreTrainedModel, EncoderDecoder]:
    """A random T5 of transformers and a genai_pl model with its weights."""
    torch.manual_seed(0)
    theirs = t5().eval()
    folder = tmp_path_factory.mktemp("t5")
    theirs.save_pretrained(folder)
    return theirs, load_pretrained(folder)


def chance(tokens: Tensor, probabilities: Tensor) -> float:
    """Pearson's chi-square test: how likely a worse fit than that of the tokens (N,) to the probabilities (V,) is."""
    n, expected = len(tokens), len(tokens) * probabilities.double()
    counts = tokens.bincount(minlength=len(probabilities)).double()
    assert counts[probabilities == 0].sum() == 0
    rare = expected < 5  # counted together
    groups = [torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts, expected)]
    seen, expected_counts = (x[groups[1] > 0] for x in groups)
    assert expected_counts.sum() == pytest.approx(n, rel=1e-4)
    statistic = ((seen - expected_counts) ** 2 / expected_counts).sum()
    freedom = torch.tensor((len(expected_counts) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(freedom, statistic / 2).item()


@pytest.fixture(scope="session")
def chance_of_a_worse_fit() -> Callable[[Tensor, Tensor], float]:
    return chance
