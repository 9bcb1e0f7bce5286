#!/usr/bin/env bash
# transformers 5.23.0 on a CPU, hybrids with convolution or linear attention (LFM2, Qwen3-Next): rows that position_ids divide into
# documents are kept apart in the attention layers (use_cache=False), but the other layers carry their state from one
# document into the next, silently. Told by cu_seq_lens and seq_idx instead, which DataCollatorWithFlattening adds on
# request, LFM2 raises a ValueError that names the missing kernel package: so the silent way is the collator's default.
# Seen, relative difference of the second document's logits from those of that document alone, random models of 2 layers:
# Llama 1e-7, LFM2 6e-05 (a convolution over 3 tokens), Qwen3-Next 1.5e-02.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
cat > "$work/packed.py" <<'PY'
import torch
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, Lfm2Config, LlamaConfig, Qwen3NextConfig

sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2}
linear = {f"linear_{kind}_dim" if "head" in kind else f"linear_num_{kind}_heads": n
          for kind, n in {"key": 2, "value": 2, "key_head": 8, "value_head": 8}.items()}
experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
configs = {
    "Llama": LlamaConfig(**sizes),
    "LFM2": Lfm2Config(**sizes, layer_types=["conv", "full_attention"], block_multiple_of=8),
    "Qwen3-Next": Qwen3NextConfig(**sizes, **linear, **experts, head_dim=8, layer_types=["linear_attention", "full_attention"]),
}
first, second = list(range(3, 13)), list(range(20, 28))
rows = [{"input_ids": first}, {"input_ids": second}]
found = {}
for name, config in configs.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    batch = DataCollatorWithFlattening()(rows)
    del batch["labels"]
    with torch.no_grad():
        alone = model(torch.tensor([second]), use_cache=False).logits[0]
        packed = model(**batch, use_cache=False).logits[0, len(first) :]
    found[name] = ((packed - alone).norm() / alone.norm()).item()
    print(f"{name}: {found[name]:.1e}")
    if name == "LFM2":
        told = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(rows)
        try:
            model(**told, use_cache=False)
            raise SystemExit("packed sequences are accepted now")
        except ValueError as error:
            print(error)
            assert "packed sequences" in str(error)
assert found["Llama"] < 1e-5 < found["LFM2"] and found["Qwen3-Next"] > 1e-3
PY
"$work/venv/bin/python" "$work/packed.py"
