"""The server as a Ray Serve application: several replicas, one state directory.

    serve run inplace_ttt.serve.cluster:application replicas=2 state_dir=/mnt/sessions

A session's requests go to the replica that consistent hashing of their header ``x-session-id`` finds. Any replica can
take any request, as each looks at the version on disk first; only, another one has to load the session anew.
"""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve.config import RequestRouterConfig

from ..errors import UserError
from .guard import Guard, read_keys
from .settings import Limits


class Arguments(BaseModel):
    """Arguments of ``serve run`` or of a configuration file. ``limits``: fields of ``Limits``; memory in bytes."""

    model_config = ConfigDict(extra="forbid")
    state_dir: str
    model: str | None = None
    name: str | None = None
    objective: str | None = None
    device: str | None = None
    api_keys: str | None = None
    learn: str | None = None
    window: int | None = None
    state: str | int = "dense"
    probe_every: int = 4096
    replicas: int = 1
    gpus: float = 0
    limits: dict[str, Any] = {}


def application(arguments: Arguments) -> Any:
    """Build the application. ``state_dir``: a directory that all machines see, or a URL (``files.open_files``)."""
    try:
        limits = Limits(**arguments.limits)
    except TypeError as error:
        raise UserError(f"limits: {error}") from None

    def build() -> Guard:
        return _load(arguments, limits)  # in the replica: before it has loaded it gets no requests

    router: Any = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
    deployed = serve.deployment(
        name="inplace-ttt",
        num_replicas=arguments.replicas,
        max_ongoing_requests=limits.batch + limits.queue,
        graceful_shutdown_timeout_s=limits.grace + 30,
        request_router_config=RequestRouterConfig(request_router_class=router),
        ray_actor_options={"num_gpus": arguments.gpus},
    )
    return deployed(serve.ingress(build)()).bind()


def _load(arguments: Arguments, limits: Limits) -> Guard:
    from ..shipped import DEFAULT_MODEL
    from .app import make_app
    from .service import load_service

    keys = None if arguments.api_keys is None else read_keys(Path(arguments.api_keys))
    name = arguments.name or Path(arguments.model or DEFAULT_MODEL).name
    options = arguments.model_dump(include={"device", "objective", "window", "learn", "state", "probe_every"})
    service = load_service(arguments.model, name, arguments.state_dir, limits, **options)
    return Guard(lambda: make_app(service), limits, keys)
