"""Compiled products of few rows against float64, and what happens where they cannot be built."""

import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genai_pl.kernels import packed_product, row_products
from genai_pl.kernels.cpu_products import bf16_products_pay
from genai_pl.kernels.nf4 import NF4
from genai_pl.kernels.row_products import (
    KINDS,
    Kind,
    is_built,
    most_rows,
    multiply_rows,
    pack_rows,
    rms_norm_rows,
    rotate_rows,
    widened,
)
from genai_pl.models.positions import rotary, rotate

built = pytest.mark.skipif(not is_built(), reason="no C compiler here")


@pytest.fixture
def fresh() -> Iterator[None]:
    """Forget the library of this process, before and after."""
    row_products.look_up.cache_clear()
    yield
    row_products.look_up.cache_clear()


def inputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense(packed: row_products.RowWeight) -> Tensor:
    """The weight (out, width) in float64 that the packed one stands for."""
    weight, dtype, width, scales = packed
    if dtype is torch.int4:
        return written_out(weight, width)
    if dtype == "nf4":
        return nf4_written_out(weight, width)
    return weight.double() if scales is None else weight.double() * scales.double()[:, None]


def written_out(blocks: Tensor, width: int) -> Tensor:
    """Blocks of int4 in float64, byte by byte as `int4.py` describes them."""
    rows = []
    for row in blocks.numpy():
        values = []
        for block in row.reshape(-1, 20):
            scale, low = (float(struct.unpack("<f", b"\0\0" + block[at : at + 2].tobytes())[0]) for at in (0, 2))
            codes = [byte & 15 for byte in block[4:].tolist()] + [byte >> 4 for byte in block[4:].tolist()]
            values += [code * scale + low for code in codes]
        rows.append(values[:width])
    return torch.tensor(rows, dtype=torch.float64)


def nf4_written_out(blocks: Tensor, width: int) -> Tensor:
    """The same for blocks of nf4 (`nf4.py`)."""
    rows = []
    for row in blocks.numpy():
        values = []
        for block in row.reshape(-1, 36):
            [scale] = struct.unpack("<f", block[:4].tobytes())
            values += [NF4[code] * scale for byte in block[4:].tolist() for code in (byte >> 4, byte & 15)]
        rows.append(values[:width])
    return torch.tensor(rows, dtype=torch.float64)


@built
@pytest.mark.parametrize("dtype", [kind for kind in KINDS if kind is not torch.float32])
def test_widened_rows_are_the_numbers(dtype: Kind) -> None:
    packed = pack_rows(inputs(9, 100), dtype)
    torch.testing.assert_close(widened(packed).double(), dense(packed), rtol=2e-7, atol=0)


@built
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("rows", [1, 2, 5, 16, 17, 50, 65])
@pytest.mark.parametrize("width", [1, 31, 64, 100])
def test_products_equal_float64(dtype: Kind, rows: int, width: int) -> None:
    packed = pack_rows(inputs(7, width), dtype)
    x, bias, more = inputs(1, rows, width, seed=1), inputs(7, seed=2), inputs(1, rows, 7, seed=3)
    expected = x.double() @ dense(packed).T + bias + more
    is_rounded = rows > most_rows(dtype) and dtype in (torch.bfloat16, torch.int8) and bf16_products_pay()
    tolerance = 6e-2 if is_rounded else 1e-5
    torch.testing.assert_close(multiply_rows(x, packed, bias, more).double(), expected, rtol=tolerance, atol=tolerance)


@built
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("rows", [1, 7, 13, 40])
def test_the_number_of_threads_changes_no_bit(dtype: Kind, rows: int) -> None:
    packed, x = pack_rows(inputs(301, 320), dtype), inputs(rows, 320, seed=1)
    expected = multiply_rows(x, packed)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(multiply_rows(x, packed), expected)
    finally:
        torch.set_num_threads(before)


@built
@pytest.mark.parametrize("rows", [5, 15])
def test_what_is_no_number_stays_in_its_row(rows: int) -> None:
    packed, x = pack_rows(inputs(9, 64), torch.bfloat16), inputs(rows, 64, seed=1)
    expected = multiply_rows(x, packed)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    y = multiply_rows(x, packed)
    assert y[1].isnan().all()
    assert not y[2].isfinite().any()
    others = [0, *range(3, rows)]
    assert torch.equal(y[others], expected[others])


