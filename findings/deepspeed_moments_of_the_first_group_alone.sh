#!/usr/bin/env bash
# DeepSpeed 0.19.8, ZeRO stages 1 and 2: safe_get_full_optimizer_state raises for every parameter that is not in the optimizer's first group.
# After a step of the first group the engine links parameters to their moments, once and for all groups (stage_1_and_2.py,
# _optimizer_step and _lazy_init_hp_params_optimizer_state); the others have none yet, because they are stepped after it. Stage 3
# looks the moments up at each call, and is right. genai_pl/strategies/deepspeed.py links again before it reads them.
# Seen: "first exp_avg of 8 numbers", then "ValueError: exp_avg not found in optimizer state fragment" for the second.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -z "${PYTHON:-}" ]; then
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" install -q torch==2.13.0 numpy ninja setuptools wheel
    DS_BUILD_OPS=0 "$work/venv/bin/pip" install -q --no-build-isolation deepspeed==0.19.8
    PATH=$work/venv/bin:$PATH PYTHON=$work/venv/bin/python
fi
cat > "$work/groups.py" <<'PY'
import deepspeed
import torch
from deepspeed.utils import safe_get_full_optimizer_state

deepspeed.init_distributed("gloo")
model = torch.nn.Linear(8, 1)
groups = [{"params": [model.weight]}, {"params": [model.bias]}]
config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}
engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups), config=config)
engine.backward(engine(torch.ones(1, 8)).sum())
engine.step()
for name, parameter in {"first": model.weight, "second": model.bias}.items():
    print(name, "exp_avg of", safe_get_full_optimizer_state(parameter, "exp_avg").numel(), "numbers", flush=True)
PY
cd "$work"
export DS_ACCELERATOR=cpu RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=${PORT:-29671}
"$PYTHON" groups.py 2>&1 | grep -E "exp_avg"
