"""Passwords in what is printed."""

import pytest

from genai_pl.config.redaction import redact

SHOWN = {
    "redis://:hunter2@host:6379/0": "redis://***@host:6379/0",
    "rediss://me:hunter2@host/0?ssl_cert_reqs=none": "rediss://***@host/0?ssl_cert_reqs=none",
    "redis://:hun@ter/2@host:6379/0": "redis://***@host:6379/0",
    "redis://host/0?password=hunter2&db=1": "redis://host/0?password=***&db=1",
    "url=http://me:hunter2@host/v1: refused": "url=http://***@host/v1: refused",
    "http://host:8000/v1": "http://host:8000/v1",
    "api_keys=none.txt: cannot be read": "api_keys=none.txt: cannot be read",
    "memory": "memory",
}


@pytest.mark.parametrize("text", SHOWN)
def test_a_password_is_never_in_what_is_shown(text: str) -> None:
    assert redact(text) == SHOWN[text]
