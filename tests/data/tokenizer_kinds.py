"""Small tokenizers of every kind, as the `tokenizers` library makes them, and folders that hold them."""

import json
from collections.abc import Callable
from functools import wraps
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 12345 o'clock!",
    "Größe, naïve café — 日本語 text\n\n  indented\tcode == 3",
    "Hello   world don't DON'T end\r\n",
] * 20
TEXTS = [
    "Hello world",
    "  two  spaces ",
    "It's 12345\n\nGrößé café e\u0301 İ",
    "<s>a</s> <mask> [CLS]b[SEP] <added>ö<strip> wörd <extra>y",
    "",
    "日本語🙂",
    "don't == DON'T\t\tx " + "long text " * 60,
]
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<mask>", "[CLS]", "[SEP]", "[MASK]", "[PAD]", "[UNK]"]
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}
BERT_NAMES = {
    "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]",
}  # fmt: skip


def once(make: Callable[..., Tokenizer]) -> Callable[..., Tokenizer]:
    """The same tokenizer at each call: trainers break ties as it comes."""
    made: dict[str, str] = {}

    @wraps(make)
    def again(**options: bool) -> Tokenizer:
        name = str(options)
        if name not in made:
            made[name] = make(**options).to_str()
        return Tokenizer.from_str(made[name])

    return again


@once
def byte_level(*, prefix: bool = False, regex: bool = True, nfc: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex)
    tokenizer.decoder = decoders.ByteLevel()
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return train(tokenizer, trainers.BpeTrainer, vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)


@once
def sentencepiece(*, legacy: bool = False) -> Tokenizer:
    """As Llama 2's: a space is put before the text, and bytes stand for characters that are unknown."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    by_number = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = train(tokenizer, trainers.BpeTrainer, vocab_size=600, special_tokens=[*SPECIAL, *by_number])
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in by_number]
    return Tokenizer.from_str(json.dumps(state))


@once
def wordpiece(*, lowercase: bool = True) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return train(tokenizer, trainers.WordPieceTrainer, vocab_size=400, special_tokens=SPECIAL)


@once
def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return train(tokenizer, trainers.UnigramTrainer, vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>")


@once
def word_ends() -> Tokenizer:
    """As CLIP's: what ends a word is marked."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.WhitespaceSplit(), decoders.BPEDecoder()
    return train(tokenizer, trainers.BpeTrainer, vocab_size=300, special_tokens=SPECIAL, end_of_word_suffix="</w>")


def train(tokenizer: Tokenizer, trainer: type, **options: object) -> Tokenizer:
    tokenizer.train_from_iterator(CORPUS, trainer(show_progress=False, **options))
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level,
    "byte level with a space before": lambda: byte_level(prefix=True),
    "byte level of whole lines": lambda: byte_level(regex=False),
    "byte level, composed": lambda: byte_level(nfc=True),
    "sentencepiece": sentencepiece,
    "sentencepiece, legacy": lambda: sentencepiece(legacy=True),
    "wordpiece": wordpiece,
    "wordpiece, cased": lambda: wordpiece(lowercase=False),
    "unigram": unigram,
}


def around(tokenizer: Tokenizer, first: str | None, last: str | None) -> None:
    """Let every text begin and end with these tokens."""
    parts = [*([first] if first else []), "$A", *([last] if last else [])]
    given = [(token, tokenizer.token_to_id(token)) for token in (first, last) if token]
    tokenizer.post_processor = processors.TemplateProcessing(single=" ".join(parts), special_tokens=given)


def cut(tokenizer: Tokenizer, config: dict) -> None:
    tokenizer.enable_truncation(12)


def pad(tokenizer: Tokenizer, config: dict) -> None:
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id("<pad>"), pad_token="<pad>", length=16)


def add(tokenizer: Tokenizer, config: dict) -> None:
    """Added tokens of several kinds, one of them special and named in the configuration alone."""
    single = AddedToken("wörd", normalized=True, single_word=True)
    tokenizer.add_tokens([AddedToken("<added>", normalized=False), single, AddedToken("<strip>", lstrip=True)])
    tokenizer.add_special_tokens([AddedToken("<extra>", special=True)])
    config["additional_special_tokens"] = ["<extra>"]


def name_templates(tokenizer: Tokenizer, config: dict) -> None:
    named = {"default": "{{ messages[0].content }}!", "tool_use": "{{ messages[0].content }}?"}
    config["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]


STATES = {"as it is": lambda *_: None, "cut": cut, "padded": pad, "added": add, "templates": name_templates}


def write_folder(
    folder: Path,
    tokenizer: Tokenizer,
    *,
    state: str = "as it is",
    tokenizer_class: str | None = "PreTrainedTokenizerFast",
    model_type: str | None = None,
) -> Path:
    """A folder with such a tokenizer, as people have it."""
    wordpiece = type(tokenizer.model).__name__ == "WordPiece"
    config = {**(BERT_NAMES if wordpiece else NAMES), "tokenizer_class": tokenizer_class}
    STATES[state](tokenizer, config)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    given = {name: value for name, value in config.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(given))
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder
