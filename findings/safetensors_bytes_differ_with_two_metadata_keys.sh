#!/usr/bin/env bash
# safetensors 0.8.0: the same tensors with the same metadata, saved twice by one process, are two different files as soon as the
# metadata has two keys: their order in the header is drawn anew by each call. With the one key that transformers and peft write
# ("format") the bytes are equal, so nothing shows it until somebody adds a second: a digest of the file then says that weights
# changed which did not, and caches and deduplicating stores keep every copy. Reading is not affected.
# Seen: 20 saves of one tensor with one key are 1 file, with six keys 18 to 20 files, equal after reading.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q numpy==2.3.5 safetensors==0.8.0
"$work/venv/bin/python" - <<'PY'
import numpy as np
from safetensors.numpy import load, save

tensors = {"weight": np.arange(4, dtype=np.float32)}


def files(metadata):
    return {save(tensors, metadata) for _ in range(20)}


one, six = files({"format": "np"}), files({f"key{n}": "x" for n in range(6)})
print("files of 20 saves: one key", len(one), "- six keys", len(six))
assert len(one) == 1 and len(six) > 1
assert len({len(data) for data in six}) == 1
assert all((load(data)["weight"] == tensors["weight"]).all() for data in six)
PY
echo "as found"
