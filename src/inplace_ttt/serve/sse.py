"""Answers that come piece by piece, as server-sent events; and waiting for a client that may leave."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse

from ..errors import UserError
from .guard import error_body, internal
from .jobs import Job
from .settings import ServeError

log = logging.getLogger("inplace_ttt.serve")


async def streamed(
    job: Job, request: Request, lines: Callable[[Any], list[Any]], end: Callable[[Any], list[Any]]
) -> StreamingResponse:
    """Stream a job's events as they come: each is turned into JSON values by ``lines``, its result by ``end``.

    The answer begins with the first event: a job that fails before is an error with a status of its own. A client that
    leaves stops the job.
    """
    await _unless_gone(request, job, job.begun())
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
    except (ServeError, UserError) as error:
        yield _line(error_body(as_serve_error(error)))
    except Exception:
        log.exception("a stream failed")
        yield _line(error_body(internal()))


def _line(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def as_serve_error(error: ServeError | UserError) -> ServeError:
    """Return an error for the client; a user's mistake is a bad request."""
    return error if isinstance(error, ServeError) else ServeError(str(error))


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
