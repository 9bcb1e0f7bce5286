"""Notes as a standard MIDI file (MIDI 1.0, RP-001): one track, one voice."""

import struct
from collections.abc import Sequence

from genai_pl.recipes.abc import Note

TICKS = 480  # of a quarter note
VIOLIN = 40  # of the programs of General MIDI


def midi(notes: Sequence[Note], *, quarters_per_minute: int = 180) -> bytes:
    """The bytes of the file; a pitch that MIDI does not have is a rest."""
    track = b"\x00\xff\x51\x03" + (60_000_000 // quarters_per_minute).to_bytes(3, "big")
    track += bytes([0, 0xC0, VIOLIN])
    waiting = 0
    for pitch, length, _ in notes:
        ticks = round(length * 4 * TICKS)
        if pitch is None or not 0 <= pitch < 128:
            waiting += ticks
            continue
        track += _number(waiting) + bytes([0x90, pitch, 80]) + _number(ticks) + bytes([0x80, pitch, 0])
        waiting = 0
    track += _number(waiting) + b"\xff\x2f\x00"
    header = struct.pack(">4sIHHH", b"MThd", 6, 0, 1, TICKS)
    return header + struct.pack(">4sI", b"MTrk", len(track)) + track


def _number(value: int) -> bytes:
    """A number of variable length: seven bits a byte, all but the last with the highest bit set."""
    digits = [value & 0x7F]
    while value := value >> 7:
        digits.insert(0, value & 0x7F | 0x80)
    return bytes(digits)
