"""Tokenizers: built, trained, loaded and saved; each is a transformers fast tokenizer, so its files load anywhere.

Three kinds: bytes (258 tokens, needs no training), byte-pair encoding learned from the training text, and pretrained
ones. tokenizer.json alone defines what a tokenizer does. `save_tokenizer` therefore writes the plain class
PreTrainedTokenizerFast and spells out what other classes would have as defaults: a class such as LlamaTokenizer builds
parts of its own beside the file, and differently in every version of transformers.
"""

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from genai_pl.atomic_io import naming
from genai_pl.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

END, PAD, MASK = "<|endoftext|>", "<|pad|>", "<|mask|>"
SENTINELS = tuple(f"<extra_id_{n}>" for n in range(100))  # as T5 names them
FIM = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")  # as Qwen2.5 names them

# keys of one call, of one machine, or of a class that is not written: no properties of the tokenizer
TRANSIENT_KEYS = {
    *("max_length", "stride", "truncation_strategy", "pad_to_multiple_of", "padding", "truncation"),
    *("is_local", "local_files_only", "mistral_format", "backend"),
    *("auto_map", "add_bos_token", "add_eos_token"),
}


def byte_tokenizer() -> "PreTrainedTokenizerBase":
    """One token per UTF-8 byte, whose id is the byte, and two special tokens: 258 in all.

    >>> byte_tokenizer()("hi")["input_ids"]
    [104, 105]
    """
    from tokenizers import Tokenizer, models

    # byte-level vocabularies spell bytes as characters: printable bytes as themselves, the others from 256 on
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = iter(range(256, 512))
    vocab = {chr(byte if byte in printable else next(hidden)): byte for byte in range(256)}
    return _wrap(Tokenizer(models.BPE(vocab=vocab, merges=[])), use_regex=False)


def train_bpe(texts: Iterable[str], vocab_size: int, *, progress: bool = False) -> "PreTrainedTokenizerBase":
    """Byte-level byte-pair encoding of vocab_size tokens, learned from texts (Sennrich et al. 2016; Radford et al. 2019, 2.2)."""
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


def _wrap(tokenizer: "Tokenizer", *, use_regex: bool) -> "PreTrainedTokenizerBase":
    """The transformers tokenizer around a byte-level model; use_regex splits words before merging, as GPT-2 does."""
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


def add_missing_tokens(tokenizer: "PreTrainedTokenizerBase", needs: Iterable[str]) -> None:
    """Add the special tokens of each of `needs` (mask, sentinels, fim) that the tokenizer lacks."""
    names = {"sentinels": SENTINELS, "fim": FIM}
    for kind in needs:
        if kind == "mask" and tokenizer.mask_token is None:
            tokenizer.add_special_tokens({"mask_token": MASK})
        elif kind in names:
            vocab = tokenizer.get_vocab()
            missing = [name for name in names[kind] if name not in vocab]
            tokenizer.add_tokens(missing, special_tokens=True)


