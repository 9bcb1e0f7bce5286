"""What a client is told when a request cannot be answered: one shape of JSON, OpenAI's, for every route."""

import json
import logging
import math
import uuid
from collections.abc import Mapping
from contextvars import ContextVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from genai_pl.config.redaction import redact
from genai_pl.errors import UserError

log = logging.getLogger("genai_pl.serving")
KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    502: "upstream_error",
    503: "unavailable_error",
    504: "timeout_error",
}
CLIENT_GONE = 499  # as nginx counts it; nobody reads it
REQUEST: ContextVar[str] = ContextVar("request")  # the number of the request that is answered: x-request-id


class ErrorDetail(BaseModel):
    """What went wrong, and which field of the request is to blame."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorDetail


class ApiError(Exception):
    """An answer with a status that is not 200.

    Where the server is to blame (5xx) the client gets the number of the request, under which the log has the message
    and the `reason`, which no client sees.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        reason: object = "",
        is_logged: bool = False,
    ) -> None:
        if status >= 500 and not is_logged:
            number = request_number()
            log.warning("request %s: %d, %s%s", number, status, message, f" ({redact(reason)})" if reason else "")
            message = f"{message} (request {number})"
        super().__init__(message)
        self.status = status
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, dict[str, object]]:
        """What is sent, as JSON values."""
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": None}}

    def response(self) -> Response:
        """The whole answer; escaped, since a client's half characters cannot be written otherwise."""
        return Response(json.dumps(self.body()), self.status, self.headers, "application/json")


def request_number() -> str:
    """The number of the request that is answered, or a new one where there is none."""
    return REQUEST.get(None) or uuid.uuid4().hex[:12]


def too_busy(seconds: float) -> ApiError:
    """The answer when no more requests can wait."""
    return ApiError(
        429, "too many requests wait already: try again later", headers={"Retry-After": str(max(1, math.ceil(seconds)))}
    )


class ClientGone(Exception):
    """Whoever asked has closed the connection."""


def unexpected(error: BaseException) -> ApiError:
    """An error of ours: its traceback goes to the log, its number to the client."""
    number = request_number()
    log.error("error %s", number, exc_info=error)
    return ApiError(500, f"the server failed; the log has the reason under {number}", is_logged=True)


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of an error."""
    if isinstance(error, ApiError):
        return error
    return ApiError(400, str(error)) if isinstance(error, UserError) else unexpected(error)


def install(app: FastAPI) -> None:
    """Let every error that a route raises be answered in the one shape."""

    async def known_error(request: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    async def http_error(request: Request, error: HTTPException) -> Response:
        return ApiError(error.status_code, str(error.detail), headers=error.headers).response()

    async def invalid_body(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body" and not _names_a_type(part))
        if first["type"] == "json_invalid":
            return ApiError(422, f"the body is not JSON (at character {where})").response()
        if not where and "json" not in request.headers.get(
            "content-type", ""
        ):  # other kinds could come from any web page
            return ApiError(422, "send JSON, with the header Content-Type: application/json").response()
        return ApiError(422, f"{where or 'body'}: {first['msg']}", param=where or None).response()

    app.add_exception_handler(ApiError, known_error)
    app.add_exception_handler(UserError, known_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, invalid_body)


def _names_a_type(part: str | int) -> bool:
    """Whether pydantic means a member of a union, not a field."""
    return isinstance(part, str) and ("[" in part or part in ("str", "constrained-str"))


def documented(*statuses: int) -> dict[int | str, dict[str, object]]:
    """For OpenAPI: the errors that a route may answer with."""
    return {status: {"model": ErrorBody} for status in statuses}


def json_response(content: object, status: int = 200) -> JSONResponse:
    """An answer in JSON."""
    return JSONResponse(content, status)
