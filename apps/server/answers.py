"""Answers: errors in the shape of the API that was called, and waiting for jobs with an eye on the client."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from .events import Event
from .failure import Failure, describe, public, stopped
from .guard import Refusal
from .job import Job
from .service import Service

LOG = logging.getLogger("edge_sd.server")
RETRY_AFTER = {"retry-after": "5"}


class Problem(BaseModel):
    """An error of the own API."""

    detail: str
    kind: str


class OpenAIError(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class OpenAIProblem(BaseModel):
    """An error of the OpenAI API."""

    error: OpenAIError


class A1111Problem(BaseModel):
    """An error of the AUTOMATIC1111 API."""

    error: str
    detail: str
    body: str = ""
    errors: str


def problems(model: type[BaseModel], statuses: Sequence[int] = ()) -> dict[int | str, dict[str, Any]]:
    """The errors that any route of an API may answer, for its schema."""
    every = (400, 401, 403, 404, 405, 408, 409, 413, 422, 429, 500, 501, 503, 507, *statuses)
    return {status: {"model": model, "description": "an error"} for status in every}


def error_response(
    path: str, failure: Failure, param: str | None = None, headers: dict[str, str] | None = None
) -> Response:
    """An error as the API under `path` words it."""
    headers = {**(RETRY_AFTER if failure.status == 429 else {}), **(headers or {})}
    content: dict[str, Any]
    if path.startswith("/v1/"):
        kind = "invalid_request_error" if failure.status < 500 else "server_error"
        kind = "rate_limit_error" if failure.status == 429 else kind
        kind = "authentication_error" if failure.status == 401 else kind
        content = {"error": {"message": failure.message, "type": kind, "param": param, "code": failure.kind}}
    elif path.startswith("/sdapi/"):
        content = {"error": failure.kind, "detail": failure.message, "body": "", "errors": failure.message}
    else:
        content = {"detail": failure.message, "kind": failure.kind}
    return JSONResponse(content, failure.status, headers)


def refuse(path: str, refusal: Refusal) -> Response:
    """What the guard answers."""
    kinds = {401: "unauthorized", 403: "forbidden", 408: "too_slow", 413: "too_large"}
    failure = Failure(refusal.status, kinds.get(refusal.status, "invalid_request"), refusal.message)
    return error_response(path, failure, headers=refusal.headers)


async def on_error(request: HttpRequest, error: Exception) -> Response:
    """Any exception of a route."""
    if isinstance(error, RequestValidationError):
        param, message = _mistake(error.errors()[0])
        failure = Failure(400 if request.url.path.startswith("/v1/") else 422, "invalid_request", message)
        return error_response(request.url.path, failure, param)
    if isinstance(error, HTTPException):
        kinds = {404: "not_found", 405: "method_not_allowed"}
        failure = Failure(error.status_code, kinds.get(error.status_code, "invalid_request"), public(str(error.detail)))
        return error_response(request.url.path, failure, headers=dict(error.headers or {}))
    failure = describe(error)
    if failure.status == 500 and failure.kind == "error":
        LOG.error("%s %s", request.method, request.url.path, exc_info=error)
    return error_response(request.url.path, failure, getattr(error, "param", None))


def _mistake(found: dict[str, Any]) -> tuple[str | None, str]:
    """The field that pydantic found to be wrong, if it is one of the request's, and what is wrong, in a line."""
    if found["type"] == "json_invalid":
        # The place is a number of characters, not a field.
        return None, public(f"the body is no JSON: {found['ctx']['error']}, at character {found['loc'][-1]}")
    if found["type"] == "missing" and found["loc"] == ("body",):
        return None, "the body is missing: a JSON object is needed"
    where = [str(part) for part in found["loc"] if part not in ("body", "query", "path")]
    param = public(".".join(where))[:100] or None
    what = "is not a field of this request" if found["type"] == "extra_forbidden" else found["msg"]
    return param, public(f"{param}: {what}" if param else what)


async def finished(request: HttpRequest, service: Service, job: Job) -> None:
    """Wait for a job. One whose pictures are kept nowhere is cancelled when its client goes.

    Raises what the job did, or Stopping where the server stops before it is done; kept ones are drawn by the next one.
    """
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()

    def on_event(event: Event | None) -> None:
        if event is None:
            loop.call_soon_threadsafe(stopping.set)

    ended: asyncio.Future[Any] = asyncio.wrap_future(job.ended)
    others: list[asyncio.Future[Any]] = [asyncio.ensure_future(stopping.wait())]
    if not job.keep:
        others.append(asyncio.ensure_future(_gone(request)))
    try:
        with service.events.listening(on_event):
            await asyncio.wait([ended, *others], return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            if stopping.is_set():
                raise stopped()
            service.cancel(job)
            await asyncio.wait([ended])
    finally:
        for other in others:
            other.cancel()
        if not ended.done() and not job.keep:
            service.cancel(job)
    job.check()


async def _gone(request: HttpRequest) -> None:
    """Wait until the client closes its connection. The body has been read, so nothing else comes."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def sse(data: dict[str, Any], event: str | None = None) -> bytes:
    """One server-sent event."""
    head = f"event: {event}\n" if event else ""
    return f"{head}data: {json.dumps(data)}\n\n".encode()
