"""Text in, batches out; the DataModule lies in `genai_pl.data.datamodule`, since it alone needs Lightning."""

from genai_pl.data.token_bytes import special_tokens, token_bytes
from genai_pl.data.tokenizer import add_missing_tokens, byte_tokenizer, fingerprint, pretrained_tokenizer, train_bpe

__all__ = [
    "add_missing_tokens",
    "byte_tokenizer",
    "fingerprint",
    "pretrained_tokenizer",
    "token_bytes",
    "train_bpe",
    "special_tokens",
]
