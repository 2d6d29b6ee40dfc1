"""The routes of sessions: make, look at, read, score, ask, fork, freeze, reset, save, go back, export, delete."""

import secrets
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi import Path as InPath
from fastapi.responses import Response
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile

from ..text_files import decode_text
from . import work
from .schemas import ID, Ask, AtVersion, Export, Fork, Freeze, NewSession, Read, Rollback, ScoreRequest
from .service import Service
from .settings import ServeError
from .sse import Json, outcome, streamed

router = APIRouter(prefix="/v1/sessions")
Id = Annotated[str, InPath(pattern=ID)]


@router.post("", status_code=201)
async def create(request: Request) -> dict[str, Any]:
    """Make a session; with a ``file`` (a form), from a session file."""
    engine = Service.of(request).engine
    async with _form(request) as (values, file):
        body = NewSession.model_validate(values)
        id = body.id or new_id()
        path = None
        with tempfile.TemporaryDirectory() as place:
            if file is not None:
                path = Path(place) / "session"
                path.write_bytes(await file.read())
            frozen = engine.frozen if body.frozen is None else body.frozen
            made = await _versioned(request, id, work.create, frozen, body.learn, path)
    return {**made, "frozen": frozen, "learn": body.learn or engine.learn}


@router.get("")
async def index(request: Request) -> dict[str, Any]:
    return {"object": "list", "data": await work.index(Service.of(request).engine, request.scope["owner"])}


@router.get("/{id}")
async def describe(id: Id, request: Request, diagnostics: bool = True) -> Any:
    """Describe where a session stands: statistics, diagnostics, versions to go back to."""
    return Json(await _done(request, work.describe, id, diagnostics))


@router.delete("/{id}")
async def delete(id: Id, request: Request) -> dict[str, Any]:
    await _done(request, work.delete, id)
    return {"id": id, "object": "session", "deleted": True}


@router.post("/{id}/read")
async def read(id: Id, request: Request) -> Any:
    """Read a text, or a ``file`` (a form) in UTF-8; with ``stream`` tells how far it is."""
    service, owner = Service.of(request), request.scope["owner"]
    engine = service.engine
    async with _form(request) as (values, file):
        if file is not None:
            values["text"] = decode_text("this file", await file.read())
    body = Read.model_validate(values)

    async def reading(job: Any) -> Any:
        found = await work.read(engine, job, owner, id, body.text, body.if_version, body.learn)
        service.metrics.read.inc(found["tokens"])
        return found

    job = engine.begin(reading)
    if body.stream:
        return await streamed(job, request, lambda event: [event], lambda found: [{"done": found}])
    return Json(await outcome(job, request))


@router.post("/{id}/score")
async def score(id: Id, body: ScoreRequest, request: Request) -> Any:
    """Score a text as the continuation, in nats per token; leaves no trace."""
    engine, owner = Service.of(request).engine, request.scope["owner"]
    job = engine.begin(lambda job: work.score(engine, job, owner, id, body.text, body.losses))
    return Json(await outcome(job, request))


@router.post("/{id}/ask")
async def ask(id: Id, body: Ask, request: Request) -> Any:
    """Answer from what was learned alone, without context; leaves no trace."""
    service, owner = Service.of(request), request.scope["owner"]
    engine, render = service.engine, service.prompts.question(body.question)
    options = body.options(engine.limits.new_tokens, 256)
    job = engine.begin(lambda job: work.answer(engine, job, owner, id, [render], options, context=False))

    def whole(answers: list[work.Answered]) -> dict[str, Any]:
        found = answers[0]
        usage = {"prompt_tokens": found.prompt_tokens, "completion_tokens": len(found.ids)}
        service.metrics.written.inc(len(found.ids))
        return {"id": id, "answer": found.text, "finish_reason": found.reason, "version": found.version, "usage": usage}

    if body.stream:
        pieces = lambda event: [{"piece": event[1]}] if isinstance(event[1], str) and event[1] else []  # noqa: E731
        return await streamed(job, request, pieces, lambda answers: [{"done": whole(answers)}])
    return Json(whole(await outcome(job, request)))


