"""Secrets: none is taken where it would be written down, and none is printed."""

import re
from collections.abc import Iterable

from genai_pl.errors import ConfigError

USER_PASSWORD = re.compile(r"(://)[^/\s'\"@]*:[^/\s'\"@]+@")  # scheme://user:password@host
USER_INFO = re.compile(r"(?<=://)[^\s'\"]*@")  # up to the last @: a password may hold any sign
SECRET_QUERY = re.compile(
    r"(?i)([?&](?:x-amz-signature|x-amz-credential|signature|sig|access_token|token|api_?key|access_key|key|secret|user|"
    r"username|password|passwd)=)[^&\s'\"]+"
)
KEY_SHAPES = re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|gh[opsu]_[A-Za-z0-9]{16,}|AKIA[A-Z0-9]{16})")
SECRET_NAMES = re.compile(r"(?i)(?:^|_)(?:password|passwd|secret|token|api_?key|access_key|credentials?)$")
MASK = "***"

_replacements: dict[str, str] = {}  # values that came from the environment: what is printed in their place


def register_secret(value: str, replacement: str) -> None:
    """Print `shown` wherever the value would stand from now on."""
    if len(value) > 3:  # a shorter one would take letters out of words
        _replacements[value] = replacement


def redact(text: object) -> str:
    """The text without passwords and keys: of addresses (`redis://:secret@host` becomes `redis://***@host`), of known
    shapes, and those that the environment brought."""
    text = str(text)
    for value, replacement in _replacements.items():
        text = text.replace(value, replacement)
    text = USER_INFO.sub(f"{MASK}@", text)
    return KEY_SHAPES.sub(MASK, SECRET_QUERY.sub(rf"\1{MASK}", text))


def contains_secret(argument: str) -> bool:
    """Whether an override gives a password or a key in plain text."""
    key, _, value = argument.partition("=")
    if any(pattern.search(value) for pattern in (USER_PASSWORD, SECRET_QUERY, KEY_SHAPES)):
        return True
    return bool(SECRET_NAMES.search(key.rpartition(".")[2])) and value not in ("", "null") and "${oc.env:" not in value


def refuse_secrets(arguments: Iterable[str]) -> None:
    """ConfigError for a secret on a command line that a run folder would keep."""
    for argument in arguments:
        if contains_secret(argument):
            key = argument.partition("=")[0].lstrip("+~")
            raise ConfigError(
                f"{key}: holds a password or key, which the run folder would keep; put it into an environment variable "
                f"and write {key}='${{oc.env:NAME}}'"
            )