def end_token(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The id of the token that closes a document: eos, or BERT's separator; None without either."""
    return tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id


def without_truncation(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """The same tokenizer with truncation and padding switched off: a call with either leaves it on."""
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """A hash of everything that affects tokens of texts and conversations, equal in every process: part of cache names."""
    kinds = sorted(tokenizer.special_tokens_map.items())
    state = f"{tokenizer.split_special_tokens}{kinds}{tokenizer.chat_template}"
    return hashlib.blake2b((_serialized(tokenizer) + state).encode(), digest_size=8).hexdigest()


def _serialized(tokenizer: "PreTrainedTokenizerBase") -> str:
    """tokenizer.json as it is after one round of saving and loading.

    `tokenizers` reads some scores of Unigram tokens with another last digit than it writes, so those are normalized first.
    """
    from tokenizers import Tokenizer

    state = without_truncation(tokenizer).backend_tokenizer.to_str()
    scored = type(tokenizer.backend_tokenizer.model).__name__ == "Unigram"
    return Tokenizer.from_str(state).to_str() if scored else state


def pretrained_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a Hugging Face folder or hub id, without limits on lengths.

    CheckpointError for a folder without a usable fast tokenizer, and for values in its files that could not be saved again.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not Path(name).exists() and name.count("/") > 1:
        raise ConfigError(f"tokenizer.name={name}: no such folder")
    # it warns of unknown model types, such as ours, which does not concern the tokenizer
    logging.getLogger("transformers.configuration_utils").setLevel(logging.ERROR)
    try:
        # read tokenizer.json, which is saved again, even where a file of mistral-common is beside it
        tokenizer = AutoTokenizer.from_pretrained(name, mistral_format=False, trust_remote_code=False)
        if not isinstance(tokenizer, PreTrainedTokenizerFast) and (Path(name) / "tokenizer.json").is_file():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(name)
    except Exception as error:  # exceptions of tokenizers have no common base class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{name}: no tokenizer could be read from it ({reason})") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise CheckpointError(f"{name}: its tokenizer has no tokenizer.json; convert it with transformers first")
    try:
        json.dumps(tokenizer.init_kwargs, default=str, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise CheckpointError(
            f"{name}: its tokenizer_config.json holds half of a surrogate pair, which is no text"
        ) from None
    # values that could not be saved again are refused now, not at the first checkpoint
    if not isinstance(tokenizer.model_max_length, int | float):
        raise CheckpointError(
            f"{name}: its tokenizer's model_max_length is {tokenizer.model_max_length!r:.40}, no number"
        )
    templates = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    for template in templates:
        if PurePosixPath(template).name != template:
            raise CheckpointError(f"{name}: a chat template is called {template!r}, which is no name of a file")
    return without_truncation(tokenizer)


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Write the tokenizer's files into a folder, such that any version of transformers reads tokenizer.json as it is.

    The class is the one that adds nothing of its own; defaults of other classes are written out.
    """
    with naming(folder):
        without_truncation(tokenizer).save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    saved = json.loads(file.read_text(encoding="utf-8"))
    # drop what belongs to one call or class, and write defaults out
    values = {name: value for name, value in saved.items() if name not in TRANSIENT_KEYS}
    values |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": list(tokenizer.model_input_names),
        "padding_side": tokenizer.padding_side,
        "truncation_side": tokenizer.truncation_side,
        "clean_up_tokenization_spaces": tokenizer.clean_up_tokenization_spaces,
    }
    # keys that versions of transformers spell or use differently
    extra = values.pop("extra_special_tokens", None)
    if extra:  # the older name of the key, which all versions read
        values["additional_special_tokens"] = extra
    before = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
    if "add_prefix_space" in before:  # transformers 4 overrides tokenizer.json with this key
        values["add_prefix_space"] = before["add_prefix_space"]
    file.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def reloads_unchanged(tokenizer: "PreTrainedTokenizerBase", model_type: str) -> bool:
    """Whether AutoTokenizer gives this same tokenizer beside a config.json of that model type.

    For some types (Qwen2) it builds another pre-tokenizer than tokenizer.json has; an export then needs another type.
    """
    with tempfile.TemporaryDirectory() as name:
        save_tokenizer(tokenizer, Path(name))
        (Path(name) / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
        reloaded = pretrained_tokenizer(name)
    return _serialized(reloaded) == _serialized(tokenizer)


def tokenizer_files(tokenizer: "PreTrainedTokenizerBase") -> dict[str, str]:
    """The text files that `save_tokenizer` writes, by their path in the folder: the tokenizer of a checkpoint."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_tokenizer(tokenizer, folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in files}


def tokenizer_from_files(files: Mapping[str, str]) -> "PreTrainedTokenizerBase":
    """The tokenizer of those files; CheckpointError for a path that leads out of its folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path, text in files.items():
            parts = PurePosixPath(path).parts
            if ".." in parts or PurePosixPath(path).is_absolute():
                raise CheckpointError(f"the checkpoint's tokenizer has a file {path!r}, which lies elsewhere")
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")
        return pretrained_tokenizer(name)