@built
def test_rows_that_are_not_next_to_each_other_in_memory() -> None:
    packed, x = pack_rows(inputs(6, 32), torch.float32), inputs(32, 3).T
    torch.testing.assert_close(multiply_rows(x, packed), F.linear(x, packed.weight))


@built
@pytest.mark.parametrize("width", [5, 48, 576])
def test_rms_norm_is_that_of_torch(width: int) -> None:
    x, weight = inputs(2, 3, width), inputs(width, seed=1)
    torch.testing.assert_close(rms_norm_rows(x, weight, 1e-5), F.rms_norm(x, (width,), weight, 1e-5))


@built
@pytest.mark.parametrize("positions", [torch.arange(3, 7), torch.arange(8).view(2, 4)], ids=["shared", "by row"])
def test_only_the_first_heads_turn(positions: Tensor) -> None:
    x, table = inputs(2, 4, 5, 8), rotary(positions, head_dim=8, theta=100.0)
    expected = rotate(x[:, :, :3].transpose(1, 2), table).transpose(1, 2)
    turned = x.clone()
    rotate_rows(turned, table, 3)
    torch.testing.assert_close(turned[:, :, :3], expected)
    assert torch.equal(turned[:, :, 3:], x[:, :, 3:])


@pytest.mark.parametrize("compiler", ["false", "true", "no-such-compiler"])
def test_a_compiler_that_fails_leaves_the_products_of_torch(
    compiler: str, fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if compiler == "no-such-compiler":
        monkeypatch.setenv("PATH", str(tmp_path))  # where no other compiler is either
    with pytest.raises(NotImplementedError, match=r"row_products\.c was not built"):
        row_products.library()
    weight = inputs(8, 16)
    for dtype in (torch.bfloat16, torch.int4):
        product = packed_product.fastest_product(packed_product.products_of(dtype), [weight], rows=1)
        assert product.multiply is not multiply_rows
    assert list(tmp_path.rglob("*.so")) == []


@built
def test_the_library_is_built_once_and_found_again(
    fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    row_products.library()
    [file] = (tmp_path / "genai_pl").iterdir()
    built_at = file.stat().st_mtime_ns
    row_products.look_up.cache_clear()
    row_products.library()
    assert [file.stat().st_mtime_ns for file in (tmp_path / "genai_pl").iterdir()] == [built_at]


@built
@pytest.mark.parametrize(
    "damage",
    [
        "cut",
        *(  # each takes two builds
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in ("empty", "zeros", "writable by others", "in a folder of others")
        ),
    ],
)
def test_a_library_that_others_wrote_or_that_is_damaged_is_built_again(
    damage: str, fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The built file is stood for by a copy: what counts is which file is taken."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source, builds = row_products._build(), []
    monkeypatch.setattr(
        row_products.subprocess, "run", lambda command, **_: builds.append(shutil.copy(good, command[-1]))
    )
    good = shutil.copy(source, tmp_path / "good.so")
    content = source.read_bytes()
    if damage == "writable by others":
        source.chmod(0o777)
    elif damage == "in a folder of others":
        source.parent.chmod(0o777)
    else:
        source.write_bytes(
            {"cut": content[:12000], "empty": b"", "zeros": content[:9000].ljust(len(content), b"\0")}[damage]
        )
    found = row_products._build()
    assert len(builds) == 1
    assert found.read_bytes() == content
    assert (found.parent == source.parent) == (damage != "in a folder of others")
    row_products.library()


def test_a_compiler_that_fails_is_started_once(
    fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(row_products, "BUILD_SECONDS", 1)
    compiler = tmp_path / "cc"
    compiler.write_text(f"#!/bin/sh\necho started >> {tmp_path}/starts\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    with caplog.at_level("INFO", logger="genai_pl"):
        for _ in range(3):
            with pytest.raises(NotImplementedError, match=r"row_products\.c was not built"):
                row_products.library()
    assert (tmp_path / "starts").read_text() == "started\n"
    [line] = caplog.messages
    assert "torch's products serve instead, CC=" in line
    assert "\n" not in line


@pytest.mark.slow
@built
def test_a_cache_folder_that_is_a_file_is_passed_over(
    fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    x, packed = inputs(1, 8), pack_rows(inputs(4, 8, seed=1), torch.float32)
    torch.testing.assert_close(multiply_rows(x, packed), F.linear(x, packed.weight))
    assert blocked.read_text() == ""
