"""Endpoints: JSON requests to servers of OpenAI's API, asked again when they fail."""

import http.client
import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass

from genai_pl.errors import ConfigError

log = logging.getLogger(__name__)

ADDRESSES = ("http://", "https://")
LONGEST_WAIT = 30  # seconds between two attempts, unless the server names a longer time
LONGEST_NAMED_WAIT = 300  # seconds that a server may name (Retry-After)
PASSING = {408, 409, 425, 429}  # statuses of requests that may succeed later, beside those of 500 and above


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Leaves redirects to the caller: one would lose the body, and take the key to another host."""

    def redirect_request(self, *_: object) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


@dataclass(frozen=True)
class Endpoint:
    """A server of OpenAI's API.

    url: base address, up to and with /v1. option: the option that names it, for messages. key: bearer token. timeout: seconds
    of one request, its answer included. retries: further attempts, with waiting times of 1, 2, 4, ... up to 30 s, or what the
    server asks for, up to 300 s.
    """

    url: str
    option: str
    key: str = ""
    timeout: float = 120.0
    retries: int = 0

    def ask(self, route: str, body: Mapping[str, object] | None = None) -> dict[str, object]:
        """The answer to a POST of a body, or to a GET; ConfigError in one line when the last attempt fails.

        A request that the server refuses (400, 401, 404, a redirect, ...) is not repeated.
        """
        request = self._request(route, body)
        for attempt in range(self.retries + 1):
            wait = min(2**attempt, LONGEST_WAIT)
            try:
                return self._answer(request)
            except urllib.error.HTTPError as error:
                reason = self._reason(error)
                if error.code < 500 and error.code not in PASSING:
                    break
                wait = max(wait, _named_wait(error))
            except (http.client.InvalidURL, OverflowError) as error:  # such as a port of 99999
                reason = str(error)
                break
            except (OSError, ValueError, http.client.HTTPException) as error:
                # no connection, a timeout, half an answer, none in JSON
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            if attempt < self.retries:
                if attempt == 1:
                    log.info("waiting     %s=%s: no answer (%s), asked again", self.option, self.url, _short(reason))
                time.sleep(wait)
        raise self.error(f"no answer ({_short(reason)})")

    def error(self, problem: str) -> ConfigError:
        """An error that names the option and the address."""
        return ConfigError(f"{self.option}={self.url}: {problem}")

    def _request(self, route: str, body: Mapping[str, object] | None) -> urllib.request.Request:
        """The request; ConfigError for an address or a key that cannot be sent. The key is in no message."""
        key = self.key.strip()
        if not (key.isascii() and key.isprintable()):
            raise self.error("its key has characters that no header may have: set the variable to the key alone")
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        data = None if body is None else json.dumps(body).encode()
        try:
            return urllib.request.Request(f"{self.url.rstrip('/')}/{route}", data, headers)
        except ValueError as error:
            raise self.error(f"is no address ({error}); write http://host:port/v1") from None

    def _answer(self, request: urllib.request.Request) -> dict[str, object]:
        """The JSON object of an answer that is whole within the time of a request."""
        deadline, parts = time.monotonic() + self.timeout, []
        with _OPENER.open(request, timeout=self.timeout) as reply:
            while part := reply.read1(1 << 16):
                parts.append(part)
                if time.monotonic() > deadline:
                    raise TimeoutError("timed out")
            if reply.length:  # bytes that are missing
                raise http.client.IncompleteRead(b"", reply.length)
        try:
            answer = json.loads(b"".join(parts))
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise ValueError("its answer is no JSON object")
        return answer

    def _reason(self, error: urllib.error.HTTPError) -> str:
        """The status of a refusal, with the message in its body, where it is moved to, or what addresses end in."""
        try:
            found = json.loads(error.read(10_000))
            message = found.get("error", found)
            message = message.get("message", "") if isinstance(message, dict) else message
        except (OSError, ValueError, AttributeError, RecursionError, http.client.HTTPException):
            message = ""
        if 300 <= error.code < 400:
            message = f"it is at {error.headers.get('Location', 'another address')}"
        elif error.code == 404 and not self.url.rstrip("/").endswith("/v1"):
            message = "the address ends in /v1"
        return f"{error.code} {error.reason}{': ' if message else ''}{message}"


def _named_wait(error: urllib.error.HTTPError) -> float:
    """The seconds after which a server wants to be asked again, 0 where it names none (RFC 9110, 10.2.3, without dates)."""
    value = error.headers.get("Retry-After", "").strip()
    return min(int(value), LONGEST_NAMED_WAIT) if value.isascii() and value.isdigit() else 0


def _short(reason: str) -> str:
    """The reason in one line."""
    return " ".join(reason.split())[:200]
