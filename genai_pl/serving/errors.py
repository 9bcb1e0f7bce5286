"""Errors of the HTTP API: one JSON shape, OpenAI's, for every route and every failure (below /v1/messages Anthropic's).

A client's mistake (4xx) is explained to the client. A failure of the server (5xx) is explained in the log, under the request
id that the client gets: messages of libraries may contain paths, addresses or passwords.
"""

import json
import logging
import math
import uuid
from collections.abc import Mapping, Sequence
from contextvars import ContextVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from genai_pl.config.redaction import redact
from genai_pl.errors import UserError

log = logging.getLogger("genai_pl.serving")
KINDS = {  # `type` of the error by status; any other status is invalid_request_error
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    502: "upstream_error",
    503: "unavailable_error",
    504: "timeout_error",
}
ANTHROPIC_KINDS = {  # the same in Anthropic's API, for the paths below ANTHROPIC_PATH
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
ANTHROPIC_PATH = "/v1/messages"
CLIENT_GONE = 499  # nginx's status for a client that left, only for metrics
REQUEST: ContextVar[str] = ContextVar("request")  # the request id, which is also x-request-id
IS_ANTHROPIC: ContextVar[bool] = ContextVar("anthropic", default=False)  # whose errors the current request gets


class ErrorDetail(BaseModel):
    """The inner object of an error.

    message: one sentence for the client
    type: KINDS
    param: the field of the request that is to blame
    code: always null here; OpenAI's clients read it
    """

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """JSON body of every error: {"error": {...}}."""

    error: ErrorDetail


class ApiError(Exception):
    """An exception that becomes an error answer.

    status: HTTP status
    message: for the client; with status >= 500 the request id is added
    param: the field that is to blame
    headers: for example Retry-After, WWW-Authenticate
    reason: for the log only, with passwords masked
    is_logged: the caller has written the log line of a status >= 500 already
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
        # a server's failure: the reason to the log, the request id to the client
        if status >= 500 and not is_logged:
            number = request_number()
            log.warning("request %s: %d, %s%s", number, status, message, f" ({redact(reason)})" if reason else "")
            message = f"{message} (request {number})"
        super().__init__(message)
        self.status = status
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, object]:
        """The body as JSON values, for an answer or for the last event of a stream; Anthropic's shape for its routes."""
        if IS_ANTHROPIC.get():
            kind = "api_error" if self.status >= 500 else "invalid_request_error"
            detail = {"type": ANTHROPIC_KINDS.get(self.status, kind), "message": str(self)}
            return {"type": "error", "error": detail, "request_id": request_number()}
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": None}}

    def response(self) -> Response:
        """The answer; JSON escapes non-ASCII, since a message may quote half a surrogate pair, which UTF-8 cannot encode."""
        status = 400 if IS_ANTHROPIC.get() and self.status == 422 else self.status  # a status that its clients know
        return Response(json.dumps(self.body()), status, self.headers, "application/json")


def request_number() -> str:
    """The id of the current request, or a new id outside of requests."""
    return REQUEST.get(None) or uuid.uuid4().hex[:12]


def too_busy(seconds: float) -> ApiError:
    """ApiError 429 with Retry-After in whole seconds, at least one."""
    return ApiError(
        429, "too many requests wait already: try again later", headers={"Retry-After": str(max(1, math.ceil(seconds)))}
    )


class ClientGone(Exception):
    """The client has closed the connection: work for it stops, and no answer is sent."""


def unexpected(error: BaseException) -> ApiError:
    """ApiError 500 of an unexpected exception: traceback to the log, request id to the client."""
    number = request_number()
    log.error("error %s", number, exc_info=error)
    return ApiError(500, f"the server failed; the log has the reason under {number}", is_logged=True)


def as_api_error(error: Exception) -> ApiError:
    """The answer to an exception: a UserError is the client's mistake (400), an unknown exception the server's (500)."""
    if isinstance(error, ApiError):
        return error
    return ApiError(400, str(error)) if isinstance(error, UserError) else unexpected(error)


def install(app: FastAPI) -> None:
    """Register handlers that answer every exception of a route, and FastAPI's own errors, in this shape."""

    async def known_error(request: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    async def http_error(request: Request, error: HTTPException) -> Response:
        path, detail = request.url.path[:80], str(error.detail)
        if detail == "Not Found":  # Starlette's, of a path that has no route
            detail = f"{path}: no such route of this server; /docs lists them"
        elif error.status_code == 405:
            detail = f"{path}: not by {request.method}; /docs lists the routes"
        elif error.status_code == 400 and detail.startswith("There was an error parsing"):
            detail = "the body cannot be read: it is nested too deeply, or a number in it has too many digits"
        return ApiError(error.status_code, detail, headers=error.headers).response()

    async def invalid_body(request: Request, error: RequestValidationError) -> Response:
        first = _most_telling(error.errors())
        where = ".".join(str(part) for part in first["loc"][1:] if not _names_a_type(part))  # after body or query
        if first["type"] == "json_invalid":
            return ApiError(422, f"the body is not JSON (at character {where})").response()
        # a form could be sent from any web page without the browser asking (CORS): JSON cannot
        if not where and "json" not in request.headers.get("content-type", ""):
            return ApiError(422, "send JSON, with the header Content-Type: application/json").response()
        if first["type"] == "value_error":  # our own sentence; one about the whole body names its field itself
            told = str(first["ctx"]["error"])
            return ApiError(422, f"{where}: {told}" if where else told, param=where or None).response()
        told = first["msg"]
        if first["type"] == "literal_error" and isinstance(first["input"], str):
            told += f", not '{first['input'][:80]}'"
        return ApiError(422, f"{where or 'body'}: {told}", param=where or None).response()

    app.add_exception_handler(ApiError, known_error)
    app.add_exception_handler(UserError, known_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, invalid_body)


def _most_telling(mistakes: Sequence[dict]) -> dict:
    """The mistake to name of those that pydantic lists, all of the first field that has any.

    A field with several types has the mistakes of each: an empty list, or a block of an unknown type, is no wrong type, and
    what is wrong deep inside tells more than that a list is no text.
    """
    of_field = [each for each in mistakes if each["loc"][:2] == mistakes[0]["loc"][:2]]
    known = (each for each in of_field if each["type"] in ("too_short", "union_tag_invalid"))
    depth = [sum(not _names_a_type(part) for part in each["loc"]) for each in of_field]
    return next(known, of_field[depth.index(max(depth))])


def _names_a_type(part: str | int) -> bool:
    """True for a part of pydantic's location that names a member of a union, not a field; classes begin with a capital."""
    return isinstance(part, str) and ("[" in part or part[:1].isupper() or part in ("str", "constrained-str"))


def documented(*statuses: int) -> dict[int | str, dict[str, object]]:
    """The `responses` of a route for OpenAPI: these statuses with ErrorBody."""
    return {status: {"model": ErrorBody} for status in statuses}


def json_response(content: object, status: int = 200) -> JSONResponse:
    """A small answer in JSON; a large one is `http.rendering.json_answer`."""
    return JSONResponse(content, status)
