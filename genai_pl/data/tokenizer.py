"""Text to integers and back; every tokenizer is a transformers fast tokenizer, so that it saves and loads like theirs."""

import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from genai_pl.errors import CheckpointError, ConfigError
from genai_pl.objectives.vocabulary import Vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

END, PAD, MASK = "<|endoftext|>", "<|pad|>", "<|mask|>"
SENTINELS = tuple(f"<extra_id_{n}>" for n in range(100))  # as T5 names them
FIM = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")  # as Qwen2.5 names them


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
    # it warns of models that it does not know, such as ours, which says nothing of their tokenizers
    logging.getLogger("transformers.configuration_utils").setLevel(logging.ERROR)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
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


def add_missing(tokenizer: "PreTrainedTokenizerBase", needs: Iterable[str]) -> None:
    """Give the tokenizer the tokens of these kinds (mask, sentinels, fim) that it lacks."""
    names = {"sentinels": SENTINELS, "fim": FIM}
    for kind in needs:
        if kind == "mask" and tokenizer.mask_token is None:
            tokenizer.add_special_tokens({"mask_token": MASK})
        elif kind in names:
            vocab = tokenizer.get_vocab()
            missing = [name for name in names[kind] if name not in vocab]
            tokenizer.add_tokens(missing, special_tokens=True)


def vocabulary(tokenizer: "PreTrainedTokenizerBase", size: int) -> Vocabulary:
    """What objectives must know of a tokenizer whose model has `size` ids."""
    vocab = tokenizer.get_vocab()
    wordpiece = type(tokenizer.backend_tokenizer.model).__name__ == "WordPiece"
    special = np.ones(size, bool)  # ids beyond the tokenizer's are no text
    starts_word = np.zeros(size, bool)
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    for token, i in vocab.items():
        special[i] = i in added
        starts_word[i] = _starts_word(token, wordpiece=wordpiece)
    return Vocabulary(
        size=size,
        pad=tokenizer.pad_token_id or 0,
        end=end_token(tokenizer),
        mask=tokenizer.mask_token_id,
        sentinels=tuple(vocab[name] for name in SENTINELS if name in vocab),
        fim=tuple(vocab[name] for name in FIM) if all(name in vocab for name in FIM) else None,
        special=special,
        starts_word=starts_word,
        n_bytes=np.asarray(token_bytes(tokenizer, size)),
    )


def end_token(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The token that closes a document: BERT's is its separator."""
    return tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id


def _starts_word(token: str, *, wordpiece: bool) -> bool:
    """Whether a word begins with the token: WordPiece marks the others, the rest a space (Ġ, ▁) or a line break (Ċ)."""
    if wordpiece:
        return not token.startswith("##")
    return token[:1] in ("Ġ", "▁", "Ċ") or not token[:1].isalnum()


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
