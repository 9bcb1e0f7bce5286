"""Text without the passwords in it, for whatever is printed, logged, stored or sent."""

import re

HIDDEN = "***"
USER_INFO = re.compile(r"(?<=://)[^\s'\"]*@")  # up to the last @: a password may hold any sign
QUERY = re.compile(
    r"([?&](?:user|username|password|passwd|secret|token|key|api_?key|access_key)=)[^&\s'\"]*", re.IGNORECASE
)


def redacted(text: object) -> str:
    """The text with *** for names and passwords in URLs: `redis://:secret@host/0` becomes `redis://***@host/0`."""
    return QUERY.sub(rf"\g<1>{HIDDEN}", USER_INFO.sub(f"{HIDDEN}@", str(text)))
