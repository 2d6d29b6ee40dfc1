"""The layer between the network and the routes: keys, rates, sizes, slow clients, errors; start and end.

Nothing here needs torch or FastAPI: a server listens before they are imported and its model is loaded.
"""

import asyncio
import hashlib
import logging
import re
import threading
import time
from collections.abc import Callable, MutableMapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from ..errors import UserError
from .settings import InternalError, Limits, ServeError, StoppingError

log = logging.getLogger("inplace_ttt.serve")
LOOPBACK = ("localhost", "127.0.0.1", "::1")
LOADING = 300.0
"""Seconds that a request waits for the model to be loaded; then it is told to come again."""
SAFE = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"), (b"cache-control", b"no-store")]
"""Headers that browsers should keep to."""
Message = MutableMapping[str, Any]


def read_keys(path: Path) -> dict[str, str]:
    """Read owners by the digest of their key from a file with one ``owner:key`` a line; empty lines and # are skipped.

    Raises UserError on a file that cannot be read, a line of another form, a short key, and a key given twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the keys in {path}: {error}") from None
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = re.fullmatch(r"([^:]*[^:\s])\s*:\s*([!-~]{8,})", line)
        if match is None:
            raise UserError(f"{path}, line {number}: write owner:key, the key at least 8 ASCII characters, no spaces")
        if (digest := key_digest(match[2])) in found:
            raise UserError(f"{path}, line {number}: this key is there already; every key belongs to one owner")
        found[digest] = match[1]
    if not found:
        raise UserError(f"{path} holds no keys: write owner:key, one a line")
    return found


def key_digest(key: str) -> str:
    """Hash a key: keys are looked up by digest, so the time that takes says nothing about them."""
    return hashlib.sha256(key.encode()).hexdigest()


class Guard:
    """ASGI application in front of the routes: checks requests, and lets them wait while the model is loaded.

    ``load``: makes the routes (``make_app``), in a thread of its own when the server starts. ``keys``: owners by key
    digest; None: everybody is one owner, on the loopback only. A route finds its owner in ``scope["owner"]``. Errors
    are answered in OpenAI's form, without a traceback.
    """

    def __init__(self, load: Callable[[], Any], limits: Limits, keys: dict[str, str] | None = None) -> None:
        self.load, self.limits, self.keys = load, limits, keys
        self.loading: asyncio.Task[Any] | None = None
        """Ends with the routes, once the server has begun to start."""
        self.stopping = False
        self._rates: dict[str, tuple[float, float]] = {}

    @property
    def service(self) -> Any:
        """Return the service, or None before it is loaded."""
        task = self.loading
        has_loaded = task and task.done() and not task.cancelled() and not task.exception()
        return task.result().state.service if task and has_loaded else None

    def begin_stop(self) -> None:
        self.stopping = True
        if self.service is not None:
            self.service.engine.begin_stop()

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "http":
            await self._serve(scope, receive, send)

    async def _live(self, receive: Any, send: Any) -> None:
        await receive()
        self.loading = asyncio.create_task(self._load())
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self.stopping = True
        if self.service is not None:
            await self.service.engine.stop()
        await send({"type": "lifespan.shutdown.complete"})

    async def _load(self) -> Any:
        app = await _in_thread(self.load)
        await app.state.service.engine.start()
        if self.stopping:
            app.state.service.engine.begin_stop()
        return app

    async def _serve(self, scope: Message, receive: Any, send: Any) -> None:
        headers = Headers(scope=scope)
        status, ended, body = 0, False, _Body(receive, headers.get("content-length", "0"), self.limits)

        async def sending(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *SAFE]
            ended = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        async def routed(message: Message) -> None:
            if body.error is not None and status == 0:
                raise body.error  # the route itself only knows that it got no body
            await sending(message)

        try:
            scope["owner"] = self._admit(scope["path"], headers)
            if scope["path"] in ("/health", "/ready"):
                await self._state(scope["path"])(scope, receive, sending)
            else:
                await (await self._routes())(scope, body.receive, routed)
        except Exception as error:
            known = body.error or (error if isinstance(error, ServeError) else None)
            if known is None:
                log.exception("%s %s failed", scope["method"], scope["path"])
            if status == 0:
                known = known or InternalError()
                closes = {"connection": "close"} if known.status in (408, 413) else {}
                await JSONResponse(known.body(), known.status, known.headers | closes)(scope, receive, sending)
            elif not ended:
                raise ConnectionError("failed while answering") from None
        finally:
            if self.service is not None:
                self.service.metrics.request(scope, status)

    def _state(self, path: str) -> JSONResponse:
        if path == "/health":
            return JSONResponse({"status": "ok"})
        state = "stopping" if self.stopping else "loading" if self.service is None else "ready"
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    async def _routes(self) -> Any:
        assert self.loading is not None
        if self.stopping and self.service is None:
            raise StoppingError
        try:
            return await asyncio.wait_for(asyncio.shield(self.loading), LOADING)
        except TimeoutError:
            raise ServeError(
                "the model is being loaded: try again", status=503, kind="server_error", code="loading",
                headers={"retry-after": "5"},
            ) from None  # fmt: skip
        except Exception:
            raise StoppingError from None  # whoever runs the server is told why

    def _admit(self, path: str, headers: Headers) -> str:
        """Return the owner of a request. ServeError when there is none, or too many requests of his come."""
        host, origin = headers.get("host", ""), headers.get("origin", "")
        if self.keys is None and host and urlsplit(f"//{host}").hostname not in LOOPBACK:
            raise ServeError("this server has no keys and answers on the loopback only", status=403, code="forbidden")
        if origin and urlsplit(origin).netloc != host:
            raise ServeError("requests from other web pages are refused", status=403, code="forbidden")
        if not path.startswith("/v1/"):
            return ""
        owner = "local"
        if self.keys is not None:
            kind, _, key = headers.get("authorization", "").partition(" ")
            known = self.keys.get(key_digest(key.strip())) if kind.lower() == "bearer" else None
            if known is None:
                raise ServeError(
                    "send a valid API key: Authorization: Bearer KEY",
                    status=401, kind="authentication_error", code="invalid_api_key",
                )  # fmt: skip
            owner = known
        self._count(owner)
        return owner

    def _count(self, owner: str) -> None:
        """Let ``rate`` requests a minute pass."""
        now, rate = time.monotonic(), self.limits.rate / 60
        left, since = self._rates.get(owner, (float(self.limits.rate), now))
        left = min(left + (now - since) * rate, self.limits.rate)
        if left < 1:
            raise ServeError(
                f"more than {self.limits.rate} requests a minute",
                status=429, kind="rate_limit_error", code="rate_limit_exceeded",
                headers={"retry-after": str(max(1, round((1 - left) / rate)))},
            )  # fmt: skip
        self._rates[owner] = left - 1, now


class _Body:
    """A request's body, which must not be too large, nor come too slowly; ``error`` says that it did not come."""

    def __init__(self, receive: Any, declared: str, limits: Limits) -> None:
        self._receive, self._limits = receive, limits
        self._size, self._complete = 0, False
        self.error: ServeError | None = None
        if not (declared.isascii() and declared.isdigit()) or int(declared) > limits.body:
            self._fail(413, "too_large", f"the body is larger than {limits.body:,} bytes")

    def _fail(self, status: int, code: str, message: str) -> ServeError:
        self.error = ServeError(message, status=status, code=code)
        return self.error

    async def receive(self) -> Message:
        """Return the next message. ServeError where it does not come or is too much."""
        if self.error is not None:
            raise self.error
        if self._complete:
            return await self._receive()  # type: ignore[no-any-return]
        try:
            message: Message = await asyncio.wait_for(self._receive(), self._limits.slow)
        except TimeoutError:
            raise self._fail(408, "timeout", "the body does not come") from None
        if message["type"] == "http.disconnect":  # the client may wait still, behind a proxy that lost the body
            self._fail(408, "incomplete", "the body was cut off: send the request again")
            return message
        self._size += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._size > self._limits.body:
            raise self._fail(413, "too_large", f"the body is larger than {self._limits.body:,} bytes")
        return message


async def _in_thread(function: Callable[[], Any]) -> Any:
    """Run a function in a thread that nobody waits for when the server stops before it is done."""
    done: Future[Any] = Future()
    done.set_running_or_notify_cancel()

    def run() -> None:
        try:
            done.set_result(function())
        except BaseException as error:  # it goes to whoever waits
            done.set_exception(error)

    threading.Thread(target=run, name="load", daemon=True).start()
    return await asyncio.wrap_future(done)
