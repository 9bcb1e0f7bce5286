"""Run folders that somebody else made: ways to change a real one, drawn by a seed, none of which may run or allocate anything."""

import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml

MARKER = "RAN"  # a file that shows that something ran
EVIL = f"""
from pathlib import Path
Path({MARKER!r}).touch()
def f(*args, **kwargs):
    Path({MARKER!r}).touch()
    return [0.0] * 100
"""
ODD = [
    2**31, 2**40, 2**62, 10**30, -1, 0, 10**6, 1e308, float("nan"), "9" * 400, None, True, [], {}, [[]] * 50, "a" * 10_000,
    "../../x", "/etc/passwd", "evil:f", "evil.f", "${oc.env:HOME}", {"_target_": "evil.f"}, "\x00", "\ud83d",
]  # fmt: skip
OVERRIDES = [
    "+callbacks.extra.x._target_=evil.f", "hydra.searchpath=[file://.]", "objective.reward=evil:f", "model.n_layer=1000000",
    "model.n_embd=1000000000", "data.batch_size=1000000000", "trainer.devices=1000", "model.max_seq_len=100000000000", "~model",
    "model=../../evil", "optimizer._target_=evil.f", "seed=99999999999999999999999", "a" * 5000 + "=1", "data.workers=100000",
    "model.n_layer=" + "(" * 5000, "hydra.job.env_set.X=1", "data.seq_len=1000000000", "init_from=evil.py",
]  # fmt: skip
YAML = [
    "!!python/object/apply:evil.f []",
    "- !!python/name:evil.f",
    "&a [*a]",
    "- " * 5000,
    "\x00",
    "- 1",
    "null",
    "[[[[]]]]",
]
CODE = ["auto_map", "_target_", "tokenizer_class", "architectures", "model_type", "quantization_config", "peft_type"]


class Evil:
    def __reduce__(self) -> tuple:
        return exec, (f"open({MARKER!r}, 'w')",)


def change(folder: Path, seed: int) -> None:
    """One or two changes of files of a run folder."""
    rng = random.Random(seed)
    for _ in range(rng.randint(1, 2)):
        if rng.random() < 0.1:
            _link(folder, rng)
            continue
        path = rng.choice([p for p in _files(folder) if p.suffix in KINDS])
        try:
            (KINDS[path.suffix] if rng.random() < 0.8 else _bytes)(path, rng)
        except (
            ValueError,
            KeyError,
            RuntimeError,
            EOFError,
            pickle.PickleError,
            struct.error,
            yaml.YAMLError,
            OSError,
        ):
            _bytes(path, rng)  # broken already
        if path.suffix == ".ckpt":
            for other in path.parent.glob("*.ckpt"):
                other.unlink() if other != path else None
                other.hardlink_to(path) if other != path else None


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


def _link(folder: Path, rng: random.Random) -> None:
    path = rng.choice(_files(folder))
    target = rng.choice(["/dev/zero", "/etc/passwd", "/nonexistent", "../../..", path.name, "fifo", "folder"])
    path.unlink()
    if target == "fifo":
        os.mkfifo(path)
    elif target == "folder":
        path.mkdir()
    else:
        path.symlink_to(target)


def _bytes(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data) + 1)
    kind = rng.choice(["cut", "flip", "zeros", "insert", "empty", "longer"])
    if kind == "cut":
        del data[at:]
    elif kind == "flip" and data:
        data[at - 1] ^= 1 << rng.randrange(8)
    elif kind == "zeros":
        data[at : at + 200] = bytes(len(data[at : at + 200]))
    elif kind == "insert":
        data[at:at] = rng.randbytes(30)
    else:
        data = data + rng.randbytes(100) if kind == "longer" else bytearray()
    path.write_bytes(data)


def _paths(value: object, path: tuple = ()) -> Iterator[tuple]:
    """The keys that lead to every value within a value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield (*path, key)
        yield from _paths(inner, (*path, key))


def _put(value: object, path: tuple, new: object) -> None:
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


def _odd_value(value: object, rng: random.Random) -> None:
    if paths := [*_paths(value)]:
        _put(value, rng.choice(paths), rng.choice(ODD))


def _json(path: Path, rng: random.Random) -> None:
    value = json.loads(path.read_text())
    _odd_value(value, rng)
    if rng.random() < 0.3:
        value[rng.choice(CODE)] = rng.choice(["evil.f", ["evil.f"], {"AutoModel": "evil.f", "AutoConfig": "evil.f"}])
    path.write_text(json.dumps(value))


def _yaml(path: Path, rng: random.Random) -> None:
    if path.name == "overrides.yaml" and rng.random() < 0.6:
        path.write_text(yaml.safe_dump([*yaml.safe_load(path.read_text()), rng.choice(OVERRIDES)]))
    else:
        path.write_text(rng.choice(YAML))


def _checkpoint(path: Path, rng: random.Random) -> None:
    if rng.random() < 0.1:
        path.write_bytes(pickle.dumps(Evil()))
        return
    contents = torch.load(path, weights_only=True)
    ours, state = contents["genai_pl"], contents["state_dict"]
    part = rng.choice(["code", "ours", "ours", "ours", "tensor", "tensor", "name", "progress"])
    name = rng.choice(sorted(state))
    if part == "code":
        ours["x"] = Evil()
    elif part == "ours":
        kinds = ("model", "tokenizer", "peft", "base", "defaults", "rng")
        _odd_value(ours[rng.choice([kind for kind in kinds if isinstance(ours.get(kind), dict | list)])], rng)
    elif part == "tensor":
        x = state[name]
        many = x.new_zeros(1).expand(10 ** rng.choice([6, 9, 12]))
        state[name] = rng.choice(
            [many, x.double(), x.to(torch.int8), x.reshape(-1), "x", x[:0], torch.empty(10**13, device="meta")]
        )
    elif part == "name":
        state["model.evil"] = state.pop(name)
    else:
        _odd_value({key: contents[key] for key in ("loops", "callbacks", "lr_schedulers", "optimizer_states")}, rng)
    torch.save(contents, path)


def _safetensors(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    if rng.random() < 0.2:
        path.write_bytes(struct.pack("<Q", rng.choice([2**62, 10**9, 0])) + data[8:])
        return
    name = rng.choice(sorted(header.keys() - {"__metadata__"}))
    values = [[10**12, 10**12], [0], [-1], "F64", "X", [0, 10**15], None, [[1]], "BOOL"]
    header[name][rng.choice(["shape", "dtype", "data_offsets"])] = rng.choice(values)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


KINDS = {".ckpt": _checkpoint, ".json": _json, ".yaml": _yaml, ".safetensors": _safetensors, ".jinja": _bytes}


def copy(source: Path, target: Path, seed: int) -> None:
    """A changed copy of a run folder in the place of `target`."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("tensorboard", "*.md"))
    change(target, seed)
