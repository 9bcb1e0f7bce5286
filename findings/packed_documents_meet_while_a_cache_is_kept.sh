#!/usr/bin/env bash
# transformers 5.23.0 with eager or sdpa attention: rows of DataCollatorWithFlattening, several documents told apart by position_ids
# that begin at 0 again, are kept apart only if no cache is made. A model's use_cache is true by default, in train() mode too: then
# every forward pass makes an empty DynamicCache before the mask, position_ids are not looked at, and the second document
# attends to the first. Nothing is said; the loss is finite. use_cache=False gives each document what it has alone.
# Seen, relative difference of the second document's logits from those of that document alone, random Llama of 2 layers:
# eager and sdpa 0.44 as called, in train() mode too, and below 1e-6 with use_cache=False.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
cat > "$work/packed.py" <<'PY'
import torch
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM

first, second = list(range(3, 13)), list(range(20, 28))
batch = DataCollatorWithFlattening()([{"input_ids": first}, {"input_ids": second}])
assert batch["position_ids"].tolist() == [[*range(10), *range(8)]] and "attention_mask" not in batch
del batch["labels"]
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
for attention in ("eager", "sdpa"):
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(LlamaConfig(**sizes), attn_implementation=attention)
    for training in (False, True):
        model.train(training)
        with torch.no_grad():
            alone = model(torch.tensor([second]), use_cache=False).logits[0]
            for options in ({}, {"use_cache": False}):
                packed = model(**batch, **options).logits[0, len(first) :]
                difference = ((packed - alone).norm() / alone.norm()).item()
                print(attention, "train()" if training else "eval()", options, f"{difference:.1e}")
                assert (difference < 1e-5) if options else (difference > 0.1)
PY
"$work/venv/bin/python" "$work/packed.py"
