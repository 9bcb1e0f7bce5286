"""MIDI files: notes as a standard file (MIDI 1.0, RP-001) with one track and one voice."""

import struct
from collections.abc import Sequence

from genai_pl.recipes.abc import Note

TICKS = 480  # per quarter note
VIOLIN = 40  # program number of General MIDI


def midi(notes: Sequence[Note], *, quarters_per_minute: int = 180) -> bytes:
    """The bytes of a MIDI file; a pitch outside MIDI's range is a rest.

    An event is its delay in ticks, then a status byte (0x90 note on, 0x80 note off) with pitch and velocity.
    """
    track = b"\x00\xff\x51\x03" + (60_000_000 // quarters_per_minute).to_bytes(3, "big")
    track += bytes([0, 0xC0, VIOLIN])
    delay = 0
    for pitch, length, _ in notes:
        ticks = round(length * 4 * TICKS)
        if pitch is None or not 0 <= pitch < 128:
            delay += ticks
            continue
        track += _number(delay) + bytes([0x90, pitch, 80]) + _number(ticks) + bytes([0x80, pitch, 0])
        delay = 0
    track += _number(delay) + b"\xff\x2f\x00"
    header = struct.pack(">4sIHHH", b"MThd", 6, 0, 1, TICKS)
    return header + struct.pack(">4sI", b"MTrk", len(track)) + track


def _number(value: int) -> bytes:
    """A number of variable length: seven bits per byte, the highest bit set in all but the last.

    >>> _number(127).hex(), _number(128).hex()
    ('7f', '8100')
    """
    digits = [value & 0x7F]
    while value := value >> 7:
        digits.insert(0, value & 0x7F | 0x80)
    return bytes(digits)
