"""Text to integers and back; every tokenizer is a transformers fast tokenizer, so that it saves and loads like theirs."""

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

# of one call, of one place, or of a class that is not written: nothing that belongs to the tokenizer
TRANSIENT_KEYS = {
    *("max_length", "stride", "truncation_strategy", "pad_to_multiple_of", "padding", "truncation"),
    *("is_local", "local_files_only", "mistral_format", "backend"),
    *("auto_map", "add_bos_token", "add_eos_token"),
}


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


def add_missing_tokens(tokenizer: "PreTrainedTokenizerBase", needs: Iterable[str]) -> None:
    """Give the tokenizer the tokens of these kinds (mask, sentinels, fim) that it lacks."""
    names = {"sentinels": SENTINELS, "fim": FIM}
    for kind in needs:
        if kind == "mask" and tokenizer.mask_token is None:
            tokenizer.add_special_tokens({"mask_token": MASK})
        elif kind in names:
            vocab = tokenizer.get_vocab()
            missing = [name for name in names[kind] if name not in vocab]
            tokenizer.add_tokens(missing, special_tokens=True)


def end_token(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The token that closes a document: BERT's is its separator."""
    return tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id


def without_truncation(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """The same tokenizer, which cuts and pads nothing: a call that asks for either leaves it so until the next one."""
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """A name for what the tokenizer makes of texts and conversations, the same in every process."""
    kinds = sorted(tokenizer.special_tokens_map.items())
    state = f"{tokenizer.split_special_tokens}{kinds}{tokenizer.chat_template}"
    return hashlib.blake2b((_serialized(tokenizer) + state).encode(), digest_size=8).hexdigest()


def _serialized(tokenizer: "PreTrainedTokenizerBase") -> str:
    """tokenizer.json as it will be once it has been read: of some scores of pieces tokenizers reads a last digit wrongly."""
    from tokenizers import Tokenizer

    state = without_truncation(tokenizer).backend_tokenizer.to_str()
    scored = type(tokenizer.backend_tokenizer.model).__name__ == "Unigram"
    return Tokenizer.from_str(state).to_str() if scored else state


def pretrained_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a Hugging Face folder or hub id, as AutoTokenizer reads it, but without limits on lengths."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not Path(name).exists() and name.count("/") > 1:
        raise ConfigError(f"tokenizer.name={name}: no such folder")
    # it warns of models that it does not know, such as ours, which says nothing of their tokenizers
    logging.getLogger("transformers.configuration_utils").setLevel(logging.ERROR)
    try:
        # tokenizer.json is what is saved again, so it is what is read, even beside a file of mistral-common
        tokenizer = AutoTokenizer.from_pretrained(name, mistral_format=False, trust_remote_code=False)
        if not isinstance(tokenizer, PreTrainedTokenizerFast) and (Path(name) / "tokenizer.json").is_file():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(name)
    except Exception as error:  # tokenizers raises what has no common base
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
    """Write the files of the tokenizer into a folder, so that any transformers reads tokenizer.json as it stands.

    The class is the one that builds nothing of its own; what other classes have for defaults is written out.
    """
    with naming(folder):
        without_truncation(tokenizer).save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    saved = json.loads(file.read_text(encoding="utf-8"))
    values = {name: value for name, value in saved.items() if name not in TRANSIENT_KEYS}
    values |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": list(tokenizer.model_input_names),
        "padding_side": tokenizer.padding_side,
        "truncation_side": tokenizer.truncation_side,
        "clean_up_tokenization_spaces": tokenizer.clean_up_tokenization_spaces,
    }
    extra = values.pop("extra_special_tokens", None)
    if extra:  # as a list has been called longer than there is the other name for it
        values["additional_special_tokens"] = extra
    before = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
    if "add_prefix_space" in before:  # transformers 4 puts what it finds here into tokenizer.json's
        values["add_prefix_space"] = before["add_prefix_space"]
    file.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def reloads_unchanged(tokenizer: "PreTrainedTokenizerBase", model_type: str) -> bool:
    """Whether AutoTokenizer finds this tokenizer beside a config.json of that type: for some it builds another one."""
    with tempfile.TemporaryDirectory() as name:
        save_tokenizer(tokenizer, Path(name))
        (Path(name) / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
        read = pretrained_tokenizer(name)
    return _serialized(read) == _serialized(tokenizer)


def tokenizer_files(tokenizer: "PreTrainedTokenizerBase") -> dict[str, str]:
    """The text files that `save_tokenizer` writes, by their path in the folder: what a checkpoint carries."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_tokenizer(tokenizer, folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in files}


def tokenizer_from_files(files: Mapping[str, str]) -> "PreTrainedTokenizerBase":
    """The tokenizer that `tokenizer_files` described; CheckpointError for a path that leads out of the folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path, text in files.items():
            parts = PurePosixPath(path).parts
            if ".." in parts or PurePosixPath(path).is_absolute():
                raise CheckpointError(f"the checkpoint's tokenizer has a file {path!r}, which lies elsewhere")
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")
        return pretrained_tokenizer(name)
