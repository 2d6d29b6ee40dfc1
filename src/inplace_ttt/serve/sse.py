"""Answers that come piece by piece, as server-sent events; and waiting for a client that may leave."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import ValidationError
from pydantic_core import to_json
from starlette.exceptions import HTTPException

from ..errors import UserError
from .jobs import Job
from .settings import InternalError, ServeError

log = logging.getLogger("inplace_ttt.serve")


class Json(JSONResponse):
    """A response in JSON, with null for nan and infinity, which JSON does not have."""

    def render(self, content: Any) -> bytes:
        return to_json(content, inf_nan_mode="null")


async def streamed(
    job: Job, request: Request, lines: Callable[[Any], list[Any]], end: Callable[[Any], list[Any]]
) -> StreamingResponse:
    """Stream a job's events as they come: each is turned into JSON values by ``lines``, its result by ``end``.

    The answer begins with the first event: a job that fails before is an error with a status of its own. A client that
    leaves stops the job.
    """
    await _unless_gone(request, job, job.begun.wait())
    if job.failed:
        await job.result()
    return _Stream(job, _events(job, lines, end))


class _Stream(StreamingResponse):
    """Events of a job, which is stopped when nobody takes them any more."""

    def __init__(self, job: Job, events: AsyncIterator[bytes]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._job = job

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.stop()


async def _events(job: Job, lines: Any, end: Any) -> AsyncIterator[bytes]:
    try:
        async for event in job.events():
            for value in lines(event):
                yield _line(value)
        for value in end(await job.result()):
            yield _line(value)
        yield b"data: [DONE]\n\n"
    except Exception as error:
        known = as_serve_error(error)
        if isinstance(known, InternalError):
            log.exception("a stream failed")
        yield _line(known.body())


def _line(value: Any) -> bytes:
    return b"data: " + to_json(value, inf_nan_mode="null") + b"\n\n"


def as_serve_error(error: Exception) -> ServeError:
    """Return an error for the client; a user's mistake is a bad request, and anything unknown a bug."""
    if isinstance(error, ServeError):
        return error
    if isinstance(error, ValidationError | RequestValidationError):  # without what was sent, which may be long
        found = []
        for mistake in list(error.errors())[:5]:
            place = ".".join(str(p) for p in mistake["loc"] if p not in ("body", "header", "path", "query"))
            found.append(f"{place}: {mistake['msg']}" if place else str(mistake["msg"]))
        return ServeError("; ".join(found))
    if isinstance(error, HTTPException):
        code = "not_found" if error.status_code == 404 else None
        return ServeError(str(error.detail), status=error.status_code, code=code)
    return ServeError(str(error)) if isinstance(error, UserError) else InternalError()


async def outcome(job: Job, request: Request) -> Any:
    """Return a job's result. A client that leaves stops it."""
    await _unless_gone(request, job, job.result())
    return await job.result()


async def _unless_gone(request: Request, job: Job, wanted: Any) -> None:
    """Wait for something; if the client leaves before, stop the job."""
    waiting, gone = asyncio.ensure_future(wanted), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait([waiting, gone], return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            job.stop()
            await asyncio.wait([waiting])
        waiting.exception()  # whoever asks for the result gets it
    finally:
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
