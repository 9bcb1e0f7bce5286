"""Small tokenizers of each common kind, trained on a few lines."""

import json
from collections.abc import Callable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from genai_pl.data import byte_tokenizer, train_bpe

LINES = [
    "She said: it's 12 naïve lines, or 日本 two\n\nthree   four.",
    "user assistant system: Five and three? Eight. And one? Nine.\n",
    "Answer the question about the weather in Paris: sunny.\n\n",
] * 4
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]


def byte_level_bpe() -> PreTrainedTokenizerBase:
    """Like GPT-2's: tokens keep the space before them, nothing is added to a text."""
    return train_bpe(LINES, 400)


def sentencepiece_bpe() -> PreTrainedTokenizerBase:
    """Like Llama 2's: a space and <s> before every text, bytes for unknown characters."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    byte_tokens = [f"<0x{n:02X}>" for n in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=560, special_tokens=[*SPECIAL, *byte_tokens], show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return wrapped(tokenizer)


def unigram() -> PreTrainedTokenizerBase:
    """Like T5's: words with the space before them, </s> after every text."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 2)]
    )
    return wrapped(tokenizer)


def wordpiece() -> PreTrainedTokenizerBase:
    """Like BERT's: lower-case words and ##suffixes, [CLS] before and [SEP] after every text."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    """The tokenizer with the names of its special tokens."""
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "byte": byte_tokenizer,
    "byte_level_bpe": byte_level_bpe,
    "sentencepiece_bpe": sentencepiece_bpe,
    "unigram": unigram,
    "wordpiece": wordpiece,
}


def scored_sentencepiece_bpe() -> PreTrainedTokenizerBase:
    """`sentencepiece_bpe` as transformers converts SentencePiece's files: a merge for every pair that makes a token."""
    state = json.loads(sentencepiece_bpe().backend_tokenizer.to_str())
    vocab = state["model"]["vocab"]
    plain = [token for token in vocab if len(token) > 1 and not token.startswith("<")]
    pairs = [(token[:n], token[n:]) for token in plain for n in range(1, len(token))]  # in the order of the vocabulary
    state["model"]["merges"] = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
    return wrapped(Tokenizer.from_str(json.dumps(state)))
