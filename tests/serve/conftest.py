"""Servers for the tests. Without the packages of the extra "serve" they skip."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

for name in ("fastapi", "uvicorn", "prometheus_client", "openai"):
    pytest.importorskip(name, reason="needs pip install -e '.[serve]'")


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., Any]]:
    """Starts servers that keep their sessions in the same directory; they are stopped at the end."""
    from serve.running import Running

    running: list[Any] = []

    def begin(place: Any = tmp_path / "state", **options: Any) -> Any:
        running.append(Running(place, **options))
        return running[-1]

    yield begin
    for server in running:
        if server.thread.is_alive():
            server.stop()


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Any]:
    """One server for the tests of a file that leave no trace."""
    from serve.running import Running

    with Running(tmp_path_factory.mktemp("state")) as running:
        yield running
