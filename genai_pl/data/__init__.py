"""Data: sources to records, records to tokens, tokens to batches.

`sources`, `records` and `columns` read files; `messages` and `chat_template` handle conversations; `tokenizer`,
`tokenize` and `prompt_tokens` make tokens, cached by `table_store`; `packing` lays them out in rows, and `loader` and
`streaming` make batches whose order can be resumed; `mixture` decides which of several sources gives the next row. One
module per option of `data` puts these together (text, chat, pairs, preference, unpaired, prompts, seq2seq). The data
modules are not imported here, as only they need Lightning.
"""

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
