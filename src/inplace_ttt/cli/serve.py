"""``inplace-ttt serve``."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from ..hub import check_model
from ..serve.settings import LEARN, LEARN_CHOICES, Limits, given_settings
from .sessions import parse_state
from .usage import Device, check_setting, quiet_libraries


def serve(
    model: Annotated[str | None, typer.Argument(help="Path or hub id. Left out: shipped.")] = None,
    objective: Annotated[
        str | None,
        typer.Option(help="Give a plain model fast weights with this objective, such as loss.", callback=check_setting),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="With --objective: which layers adapt, such as 0::3.", callback=check_setting),
    ] = None,
    chunk_size: Annotated[int | None, typer.Option(help="With --objective: tokens per update.", min=1)] = None,
    lr: Annotated[
        float | None, typer.Option(help="With --objective: the inner learning rate.", callback=check_setting)
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Others than this machine's need keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.", min=0, max=65535)] = 8000,
    api_keys: Annotated[Path | None, typer.Option(help="File with owner:key, one a line.")] = None,
    state_dir: Annotated[
        str | None, typer.Option(help="Where sessions are kept: directory or s3://. Left out: until the end.")
    ] = None,
    adapter_dir: Annotated[Path | None, typer.Option(help="Where exported LoRA adapters go.")] = None,
    name: Annotated[str | None, typer.Option(help="Name under which clients ask for the model.")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens that attention keeps.", min=1)] = None,
    decay: Annotated[float | None, typer.Option(help="Share forgotten per update.", callback=check_setting)] = None,
    state: Annotated[str, typer.Option(help="Form of the fast weights: dense, auto or a rank.")] = "dense",
    learn: Annotated[
        str | None, typer.Option(help="New sessions learn: all, read, written, none (objective loss), or frozen.")
    ] = None,
    probe_every: Annotated[int, typer.Option(help="Tokens between two looks at the gain; 0: none.", min=0)] = 4096,
    batch: Annotated[int, typer.Option(help="Sessions that write at the same time.", min=1)] = 32,
    queue: Annotated[int, typer.Option(help="Requests that wait besides; more get 429.", min=0)] = 64,
    memory: Annotated[float | None, typer.Option(help="GiB for sessions; idle ones go to disk.", min=0)] = None,
    max_sessions: Annotated[int, typer.Option(help="Sessions of one owner.", min=1)] = 100,
    max_body: Annotated[float, typer.Option(help="MiB of one request, uploads included.", min=0)] = 16,
    max_prompt: Annotated[int, typer.Option(help="Tokens of one prompt.", min=1)] = 100_000,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of one answer.", min=1)] = 4096,
    rate: Annotated[int, typer.Option(help="Requests of one owner per minute.", min=1)] = 600,
    grace: Annotated[float, typer.Option(help="Seconds that requests get to finish at the end.", min=0)] = 20,
    device: Device = None,
) -> None:
    """Serve a model, with sessions that learn, over HTTP.

    Clients of OpenAI's API can use it.
    """
    if missing := [p for p in ("fastapi", "prometheus_client", "python_multipart", "uvicorn") if not find_spec(p)]:
        raise UserError(f"serving needs {missing[0]}: pip install -e '.[serve]' in a clone")
    form = parse_state(state)
    for option, place in (("--state-dir", state_dir), ("--adapter-dir", adapter_dir)):
        if place is not None and Path(place).exists() and not Path(place).is_dir():
            raise UserError(f"{option} {place}: not a directory")
    if model is not None:
        check_model(model)
    if learn not in (None, *LEARN, "frozen"):
        raise UserError(f"--learn {learn}: {LEARN_CHOICES}")
    settings = given_settings(objective, {"layers": layers, "chunk_size": chunk_size, "lr": lr})
    from ..serve.run import serve as run

    limits = Limits(
        batch=batch, queue=queue, memory=None if memory is None else int(memory * 2**30), sessions=max_sessions,
        body=int(max_body * 2**20), prompt=max_prompt, new_tokens=max_new_tokens, rate=rate, grace=grace,
    )  # fmt: skip
    run(
        model, host=host, port=port, api_keys=api_keys, place=state_dir, limits=limits,
        log=typer.echo, quiet=quiet_libraries, device=device, objective=objective,
        settings=settings, served_name=name, adapters=adapter_dir,
        state=form, probe_every=probe_every, window=window, decay=decay, learn=learn,
    )  # fmt: skip
