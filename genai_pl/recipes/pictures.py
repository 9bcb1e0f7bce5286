"""Pictures as text and back, one character per pixel by its darkness; grids of pictures as PNG."""

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from genai_pl.atomic_io import write_atomic

RAMP = " .'`,:;-~=+*%&$#@"  # the 17 grey levels of the digits, 0 to 16


def to_text(picture: np.ndarray) -> str:
    """A picture (H, W) of levels 0 to 16 as H lines of W characters.

    >>> to_text(np.array([[0, 16], [8, 0]]))
    ' @\\n~ '
    """
    return "\n".join("".join(RAMP[level] for level in row) for row in picture)


def from_text(text: str, height: int) -> np.ndarray | None:
    """The picture (H, W) of the first `height` lines; None if they are not that many, unequal or of other characters."""
    rows = [[RAMP.find(character) for character in line] for line in text.strip("\n").split("\n")[:height]]
    width = len(rows[0])
    is_picture = len(rows) == height and width and all(len(row) == width and min(row) >= 0 for row in rows)
    return np.array(rows) if is_picture else None


def grid(rows: Sequence[Sequence[np.ndarray | None]], *, scale: int = 6, gap: int = 2) -> np.ndarray:
    """Grey values (H, W) uint8 of pictures side by side, dark on white; None stays grey."""
    known = [picture for row in rows for picture in row if picture is not None]
    height = max((picture.shape[0] for picture in known), default=1)
    width = max((picture.shape[1] for picture in known), default=1)
    canvas = np.full((len(rows) * (height + gap) + gap, max(map(len, rows)) * (width + gap) + gap), 160, np.uint8)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            if picture is not None:
                top, left = y * (height + gap) + gap, x * (width + gap) + gap
                levels = 255 - np.asarray(picture) * 255 // (len(RAMP) - 1)
                canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = levels
    return canvas.repeat(scale, axis=0).repeat(scale, axis=1)


def png(pixels: np.ndarray) -> bytes:
    """The bytes of a PNG file (ISO/IEC 15948) of grey values (H, W) uint8."""
    height, width = pixels.shape
    lines = np.insert(pixels, 0, 0, axis=1).tobytes()  # each line begins with its filter: none
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Write a PNG file of grey values (H, W) uint8."""
    write_atomic(path, lambda part: part.write_bytes(png(pixels)))
