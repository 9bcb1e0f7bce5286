"""Text in, batches out; the DataModule lies in `genai_pl.data.datamodule`, since it alone needs Lightning."""

from genai_pl.data.token_bytes import token_bytes, vocabulary
from genai_pl.data.tokenizer import add_missing, byte_tokenizer, fingerprint, pretrained_tokenizer, train_bpe

__all__ = [
    "add_missing",
    "byte_tokenizer",
    "fingerprint",
    "pretrained_tokenizer",
    "token_bytes",
    "train_bpe",
    "vocabulary",
]
