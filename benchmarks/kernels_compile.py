"""Compile one launch of a Triton kernel for a GPU that is not here, and read the report out of the assembly."""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import CompiledKernel

from genai_pl.kernels.flash.compile import source
from genai_pl.kernels.flash.launch import Launch


class Target(NamedTuple):
    """A GPU, and what one of its multiprocessors holds at once."""

    name: str
    arch: str  # as the launcher calls it
    gpu: GPUTarget
    shared: int  # bytes for all programs
    reserved: int  # bytes of them that each program loses
    per_program: int  # bytes that a program may ask for
    registers: int  # 32-bit, of all threads
    granule: int  # registers per thread are rounded up to a multiple of this
    warps: int


# CUDA C++ programming guide, table "Technical specifications per compute capability"; AMD CDNA3 ISA, section 3.6
TARGETS = {
    "sm_80": Target("sm_80", "sm80", GPUTarget("cuda", 80, 32), 164 << 10, 1024, 163 << 10, 65536, 8, 64),
    "sm_90": Target("sm_90", "sm90", GPUTarget("cuda", 90, 32), 228 << 10, 1024, 227 << 10, 65536, 8, 64),
    "gfx942": Target("gfx942", "hip", GPUTarget("hip", "gfx942", 64), 64 << 10, 0, 64 << 10, 4 * 512 * 64, 8, 32),
}


class Report(NamedTuple):
    registers: int  # per thread
    spilled: int  # bytes per thread, stored and loaded
    shared: int  # bytes per program
    programs: int  # that fit a multiprocessor
    tensor_kind: str
    n_tensor: int  # matrix instructions in the code
    code: int  # bytes
    warnings: list[str]


def compile_launch(launch: Launch, target: Target) -> Report:
    """The report on a kernel compiled with the launch's own options."""
    compiled = triton.compile(source(launch), target=target.gpu, options=launch.options)
    return (_nvidia if target.gpu.backend == "cuda" else _amd)(compiled, target)


def _nvidia(compiled: CompiledKernel, target: Target) -> Report:
    log = _assembler_log(compiled.asm["ptx"], target.gpu.arch)
    registers = int(re.search(r"Used (\d+) registers", log)[1])
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    sass = _disassemble(compiled.asm["cubin"])
    instructions = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+\{?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", sass))
    kind = max(("HGMMA", "HMMA"), key=lambda name: instructions[name])
    return Report(
        registers,
        sum(int(n) for pair in spills for n in pair),
        compiled.metadata.shared,
        _programs(target, registers, compiled),
        kind if instructions[kind] else "",
        instructions[kind],
        16 * instructions.total(),
        sorted(set(re.findall(r"C75\d\d", log))),  # a matrix product that waits for the one before
    )


def _assembler_log(ptx: str, capability: int) -> str:
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={sm_arch_from_capability(capability)}", file.name]
        return subprocess.run([*command, "-o", "/dev/null"], capture_output=True, text=True, check=True).stderr


def _disassemble(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _amd(compiled: CompiledKernel, target: Target) -> Report:
    assembly = compiled.asm["amdgcn"]

    def number(pattern: str) -> int:
        return int(re.search(pattern + r":?\s+=?\s*(\d+)", assembly)[1])

    registers = number(r"\.vgpr_count")
    n_tensor = len(re.findall(r"^\s+v_mfma_", assembly, re.MULTILINE))
    return Report(
        registers,
        4 * number(r"\.vgpr_spill_count"),
        compiled.metadata.shared,
        _programs(target, registers, compiled),
        "mfma" if n_tensor else "",
        n_tensor,
        number(r"codeLenInByte"),
        [],
    )


def _programs(target: Target, registers: int, compiled: CompiledKernel) -> int:
    """How many programs run at once on a multiprocessor; 0 if not one fits."""
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    if shared > target.per_program:
        return 0
    per_warp = -(-registers // target.granule) * target.granule * target.gpu.warp_size
    by_registers = target.registers // per_warp // warps
    by_shared = target.shared // max(shared + target.reserved, 1)
    return min(by_registers, by_shared, target.warps // warps, 32)
