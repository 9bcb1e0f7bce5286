"""Endpoints: JSON requests to servers of OpenAI's API, asked again when they fail."""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass

from genai_pl.errors import ConfigError

ADDRESSES = ("http://", "https://")
LONGEST_WAIT = 30  # seconds between two attempts
PASSING = {408, 409, 425, 429}  # statuses of requests that may succeed later, beside those of 500 and above


@dataclass(frozen=True)
class Endpoint:
    """A server of OpenAI's API.

    url: base address, up to and with /v1. option: the option that names it, for messages. key: bearer token. timeout: seconds
    of one request. retries: further attempts, with waiting times of 1, 2, 4, ... up to 30 s.
    """

    url: str
    option: str
    key: str = ""
    timeout: float = 120.0
    retries: int = 0

    def ask(self, route: str, body: Mapping[str, object] | None = None) -> dict[str, object]:
        """The answer to a POST of a body, or to a GET; ConfigError in one line when the last attempt fails.

        A request that the server refuses (400, 401, 404, ...) is not repeated.
        """
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url.rstrip('/')}/{route}", data, headers)
        for attempt in range(self.retries + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    answer = json.load(reply)
                if isinstance(answer, dict):
                    return answer
                reason = "its answer is no JSON object"
            except urllib.error.HTTPError as error:
                reason = _reason(error)
                if error.code < 500 and error.code not in PASSING:
                    break
            except (
                OSError,
                ValueError,
                http.client.HTTPException,
            ) as error:  # no connection, a timeout, half an answer
                reason = str(getattr(error, "reason", error))
            if attempt < self.retries:
                time.sleep(min(2**attempt, LONGEST_WAIT))
        raise self.error(f"no answer ({reason})")

    def error(self, problem: str) -> ConfigError:
        """An error that names the option and the address."""
        return ConfigError(f"{self.option}={self.url}: {problem}")


def _reason(error: urllib.error.HTTPError) -> str:
    """The status of a refusal, and the message in its body."""
    try:
        found = json.loads(error.read(10_000))
        message = found.get("error", found)
        message = message.get("message", "") if isinstance(message, dict) else message
    except (OSError, ValueError, AttributeError):
        message = ""
    text = " ".join(str(message).split())[:200]
    return f"{error.code} {error.reason}{': ' if text else ''}{text}"
