#!/usr/bin/env bash
# transformers 5.23.0: beside a config.json of model_type qwen2, AutoTokenizer builds a pre-tokenizer of its own, whatever
# tokenizer.json and tokenizer_class say. A folder of a byte-level tokenizer with GPT-2's regex so gives other tokens through
# AutoTokenizer than its own tokenizer.json; beside model_type llama, or with PreTrainedTokenizerFast, it gives the right ones.
# Seen: "1234" is one piece by tokenizer.json and four beside qwen2.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3
"$work/venv/bin/python" - "$work" <<'PY'
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<e>"], initial_alphabet=alphabet, show_progress=False)
tokenizer.train_from_iterator(["1234 1234 1234"] * 50, trainer)
found = {}
for kind in ("llama", "qwen2"):
    folder = Path(sys.argv[1]) / kind
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>").save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    found[kind] = AutoTokenizer.from_pretrained(folder).tokenize("1234")
    print(kind, found[kind], PreTrainedTokenizerFast.from_pretrained(folder).tokenize("1234"))
assert found["llama"] == tokenizer.encode("1234").tokens == ["1234"]
assert found["qwen2"] == ["1", "2", "3", "4"]
PY
echo "as found"
