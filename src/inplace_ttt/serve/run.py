"""From a model's name to a server that runs. It listens at once; torch and the model are loaded meanwhile."""

import asyncio
import logging
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import UserError
from ..shipped import DEFAULT_MODEL
from .guard import LOOPBACK, Guard, read_keys
from .settings import Limits


class _Protocol(H11Protocol):
    """A protocol that cuts off clients that send no whole request head in time, or do not take their answer."""

    patience = 30.0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._late = self.loop.call_later(self.patience, self._check)

    def _check(self) -> None:
        if self.cycle is None:  # no request yet; between two requests uvicorn has its own limit
            self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._late.cancel()
        self._late = self.loop.call_later(self.patience, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._late.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        self._late.cancel()
        super().connection_lost(exc)


def serve(
    name: str | None,
    *,
    host: str,
    port: int,
    api_keys: Path | None,
    place: str | Path | None,
    limits: Limits,
    log: Callable[[str], None],
    quiet: Callable[[], None] = lambda: None,
    served_name: str | None = None,
    **options: Any,
) -> None:
    """Serve until told to stop (SIGTERM, Ctrl-C). ``port`` 0 takes a free one; ``quiet`` is called before loading.

    ``place``: where sessions are kept (None: until the end). ``options``: as for ``load_service``.
    Raises UserError on a model, keys or a directory that do not fit, and where others than this machine could reach a
    server without keys.
    """
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # broken uploads are their senders' business
    keys = None if api_keys is None else read_keys(api_keys)
    if keys is None and host not in LOOPBACK:
        raise UserError(f"on {host} anybody could use this server: give --api-keys FILE, or stay on 127.0.0.1")
    served, began = served_name or Path(name or DEFAULT_MODEL).name, time.perf_counter()
    with ExitStack() as stack:
        if place is None:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="inplace-ttt-")))
            log("Sessions are kept until the server stops; --state-dir DIR keeps them for longer.")

        def load() -> Any:
            from .app import make_app  # here: they import torch and FastAPI
            from .service import load_service

            quiet()
            service = load_service(name, served, place, limits, log, **options)
            log(f"Loaded after {time.perf_counter() - began:.1f} s.")
            return make_app(service)

        server = Server(
            Guard(load, limits, keys), host, port, lambda at: log(_greeting(host, at, served, keys is not None))
        )
        with suppress(KeyboardInterrupt, SystemExit):  # uvicorn's way of saying that it could not start
            asyncio.run(server.serve())
        if not server.started:
            raise UserError(f"cannot listen on {host}:{port}: is it in use? Give another --port")
        if server.failure is not None:
            raise server.failure


class Server(uvicorn.Server):
    """A server that calls ``ready(port)`` when it listens, and lets the engine know at once when it is to stop.

    Stops when the model cannot be loaded; ``failure`` says why.
    """

    def __init__(self, app: Guard, host: str, port: int, ready: Callable[[int], None]) -> None:
        self.app, self.ready, limits = app, ready, app.limits
        self.failure: BaseException | None = None
        config = uvicorn.Config(
            app, host=host, port=port, http=type("Protocol", (_Protocol,), {"patience": limits.slow}), ws="none",
            log_level="warning", access_log=False, server_header=False, h11_max_incomplete_event_size=65536,
            limit_concurrency=1000, timeout_keep_alive=30, timeout_graceful_shutdown=round(limits.grace) + 15,
        )  # fmt: skip
        super().__init__(config)

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.ready(self.servers[0].sockets[0].getsockname()[1])
            assert self.app.loading is not None
            self.app.loading.add_done_callback(self._loaded)

    def _loaded(self, loading: "asyncio.Task[Any]") -> None:
        if not loading.cancelled() and (error := loading.exception()) is not None:
            self.failure, self.should_exit = error, True

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.app.begin_stop()
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True  # and exit with 0: uvicorn's own handler would raise the signal again at the end


def _greeting(host: str, port: int, name: str, has_keys: bool) -> str:
    where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    key = " -H 'Authorization: Bearer KEY'" if has_keys else ""
    body = (
        f'{{"model": "{name}", "prompt": "class Reader:\\n    def __init__(self", "max_tokens": 24, "temperature": 0}}'
    )
    return (
        f"Serving {name} on {where} (a page for people, /v1 for OpenAI's clients). The model is being loaded, "
        "requests wait for it. Try:\n\n"
        f"curl {where}/v1/completions{key} -H 'Content-Type: application/json' -d '{body}'\n"
    )
