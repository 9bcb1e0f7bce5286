"""Compiled products of few rows: `row_products.c`, built by the machine's C compiler at first use, called through ctypes.

torch's products of one row reach half of what memory delivers, and those of float32 use one thread. The library is kept in
the user's cache folder under a name that says which source, compiler and processor it is of. Where there is no compiler, or
what it built computes something else, `library` raises NotImplementedError, and torch's products remain. It also holds
`decode_step.c`, a whole step, which includes the products.
"""

import atexit
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from genai_pl.kernels.cpu_products import bf16_products_pay
from genai_pl.kernels.int4 import BLOCK, GROUP, from_int4, to_int4
from genai_pl.kernels.int8 import to_int8
from genai_pl.kernels.nf4 import GROUP as NF4_GROUP
from genai_pl.kernels.nf4 import NF4, from_nf4, to_nf4

log = logging.getLogger(__name__)

PRODUCTS = Path(__file__).with_suffix(".c")
SOURCE = PRODUCTS.with_name("decode_step.c")  # which includes that of the products, and that weights.c
Kind = torch.dtype | str  # of weights; torch has no dtype for "nf4"
KINDS: dict[Kind, int] = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.int8: 2,
    torch.int4: 3,
    "nf4": 4,
}  # as in the source
MANY = 64  # rows at most of a compiled product (as in the source)
FEW = 16  # the same where torch's products of matrices have instructions for 16 bits
SMALL = 1 << 16  # weights of a matrix that one thread reads before a second one has begun
CACHED = 1 << 17  # weights that are widened at a time for a product of many rows
BUILD_SECONDS = 180  # of a busy machine; 8 on an idle one
# what C reads and writes: whatever torch.set_default_dtype and set_default_device say, perhaps in another thread
FLOATS = {"dtype": torch.float32, "device": "cpu"}


class RowWeight(NamedTuple):
    """A weight (out, width) of a dtype: float32, bfloat16, int8 codes with scales (out,), or blocks of int4 or nf4 by row.

    nf4: rows of (out, groups * 36) bytes, which are those of `to_nf4` where 64 divides the width.
    """

    weight: Tensor
    dtype: Kind
    width: int
    scales: Tensor | None = None


def pack_rows(weight: Tensor, dtype: Kind) -> RowWeight:
    """The weight (out, in) in that dtype, a view if it is already; NotImplementedError without a library."""
    library()
    width = weight.shape[1]
    if dtype is torch.int4:
        return RowWeight(to_int4(weight), dtype, width)
    if dtype == "nf4":
        blocks = to_nf4(F.pad(weight.detach().float(), (0, -width % NF4_GROUP)))
        return RowWeight(blocks.view(len(weight), -1), dtype, width)
    if dtype is torch.int8:
        codes, scales = to_int8(weight)
        return RowWeight(codes.contiguous(), dtype, width, scales)
    return RowWeight(weight.to(dtype).contiguous(), dtype, width)


def multiply_rows(x: Tensor, packed: RowWeight, bias: Tensor | None = None, more: Tensor | None = None) -> Tensor:
    """x W^T + bias + more in float32, (..., in) -> (..., out), for a bias (out,) and more (..., out).

    Activations of up to `most_rows` keep 32 bits beside weights of any dtype.
    """
    weight, dtype, width, scales = packed
    out = len(weight)
    n = x.numel() // width
    if n > most_rows(dtype):
        y = _multiply_many(x, packed)
        y = y if bias is None else y.add_(bias)
        return y if more is None else y.add_(more)
    x, y = x.contiguous(), x.new_empty(*x.shape[:-1], out)
    more = None if more is None else more.contiguous()
    threads = torch.get_num_threads() if out * width > SMALL else 1
    step = library()
    memory = torch.empty(step.columns_memory(n, width), **FLOATS)
    addresses = (x.data_ptr(), weight.data_ptr(), address_of(scales), address_of(bias), address_of(more), y.data_ptr())
    step.product(KINDS[dtype], *addresses, memory.data_ptr(), n, out, width, threads)
    return y


def most_rows(dtype: Kind) -> int:
    """Rows up to which compiled products of a dtype serve: for more, torch's of matrices are faster."""
    return FEW if dtype in (torch.bfloat16, torch.int8) and bf16_products_pay() else MANY


