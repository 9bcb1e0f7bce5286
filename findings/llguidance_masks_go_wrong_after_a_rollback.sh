#!/usr/bin/env bash
# llguidance 1.9.1 (and 1.5.1, 1.6.1, 1.7.0 and 1.7.6; 1.3.0 and 1.4.0 are right): a matcher that is asked for a mask, rolled back and led along another text may give the mask
# of the text that it was rolled back from. Rolling back is what it is there for: speculative decoding drops rejected drafts so,
# and beams or rows of a batch can share a matcher. Nothing raises at that moment: the mask allows tokens that the matcher itself
# refuses when they come, and forbids the one that a right text needs. Only some pairs of texts are met, and a matcher that
# was asked for no mask before its rollback is right. A deep copy per text, or a new matcher that reads the text again, is right.
# Seen: after {"n":91 and a comma and a space the mask is that of {"n": 9 and a space, "blanks or a comma", where a new
# matcher allows "blanks or a quotation mark"; the matcher then refuses the comma.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "llguidance==${LLGUIDANCE:-1.9.1}"
cat > "$work/rollback.py" <<'PY'
import json

from llguidance import LLMatcher, LLTokenizer

BYTES = LLTokenizer("byte")  # a token for each byte
NUMBER = {"type": "integer"}
SCHEMA = {"type": "object", "properties": {"n": NUMBER, "t": NUMBER}, "required": ["n", "t"], "additionalProperties": False}
GRAMMAR = LLMatcher.grammar_from_json_schema(json.dumps(SCHEMA))
FIRST, SECOND = b'{"n": 9 ', b'{"n":91, '
SHARED = len(b'{"n":')


def after(text: bytes) -> LLMatcher:
    matcher = LLMatcher(BYTES, GRAMMAR)
    assert matcher.consume_tokens(list(text))
    return matcher


def allowed(matcher: LLMatcher) -> bytes:
    bits = matcher.compute_bitmask()
    return bytes(b for b in range(256) if bits[b // 8] >> (b % 8) & 1)


def turned_back(*, asks: bool) -> LLMatcher:
    """A matcher that has read FIRST, perhaps been asked for its mask, and reads SECOND from where the two part."""
    matcher = after(FIRST)
    if asks:
        allowed(matcher)
    assert matcher.rollback(len(FIRST) - SHARED)
    assert matcher.consume_tokens(list(SECOND[SHARED:]))
    return matcher


right, first = allowed(after(SECOND)), allowed(after(FIRST))
silent, wrong = allowed(turned_back(asks=False)), allowed(turned_back(asks=True))
print(f"after {SECOND!r}: new matcher {right!r}, rolled back {silent!r}, rolled back after a mask {wrong!r}")
print(f"after {FIRST!r}: {first!r}")
assert right == silent == b'\t\n\r "'
assert wrong == first == b"\t\n\r ,"
assert not turned_back(asks=True).consume_tokens(list(b","))  # what its own mask allows
PY
"$work/venv/bin/python" "$work/rollback.py"
