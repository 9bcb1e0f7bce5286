"""The real compiler accepts every kernel, with no GPU: a process of its own, since this one may run the interpreter."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="the kernels need triton")

COMPILE = """
import re, subprocess, sys, tempfile, torch, triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from genai_pl.kernels.flash.common import Extras
from genai_pl.kernels.flash.problem import Case
from genai_pl.kernels.flash.compile import launches, source

capability, D, featured = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "featured"
q, k, v = (torch.empty(2, 256, 4, D, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
tables = [torch.zeros(2, 8, 256, dtype=torch.int32) for _ in range(2)]
seed = torch.zeros(1, dtype=torch.int64)
sinks = torch.empty(4)
extras = Extras(torch.empty(1, 4, 256, 256), torch.empty(4), *tables, seed, sinks) if featured else Extras()
if sys.argv[3] == "sinks":
    extras = Extras(sinks=sinks)
case = Case(True, 100 * featured, featured, featured, 0, 0.1, 30.0 * featured, 0.1 * featured, featured)
for launch in launches(q, k, v, extras, case, f"sm{capability}"):
    compiled = triton.compile(source(launch), target=GPUTarget("cuda", capability, 32), options=launch.options)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as ptx:
        ptx.write(compiled.asm["ptx"])
        ptx.flush()
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={sm_arch_from_capability(capability)}", ptx.name]
        report = subprocess.run([*command, "-o", "/dev/null"], capture_output=True, text=True, check=True).stderr
    spilled = sum(int(n) for pair in re.findall(r"(\\d+) bytes spill stores, (\\d+) bytes spill loads", report) for n in pair)
    print(launch.name, spilled)
"""


def spills(capability: int, D: int, kind: str) -> dict[str, int]:
    """Bytes that each kernel of a case spills."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", "-c", COMPILE, str(capability), str(D), kind]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return {name: int(n) for name, n in (line.split() for line in done.stdout.splitlines())}


@pytest.mark.slow
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kind", ["plain", "sinks"])
def test_plain_causal_attention_in_bfloat16_spills_no_register(capability: int, D: int, kind: str):
    assert spills(capability, D, kind) == {"forward": 0, "row_sums": 0, "key_value": 0, "query": 0}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_every_feature_at_once_compiles(capability: int):
    found = spills(capability, 80, "featured")
    assert len(found) == 5
    if capability == 80:  # others spill up to 456 bytes with bias, ALiBi, window, dropout, softcap and sinks together
        assert {name for name, n in found.items() if n} <= {"bias"}