@router.post("/{id}/fork", status_code=201)
async def fork(id: Id, request: Request, body: Fork | None = None) -> dict[str, Any]:
    """Make an independent session in the same state."""
    body = body or Fork()
    new = body.id or new_id()
    made = await _versioned(request, id, work.fork, new, body.if_version)
    return {**made, "id": new, "from": id}


@router.post("/{id}/reset")
async def reset(id: Id, request: Request, body: AtVersion | None = None) -> dict[str, Any]:
    return await _versioned(request, id, work.change, {"op": "reset"}, body and body.if_version)


@router.post("/{id}/freeze")
async def freeze(id: Id, request: Request, body: Freeze | None = None) -> dict[str, Any]:
    """Let a session answer without learning, or learn again."""
    body = body or Freeze()
    return await _versioned(request, id, work.change, {"op": "freeze", "frozen": body.frozen}, body.if_version)


@router.post("/{id}/save")
async def save(id: Id, request: Request, body: AtVersion | None = None) -> dict[str, Any]:
    """Keep the present state as one to go back to."""
    return await _versioned(request, id, work.save, body and body.if_version)


@router.post("/{id}/rollback")
async def rollback(id: Id, request: Request, body: Rollback | None = None) -> dict[str, Any]:
    body = body or Rollback()
    return await _versioned(request, id, work.rollback, body.version, body.if_version)


@router.post("/{id}/export")
async def export(id: Id, request: Request, body: Export | None = None) -> Any:
    """Export what was learned as a LoRA adapter: a zip file, or its path where the server has a folder for adapters."""
    found = await _done(request, work.export, id, (body or Export()).rank, Service.of(request).adapters)
    if "path" in found:
        return Json(found)
    name = {"content-disposition": f'attachment; filename="{found["name"]}.zip"', "x-adapter-name": found["name"]}
    return Response(found["zip"], media_type="application/zip", headers=name)


@router.get("/{id}/file")
async def file(id: Id, request: Request) -> Response:
    """Return the session as a file, for ``Session.load`` or another server."""
    name = {"content-disposition": f'attachment; filename="{id}.session"'}
    return Response(await _done(request, work.download, id), media_type="application/octet-stream", headers=name)


def new_id() -> str:
    """Return a session id that nobody guesses."""
    return f"sess-{secrets.token_hex(12)}"


async def _done(request: Request, function: Any, *arguments: Any) -> Any:
    """Run ``function(engine, owner, *arguments)`` as a job and return its result."""
    engine, owner = Service.of(request).engine, request.scope["owner"]
    return await outcome(engine.begin(lambda _: function(engine, owner, *arguments)), request)


async def _versioned(request: Request, id: str, function: Any, *arguments: Any) -> dict[str, Any]:
    """Do something to a session that returns its version."""
    return {"id": id, "object": "session", "version": await _done(request, function, id, *arguments)}


@asynccontextmanager
async def _form(request: Request) -> AsyncIterator[tuple[dict[str, Any], UploadFile | None]]:
    """Parse a body in JSON, or a form with an optional ``file``."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        boundary = parse_options_header(request.headers["content-type"])[1].get(b"boundary", b"")
        if b"--%s--" % boundary not in await request.body():  # the parser takes what there is
            raise ServeError("the form ends too early: its closing boundary is missing")
        async with request.form(max_files=1, max_fields=8) as form:
            values: dict[str, Any] = {name: value for name, value in form.items() if isinstance(value, str)}
            file = form.get("file")
            yield values, file if isinstance(file, UploadFile) else None
        return
    data = await request.body()
    try:
        if data and kind != "application/json":
            raise ServeError("send application/json, or a form with a file", status=415)
        values = await request.json() if data else {}
    except (ValueError, RecursionError):
        raise ServeError("the body is not JSON, or is nested too deep") from None
    if not isinstance(values, dict):
        raise ServeError("the body must be a JSON object")
    yield values, None