def widened(packed: RowWeight) -> Tensor:
    """The weight (out, width) in float32; NotImplementedError without a library."""
    weight, dtype, width, scales = packed
    y = torch.empty(len(weight), width, **FLOATS)
    threads = torch.get_num_threads() if y.numel() > SMALL else 1
    addresses = weight.data_ptr(), address_of(scales), y.data_ptr()
    library().widen(KINDS[dtype], *addresses, len(weight), width, threads)
    return y


def rms_norm_rows(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last C channels of few rows, (..., C) in float32."""
    x = x.contiguous()
    y = torch.empty_like(x)
    width = x.shape[-1]
    library().rms_norm(x.data_ptr(), weight.data_ptr(), eps, y.data_ptr(), x.numel() // width, width)
    return y


def rotate_rows(x: Tensor, table: tuple[Tensor, Tensor], heads: int) -> None:
    """Turn the first heads of each token in x (B, T, heads + others, D), contiguous, in place by the tables of `rotary`."""
    B, T, all_heads, D = x.shape
    cosine, sine = (part.contiguous() for part in table)
    positions = cosine.numel() // D
    library().rotate(x.data_ptr(), cosine.data_ptr(), sine.data_ptr(), B * T, positions, heads, all_heads, D)


def address_of(x: Tensor | None) -> int | None:
    """Where the numbers of a tensor begin; None, a null pointer in C, for none."""
    return None if x is None else x.data_ptr()


def _multiply_many(x: Tensor, packed: RowWeight) -> Tensor:
    """x W^T by torch, with activations in bfloat16 beside narrow weights where the processor has that product."""
    weight, dtype, width, scales = packed
    if dtype is torch.float32:
        return F.linear(x, weight)
    if dtype in (torch.bfloat16, torch.int8) and bf16_products_pay():  # which holds codes of 8 bits exactly
        y = F.linear(x.bfloat16(), weight.bfloat16()).float()
        return y if scales is None else y.mul_(scales)
    # some output channels at a time, in the same memory, so that their floats stay in a cache
    rows, y = x.reshape(-1, width).contiguous(), x.new_empty(*x.shape[:-1], len(weight))
    step = max(1, CACHED // width)
    floats, threads = x.new_empty(min(step, len(weight)), width), torch.get_num_threads()
    parts = zip(weight.split(step), y.view(len(rows), -1).split(step, dim=1), strict=True)
    for number, (part, result) in enumerate(parts):
        some = None if scales is None else scales[number * step :]
        library().widen(KINDS[dtype], part.data_ptr(), address_of(some), floats.data_ptr(), len(part), width, threads)
        torch.mm(rows, floats[: len(part)].t(), out=result)
    return y


def library() -> ctypes.CDLL:
    """The compiled source. NotImplementedError if there is none or its numbers are wrong."""
    found = look_up()
    if isinstance(found, str):
        raise NotImplementedError(found)
    return found


@functools.cache
def look_up() -> ctypes.CDLL | str:
    """The library, or the reason why there is none: a process looks once, since a compiler may take a minute to fail."""
    try:
        found = ctypes.CDLL(str(_build()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = f"{PRODUCTS.name} was not built: {error}"
        log.info("decoding    %s; torch's products serve instead, CC=COMPILER names another compiler", reason)
        return reason
    pointer, count = ctypes.c_void_p, ctypes.c_long
    found.product.argtypes = [ctypes.c_int, *[pointer] * 7, *[count] * 3, ctypes.c_int]
    found.columns_memory.argtypes, found.columns_memory.restype = [count] * 2, count
    found.widen.argtypes = [ctypes.c_int, *[pointer] * 3, *[count] * 2, ctypes.c_int]
    found.rms_norm.argtypes = [pointer, pointer, ctypes.c_float, pointer, count, count]
    found.rotate.argtypes = [*[pointer] * 3, *[count] * 5]
    found.decode_step.argtypes = [*[pointer] * 5, count, pointer, count, ctypes.c_int, pointer]
    found.decode_step_memory.argtypes = [pointer, pointer, count, count]
    found.decode_step_memory.restype = count
    for function in (found.product, found.widen, found.rms_norm, found.rotate, found.decode_step):
        function.restype = None
    found.set_nf4.argtypes, found.set_nf4.restype = [pointer], None
    levels = torch.tensor(NF4, **FLOATS)
    found.set_nf4(levels.data_ptr())
    x, y = torch.linspace(-1, 1, 5 * 70, **FLOATS).view(5, 70), torch.empty(5, 3, **FLOATS)
    for dtype, kind in KINDS.items():
        weight, values = _sample(dtype, 3, 70)
        found.product(kind, x.data_ptr(), weight.data_ptr(), None, None, None, y.data_ptr(), None, 5, 3, 70, 1)
        if not torch.allclose(y.double(), x.double() @ values.double().T, rtol=1e-4, atol=1e-3):
            return f"{PRODUCTS.name} multiplies {dtype} wrongly as built here"
    return found


def is_built() -> bool:
    """True if there is a library; a process tries once to build it."""
    return not isinstance(look_up(), str)


def _sample(dtype: Kind, out: int, width: int) -> tuple[Tensor, Tensor]:
    """A weight as it is stored, and its numbers (out, width)."""
    numbers = torch.arange(out * width, device="cpu").view(out, width).sub(100)
    if dtype is torch.int4:  # all codes, with scale 1 and minimum -8
        blocks = torch.arange(out * -(-width // GROUP) * BLOCK, device="cpu").to(torch.uint8).view(out, -1, BLOCK)
        blocks[..., :4] = torch.tensor([1.0, -8.0], dtype=torch.bfloat16, device="cpu").view(torch.uint8)
        return blocks.flatten(1), from_int4(blocks.flatten(1), width)
    if dtype == "nf4":
        blocks = to_nf4(F.pad(numbers, (0, -width % NF4_GROUP)))
        return blocks, from_nf4(blocks, torch.Size((out, blocks.shape[0] // out * NF4_GROUP)))[:, :width]
    return numbers.to(dtype), numbers.to(dtype)


def _build() -> Path:
    """The library's file, compiled unless an earlier process has."""
    names = (os.environ.get("CC"), "cc", "gcc", "clang")
    compiler = next(filter(None, (shutil.which(name) for name in names if name)), None)
    if compiler is None:
        raise FileNotFoundError("no C compiler")
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    # torch's own OpenMP, so that both share one team of threads
    openmp = [str(file) for file in Path(torch.__file__).parent.glob("lib/libgomp*")]
    speed = ("-O3", "-fno-unswitch-loops")  # copies of loops take gcc 40 % of its time, and gain nothing here
    command = [compiler, *speed, native, "-fopenmp", "-shared", "-fPIC", str(SOURCE), *openmp, "-lm", "-o"]
    sources = [path.read_text() for path in sorted(SOURCE.parent.glob("*.c"))]
    key = hashlib.sha256("\n".join([*sources, *command, *_processor()]).encode()).hexdigest()
    folder, name = _folder(), f"{PRODUCTS.stem}-{key[:24]}"
    found = next((path for path in folder.glob(f"{name}-*.so") if _is_whole(path)), None)
    if found is not None:
        return found
    # under a name of its own first: several processes may build at a time
    with tempfile.TemporaryDirectory(dir=folder) as private:
        built = Path(private) / "built.so"
        subprocess.run([*command, str(built)], check=True, capture_output=True, timeout=BUILD_SECONDS)
        path = folder / f"{name}-{_digest(built)}.so"
        os.replace(built, path)
    return path


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:24]


def _is_whole(path: Path) -> bool:
    """True for a library that has the content of its name: reading a damaged one can kill the process."""
    return path.is_file() and _is_ours(path) and path.stem.endswith(_digest(path))


def _is_ours(path: Path) -> bool:
    """True if only this user and the administrator can have written a file or folder."""
    if not hasattr(os, "getuid"):
        return True
    status = path.stat()
    return status.st_uid in (0, os.getuid()) and not status.st_mode & stat.S_IWOTH


def _folder() -> Path:
    """The user's cache folder, or a new private one where that cannot be written; never one that others could fill."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "genai_pl"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK) and _is_ours(folder):
            return folder
    except (OSError, RuntimeError):  # read-only, or no home
        pass
    folder = tempfile.mkdtemp(prefix="genai_pl-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _processor() -> list[str]:
    """What tells processors apart: a home folder may be shared by different machines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = {line for line in lines if line.startswith(("flags", "Features"))}
    return [platform.machine(), platform.processor(), *sorted(flags)]
