"""What stands between the network and the routes: keys, rates, sizes, clients that are too slow, and errors."""

import asyncio
import hashlib
import json
import logging
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..errors import UserError
from .settings import Limits, ServeError

log = logging.getLogger("inplace_ttt.serve")
LOOPBACK = ("localhost", "127.0.0.1", "::1")
Message = dict[str, Any]


def read_keys(path: Path) -> dict[str, str]:
    """Owners by the digest of their key, from a file with one ``owner:key`` a line; empty lines and # are skipped.

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
        owner, colon, key = (part.strip() for part in line.partition(":"))
        if not owner or not colon or len(key) < 8 or not key.isascii() or " " in key:
            raise UserError(f"{path}, line {number}: write owner:key, the key at least 8 ASCII characters, no spaces")
        if key_digest(key) in found:
            raise UserError(f"{path}, line {number}: this key is there already; every key belongs to one owner")
        found[key_digest(key)] = owner
    if not found:
        raise UserError(f"{path} holds no keys: write owner:key, one a line")
    return found


def key_digest(key: str) -> str:
    """Keys are looked up by digest, so the time that takes says nothing about them."""
    return hashlib.sha256(key.encode()).hexdigest()


def error_body(error: ServeError) -> dict[str, Any]:
    """OpenAI's form of an error."""
    return {"error": {"message": str(error), "type": error.kind, "param": None, "code": error.code}}


class Guard:
    """ASGI middleware. ``keys``: owners by key digest; None: everybody is one owner, on the loopback only.

    A route finds its owner in ``scope["owner"]``. Errors are answered in OpenAI's form, without a traceback.
    """

    def __init__(self, app: Any, limits: Limits, keys: dict[str, str] | None, watch: Any = None) -> None:
        self.app, self.limits, self.keys, self.watch = app, limits, keys, watch
        self._rates: dict[str, tuple[float, float]] = {}

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, ended, body = 0, False, _Body(receive, dict(scope["headers"]), self.limits)

        async def sending(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
                secure(message)
            ended = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        async def routed(message: Message) -> None:
            if body.error is not None and status == 0:
                raise body.error  # the route itself only knows that it got no body
            await sending(message)

        try:
            scope["owner"] = self._admit(scope)
            await self.app(scope, body.receive, routed)
        except Exception as error:
            known = body.error or (error if isinstance(error, ServeError) else None)
            if known is None:
                log.exception("%s %s failed", scope["method"], scope["path"])
            if status == 0:
                await _answer(sending, known or internal())
            elif not ended:
                raise ConnectionError("failed while answering") from None
        finally:
            if self.watch is not None:
                self.watch.request(scope, status)

    def _admit(self, scope: Message) -> str:
        """The owner of a request. ServeError when there is none, or too many requests of his come."""
        headers = {name.lower(): value for name, value in scope["headers"]}
        host = headers.get(b"host", b"").decode("latin-1")
        origin = headers.get(b"origin", b"").decode("latin-1")
        if self.keys is None and host and _name(host) not in LOOPBACK:
            raise ServeError("this server has no keys and answers on the loopback only", status=403, code="forbidden")
        if origin and urlsplit(origin).netloc != host:
            raise ServeError("requests from other web pages are refused", status=403, code="forbidden")
        if not scope["path"].startswith("/v1/"):
            return ""
        owner = "local"
        if self.keys is not None:
            kind, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
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
        """One token a request, ``rate`` of them a minute."""
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

    def __init__(self, receive: Any, headers: dict[bytes, bytes], limits: Limits) -> None:
        self._receive, self._limits = receive, limits
        self._size, self._complete = 0, False
        self.error: ServeError | None = None
        declared = headers.get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > limits.body:
            self._fail(413, "too_large", f"the body is larger than {limits.body:,} bytes")

    def _fail(self, status: int, code: str, message: str) -> ServeError:
        self.error = ServeError(message, status=status, code=code)
        return self.error

    async def receive(self) -> Message:
        """The next message. ServeError where it does not come or is too much."""
        if self.error is not None:
            raise self.error
        if self._complete:
            return await self._receive()  # type: ignore[no-any-return]
        try:
            message: Message = await asyncio.wait_for(self._receive(), self._limits.slow)
        except TimeoutError:
            raise self._fail(408, "timeout", "the body does not come") from None
        self._size += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._size > self._limits.body:
            raise self._fail(413, "too_large", f"the body is larger than {self._limits.body:,} bytes")
        return message


def internal() -> ServeError:
    """What a client is told about a bug."""
    return ServeError("something failed inside the server; its log says more", status=500, kind="server_error")


def secure(message: Message) -> None:
    """Adds what browsers should keep to."""
    message["headers"] = [
        *message.get("headers", []),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
        (b"cache-control", b"no-store"),
    ]


def _name(host: str) -> str:
    return urlsplit(f"//{host}").hostname or ""


async def _answer(send: Any, error: ServeError) -> None:
    body = json.dumps(error_body(error)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.encode(), value.encode()) for name, value in error.headers.items()]
    if error.status in (408, 413):
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
