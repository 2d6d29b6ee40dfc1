"""Numbers for Prometheus. Nothing here says who sent what."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Metrics:
    """Counters of one server, and what its scheduler tells."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        made: dict[str, Any] = {"registry": self.registry, "namespace": "inplace_ttt"}
        self.requests = Counter("requests", "Answered requests.", ["route", "status"], **made)
        self.read = Counter("tokens_read", "Tokens read from prompts and texts.", **made)
        self.written = Counter("tokens_written", "Tokens of answers.", **made)
        self.first = Histogram("first_token_seconds", "Request to first token.", buckets=SECONDS, **made)
        self.between = Histogram("step_seconds", "One decode step of all who write.", buckets=SECONDS, **made)
        self.pieces = Histogram("piece_seconds", "One piece of reading, between two steps.", buckets=SECONDS, **made)
        self.rows = Histogram("step_rows", "Sessions in one decode step.", buckets=(1, 2, 4, 8, 16, 32, 64), **made)
        self.loaded = Gauge("sessions_in_memory", "Sessions in memory.", **made)
        self.bytes = Gauge("session_bytes", "Memory of sessions.", **made)
        self.budget = Gauge("session_bytes_limit", "Memory that sessions may take.", **made)
        self.running = Gauge("requests_running", "Requests that run or wait.", **made)

    def step(self, rows: int, seconds: float) -> None:
        self.rows.observe(rows)
        self.between.observe(seconds)

    def call(self, seconds: float) -> None:
        self.pieces.observe(seconds)

    def request(self, scope: dict[str, Any], status: int) -> None:
        """Count one answered request; routes by their pattern, so that ids make no new series."""
        route = getattr(scope.get("route"), "path", "none")
        self.requests.labels(route, str(status)).inc()

    def text(self, engine: Any) -> bytes:
        """Return all numbers in Prometheus's format."""
        self.loaded.set(len(engine.loaded))
        self.bytes.set(engine.bytes)
        self.budget.set(engine.budget)
        self.running.set(len(engine.jobs))
        return generate_latest(self.registry)
