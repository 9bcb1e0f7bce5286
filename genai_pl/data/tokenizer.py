"""Text to integers and back; every tokenizer is a transformers fast tokenizer, so that it saves and loads like theirs."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from genai_pl.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

END, PAD = "<|endoftext|>", "<|pad|>"


def byte_tokenizer() -> "PreTrainedTokenizerBase":
    """One token per UTF-8 byte, its value being its id, then the two special tokens: 258 in all."""
    from tokenizers import Tokenizer, models

    # the characters by which byte-level vocabularies write bytes: printable ones stand for themselves
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = iter(range(256, 512))
    vocab = {chr(byte if byte in printable else next(hidden)): byte for byte in range(256)}
    return _wrap(Tokenizer(models.BPE(vocab=vocab, merges=[])), use_regex=False)


def train_bpe(texts: Iterable[str], vocab_size: int, *, progress: bool = False) -> "PreTrainedTokenizerBase":
    """Byte-level byte-pair encoding learned from the texts (Sennrich et al. 2016; Radford et al. 2019, 2.2)."""
    from tokenizers import Tokenizer, models, trainers
    from tokenizers.pre_tokenizers import ByteLevel

    if vocab_size < 258:
        raise ConfigError(f"tokenizer.vocab_size={vocab_size} is too small: 256 bytes and 2 special tokens come first")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=progress,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer, use_regex=True)


def pretrained_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a Hugging Face folder or hub id."""
    from transformers import AutoTokenizer

    if not Path(name).exists() and name.count("/") > 1:
        raise ConfigError(f"tokenizer.name={name}: no such folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{name}: no tokenizer could be read from it ({reason})") from None
    if not tokenizer.is_fast:
        raise CheckpointError(f"{name}: its tokenizer has no tokenizer.json; convert it with transformers first")
    return tokenizer


def _wrap(tokenizer: "Tokenizer", *, use_regex: bool) -> "PreTrainedTokenizerBase":
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = ByteLevelDecoder()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """A name for what the tokenizer does, the same in every process."""
    return hashlib.blake2b(tokenizer.backend_tokenizer.to_str().encode(), digest_size=8).hexdigest()


def token_bytes(tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> list[int]:
    """UTF-8 bytes of text that each token stands for, (V,); special and unused tokens stand for none."""
    import json

    kind = json.loads(tokenizer.backend_tokenizer.to_str())
    byte_level = "ByteLevel" in json.dumps(kind["decoder"]) or "ByteLevel" in json.dumps(kind["pre_tokenizer"])
    special = set(tokenizer.all_special_ids)
    counts = [
        0 if i in special else _n_bytes(token or "", byte_level)
        for i, token in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    ]
    return counts + [0] * (vocab_size - len(counts))


def _n_bytes(token: str, byte_level: bool) -> int:
    if byte_level:
        return len(token)  # one character stands for one byte
    if len(token) == 6 and token.startswith("<0x"):
        return 1  # SentencePiece's byte fallback
    return len(token.replace("▁", " ").removeprefix("##").encode())


def files_of(tokenizer: "PreTrainedTokenizerBase") -> dict[str, str]:
    """The text files that `save_pretrained` writes, by name: what a checkpoint carries."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {
            path.name: path.read_text(encoding="utf-8") for path in sorted(Path(folder).iterdir()) if path.is_file()
        }


def from_files(files: dict[str, str]) -> "PreTrainedTokenizerBase":
    """The tokenizer that `files_of` described."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            (Path(folder) / Path(name).name).write_text(text, encoding="utf-8")
        return pretrained_tokenizer(folder)
