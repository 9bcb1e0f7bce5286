"""Folders that somebody else made, given to every option that takes one: nothing runs, nothing hangs, nothing grows."""

import importlib
import os
import random
import select
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import ROOT, TINY
from tests.training import foreign

GIB = 2**20  # KiB, in which the kernel counts
SECONDS = 120  # after which a command hangs
WRITE = ("prompt=a", "generation.max_new_tokens=2")
NEW = ("train", *TINY, "trainer.max_steps=1", "output_dir=new")
USES = {
    "resume": ("train", "resume=x"),
    "init_from": (*NEW, "init_from=x"),
    "checkpoint": ("generate", "checkpoint=x", *WRITE),
    "a file": ("generate", "checkpoint=x/checkpoints/last.ckpt", *WRITE),
    "model": ("generate", "checkpoint=x/{exported}", *WRITE),
    "adapter": ("generate", "checkpoint=plain", "adapter=x", *WRITE),
    "peft": (*NEW, "init_from=plain", "peft.init_from=x"),
    "export": ("export", "checkpoint=x", "out=exported"),
}


class Ended(NamedTuple):
    status: int | None  # None: it hung
    out: str
    memory: int  # KiB at most, beyond what this process has


def forked(name: str, *arguments: str) -> Ended:
    """A command in a process of its own, which has all modules already."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(write, 1)
        os.dup2(write, 2)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, errors="replace") for n in (1, 2))
        sys.argv, status = [f"{name}.py", *arguments], 0
        try:
            importlib.import_module(name).main()
        except SystemExit as stop:
            status = stop.code or 0
        except BaseException:
            traceback.print_exc()
            status = 99
        finally:
            sys.stdout.flush()
            os._exit(status)
    os.close(write)
    out, end, hung = b"", time.monotonic() + SECONDS, False
    while not hung:
        hung = not select.select([read], [], [], max(0.0, end - time.monotonic()))[0]
        if hung:
            os.kill(child, 9)
        elif not (part := os.read(read, 1 << 16)):
            break
        else:
            out += part
    os.close(read)
    _, status, usage = os.wait4(child, 0)
    memory = usage.ru_maxrss - int(Path("/proc/self/statm").read_text().split()[1]) * 4
    return Ended(None if hung else os.waitstatus_to_exitcode(status), out.decode(errors="replace"), memory)


@pytest.fixture
def runs(command, tmp_path: Path) -> list[str]:
    """Folders of real runs: a model, an adapter, and a model that transformers runs."""
    import transformers as tf

    sys.path.insert(0, str(ROOT))
    assert command("train", *TINY, "trainer.max_steps=1", "output_dir=plain").status == 0
    assert command("train", *TINY, "trainer.max_steps=1", "peft=lora", "output_dir=lora").status == 0
    config = tf.GPTNeoXConfig(
        num_hidden_layers=1, num_attention_heads=2, hidden_size=32, intermediate_size=64, vocab_size=258,
        max_position_embeddings=64, bos_token_id=256, eos_token_id=256,
    )  # fmt: skip
    tf.AutoModelForCausalLM.from_config(config).save_pretrained("theirs")
    for file in Path("plain/model").glob("tokenizer*"):
        Path("theirs", file.name).write_bytes(file.read_bytes())
    others = [o for o in TINY if not o.startswith(("model.", "tokenizer"))]
    result = command("train", "model=hf", "model.name=theirs", *others, "trainer.max_steps=1", "output_dir=wrapped")
    assert result.status == 0, result.err
    (tmp_path / "evil.py").write_text(foreign.EVIL)
    return ["plain", "lora", "wrapped"]


def check(runs: list[str], seed: int) -> str:
    """Whether a changed folder was taken or refused, or what is wrong with how it was."""
    rng = random.Random(seed)
    run, use = rng.choice(runs), rng.choice(sorted(USES))
    foreign.copy(Path(run), Path("x"), seed)
    exported = "adapter" if run == "lora" else "model"
    ended = forked(*(argument.format(exported=exported) for argument in USES[use]))
    for origin in ("new", "exported"):
        foreign.shutil.rmtree(origin, ignore_errors=True)
    where = f"seed {seed}, {use} of {run}, status {ended.status}: "
    if Path(foreign.MARKER).exists():
        return where + "something ran"
    if ended.status is None or ended.memory > GIB:
        return where + f"hangs, or grows by {ended.memory} KiB"
    if ended.status == 0:
        return "taken"
    lines = [line for line in ended.out.splitlines() if line.startswith("error: ")]
    refused = ended.status in (1, 2) and len(lines) == 1 and "Traceback" not in ended.out
    return "refused" if refused else where + ended.out[-500:]


def test_a_foreign_folder_is_taken_or_refused_in_one_line(runs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(os.getcwd())  # where evil.py lies
    outcomes = [check(runs, seed) for seed in range(24)]
    assert {*outcomes} == {"taken", "refused"}


@pytest.mark.slow
def test_200_foreign_folders_are_taken_or_refused_in_one_line(runs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(os.getcwd())
    outcomes = [check(runs, seed) for seed in range(1000, 1200)]
    print({kind: outcomes.count(kind) for kind in {*outcomes}})
    assert {*outcomes} == {"taken", "refused"}
