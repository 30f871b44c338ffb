"""Errors as OpenAI's clients read them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from lockstep.engine.errors import RequestError
from lockstep.executor.contract import ExecutorError
from lockstep.frontend.errors import PromptError
from lockstep.frontend.streams import SHUTTING_DOWN, CallLate, CallRefused
from lockstep.observability.logging import get_logger

TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
TOO_LONG = "context_length_exceeded"  # the code of a prompt that does not fit
AGAIN = {"retry-after": "1"}  # while the engine, or a replica, is started again
TRIED = {"str", "int", "float", "bool", "none", "literal"}
_log = get_logger(__name__)


class ApiError(Exception):
    """Becomes the response. param: the field that is wrong. code: a word that programs can compare."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, dict(headers or {})


class ErrorDetail(BaseModel):
    """param: the field that is wrong. code: a word that programs can compare."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """What every answer is that is not a success."""

    error: ErrorDetail


# For OpenAPI, which would tell of FastAPI's own 422 otherwise.
DOCUMENTED: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is wrong, or refused for now"},
    "5XX": {"model": ErrorBody, "description": "It cannot be run now: see code"},
}


def body_of(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The JSON of an error."""
    kind = TYPES.get(status, "rate_limit_error" if status == 429 else "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def as_api_error(error: Exception) -> ApiError:
    """What any exception is to a client. What is not expected is logged, and its text is not told."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError | PromptError | ValueError):
        return ApiError(400, str(error))
    if isinstance(error, ExecutorError):
        if str(error) == SHUTTING_DOWN:
            return ApiError(503, SHUTTING_DOWN, code="shutting_down", headers=AGAIN)
        return ApiError(503, f"the engine cannot run requests: {error}", code="engine_dead", headers=AGAIN)
    if isinstance(error, CallRefused | CallLate):
        _log.warning("%s", error)
        return ApiError(503, str(error), code="unavailable", headers=AGAIN)
    _log.error("a request failed by our fault", exc_info=error)
    return ApiError(500, "internal error: see the server's log.", code="internal_error")


def respond(error: ApiError) -> JSONResponse:
    return JSONResponse(body_of(error.status, error.message, error.param, error.code), error.status, headers=error.headers)


def field_of(location: Sequence[int | str]) -> str:
    """Where a field is in the body, like messages.0.role: without the names of the types that were tried for it."""
    where = (str(part) for part in location if part != "body")
    return ".".join(
        part for part in where if re.fullmatch(r"\w{1,64}", part) and part not in TRIED and part[0].islower() | part[0].isdigit()
    )


def telling(found: Sequence[Any]) -> Any:
    """The error that says most, of those that each form of the first wrong field has: a broken limit, rather than another type."""
    top = [one for one in found if one["loc"][:2] == found[0]["loc"][:2]]
    return next((one for one in top if not one["type"].endswith("_type")), found[0])


def _needs_content_type(request: Request) -> bool:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return "json" in request.scope["state"] and not (kind == "application/json" or kind.endswith("+json"))


def install(app: FastAPI) -> None:
    """Have every exception of a route answered in this shape."""

    async def any_error(request: Request, error: Exception) -> JSONResponse:
        return respond(as_api_error(error))

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = telling(error.errors())
        if first["loc"] == ("body",) and _needs_content_type(request):
            message = "the header Content-Type does not say that the body is JSON: send Content-Type: application/json."
            return respond(ApiError(400, message, param="Content-Type", code="invalid_content_type"))
        where = "" if first["type"] == "json_invalid" else field_of(first["loc"])
        message = str(first["msg"]).removeprefix("Value error, ")
        return respond(ApiError(400, message if not where else f"{where}: {message}", param=where or None))

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = f"{request.method} {request.url.path}: {error.detail}"
        return respond(ApiError(error.status_code, message, headers=error.headers))

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    for kind in (ApiError, ExecutorError, CallRefused, CallLate, ValueError, Exception):
        app.add_exception_handler(kind, any_error)
