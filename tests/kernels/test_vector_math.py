"""Vector functions give one result in every process, whichever thread calls them first."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from genai_pl.kernels.vector_math import FUNCTIONS, resolve_vector_math

DETECTED = "mkl_vml_serv_cpu_detect.vml_cpu_type"  # the processor kind that MKL has detected; -1 before the first call
SCRIPT = """
import ctypes, os, sys, torch
from genai_pl.kernels.vector_math import resolve_vector_math
detected, processor, library = sys.argv[1:]
base = min(int(line.split("-")[0], 16) for line in open("/proc/self/maps") if library in line)
wrong = 0
for _ in range(300):
    process = os.fork()
    if process == 0:  # nothing has been computed here yet
        torch.set_num_threads(2)
        ctypes.c_int.from_address(base + int(processor)).value = 9  # what MKL calls an Intel processor with AVX-512
        ctypes.c_int.from_address(base + int(detected)).value = -1  # and it has not looked yet
        resolve_vector_math()
        angle = torch.arange(1 << 20, dtype=torch.float32) * 0.001
        os._exit(int((angle.cos().double() - angle.double().cos()).abs().max() > 1e-6))
    wrong += os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
print(wrong)
"""


class Recorded(TorchDispatchMode):
    """The operators that are called, with the largest number of elements that each was given."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[tuple[str, torch.dtype], int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if args and isinstance(args[0], torch.Tensor):
            key = (func.overloadpacket.__name__, args[0].dtype)
            self.sizes[key] = max(self.sizes.get(key, 0), args[0].numel())
        return func(*args, **(kwargs or {}))


def test_each_function_is_called_on_a_single_number_in_both_precisions():
    with Recorded() as recorded:
        resolve_vector_math()
    for dtype in (torch.float32, torch.float64):
        assert {recorded.sizes.get((name, dtype)) for name in (*FUNCTIONS, "pow")} == {1}


def test_the_processor_is_known_once_the_kernels_are_imported():
    place = _symbol(DETECTED)
    library = _library().name
    code = (
        "import ctypes, genai_pl.kernels\n"
        f"base = min(int(line.split('-')[0], 16) for line in open('/proc/self/maps') if '{library}' in line)\n"
        f"print(ctypes.c_int.from_address(base + {place}).value)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) >= 0


@pytest.mark.slow
def test_two_threads_that_come_first_together_compute_the_same_cosines_on_a_processor_with_avx512():
    if "avx512f" not in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        pytest.skip("needs a processor with AVX-512")
    places = (str(_symbol(DETECTED)), str(_symbol("mkl_vml_cpu_type")), _library().name)
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *places], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == "0"


def _library() -> Path:
    return Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"


def _symbol(name: str) -> int:
    """The address of a variable in torch's library."""
    try:
        listed = subprocess.run(["nm", str(_library())], capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("needs nm and torch's symbols")
    addresses = [line.split()[0] for line in listed.splitlines() if line.endswith(f" {name}")]
    if not addresses:
        pytest.skip("this torch is built without that MKL")
    return int(addresses[0], 16)
