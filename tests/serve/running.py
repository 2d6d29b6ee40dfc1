"""A server that runs in a thread of the test, on a free port of the loopback, and clients for it."""

import asyncio
import signal
import threading
import time
from functools import cache
from pathlib import Path
from typing import Any

import httpx2 as httpx
import torch
from openai import OpenAI
from session.models import shipped, tiny, tokenizer

from inplace_ttt import Session
from inplace_ttt.serve.app import make_app
from inplace_ttt.serve.guard import Guard, key_digest
from inplace_ttt.serve.run import Server
from inplace_ttt.serve.service import make_service
from inplace_ttt.serve.settings import Limits

OPTIONS: dict[str, Any] = {"window": 40, "sinks": 2, "decay": 0.01, "probe_every": 0, "chunk_size": 8}
"""How sessions of the tiny model read."""

LIMITS: dict[str, Any] = {"rate": 100_000, "memory": 1 << 30, "grace": 3}


@cache
def model(objective: str = "learned") -> Any:
    """The tiny model that most tests serve."""
    return tiny("llama") if objective == "learned" else tiny("llama", objective=objective, update_size=0.1)


def session(objective: str = "learned", **changes: Any) -> Session:
    """What the library does alone."""
    return Session(model(objective), tokenizer(), **(OPTIONS | changes))


class Running:
    """A running server. ``keys``: owner by key."""

    def __init__(
        self, place: Path | str, keys: dict[str, str] | None = None, shipped_model: bool = False,
        limits: dict[str, Any] | None = None, load: Any = None, objective: str = "learned",
        **changes: Any,
    ) -> None:  # fmt: skip
        served, options = (shipped(torch.float32), {}) if shipped_model else (model(objective), OPTIONS)
        self.service = make_service(
            served, tokenizer(), "tiny", place, Limits(**(LIMITS | (limits or {}))),
            **(options | changes),
        )  # fmt: skip
        self.engine = self.service.engine
        digests = keys and {key_digest(key): owner for key, owner in keys.items()}
        guard = Guard(load or self.app, self.engine.limits, digests)
        self.server = Server(guard, "127.0.0.1", 0, lambda port: None)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        until = time.monotonic() + 30
        while not self.server.started or (load is None and guard.service is None):
            assert self.thread.is_alive()
            assert time.monotonic() < until
            time.sleep(0.01)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.port = port

    def app(self) -> Any:
        """The routes."""
        return make_app(self.service)

    def _run(self) -> None:
        asyncio.run(self.server.serve())

    def http(self, key: str | None = None) -> httpx.Client:
        """A plain client."""
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False)

    def openai(self, key: str = "none", session: str | None = None) -> OpenAI:
        """The official client."""
        headers = {"x-session-id": session} if session else {}
        client = httpx.Client(timeout=60, trust_env=False)
        return OpenAI(
            base_url=f"{self.url}/v1", api_key=key, default_headers=headers, max_retries=0, http_client=client
        )

    def stop(self) -> None:
        """Stops it in order."""
        self.server.handle_exit(signal.SIGTERM, None)
        self.thread.join(60)
        assert not self.thread.is_alive()

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


def events(response: Any) -> list[Any]:
    """The JSON values of a stream of events, without its end."""
    import json

    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]" or "error" in lines[-1]
    return [json.loads(line) for line in lines if line != "[DONE]"]
