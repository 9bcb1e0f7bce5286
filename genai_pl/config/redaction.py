"""Secrets: refused on command lines that a run folder would keep, and redacted in everything that is printed.

A run folder is copied, shared and uploaded, and it holds the command line. Keys therefore belong in environment
variables, referred to as `${oc.env:NAME}`. Detection is by shape: passwords in URLs, query parameters with a
telling name, prefixes of well-known keys, options named like a secret. Values that the environment supplied are
registered and replaced by their reference, whatever they look like.
"""

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
# "per_token" counts something for each token of a text
SECRET_NAMES = re.compile(r"(?i)(?:^|_)(?:password|passwd|secret|(?<!per_)token|api_?key|access_key|credentials?)$")
MASK = "***"

_replacements: dict[str, str] = {}  # values that came from the environment: what is printed in their place


def register_secret(value: str, replacement: str) -> None:
    """Print `replacement` wherever `value` would be printed from now on. Values of up to 3 characters would hit
    ordinary words.
    """
    if len(value) > 3:  # a shorter one would take letters out of words
        _replacements[value] = replacement


def redact(text: object) -> str:
    """The text with registered values, passwords in addresses and keys of known shapes replaced.

    >>> redact("redis://:pass@host:6379/0 and https://h/v1?api_key=abc")
    'redis://***@host:6379/0 and https://h/v1?api_key=***'
    """
    text = str(text)
    for value, replacement in _replacements.items():
        text = text.replace(value, replacement)
    text = USER_INFO.sub(f"{MASK}@", text)
    return KEY_SHAPES.sub(MASK, SECRET_QUERY.sub(rf"\1{MASK}", text))


def contains_secret(argument: str) -> bool:
    """True if an override gives a password or key in plain text, by its value's shape or its option's name.

    >>> contains_secret("logger.api_key=abc"), contains_secret("logger.api_key=${oc.env:KEY}")
    (True, False)
    """
    key, _, value = argument.partition("=")
    if any(pattern.search(value) for pattern in (USER_PASSWORD, SECRET_QUERY, KEY_SHAPES)):
        return True
    return bool(SECRET_NAMES.search(key.rpartition(".")[2])) and value not in ("", "null") and "${oc.env:" not in value


def refuse_secrets(arguments: Iterable[str]) -> None:
    """ConfigError for the first secret on a command line, with the environment variable to use instead."""
    for argument in arguments:
        if contains_secret(argument):
            key = argument.partition("=")[0].lstrip("+~")
            raise ConfigError(
                f"{key}: holds a password or key, which the run folder would keep; put it into an environment variable "
                f"and write {key}='${{oc.env:NAME}}'"
            )
