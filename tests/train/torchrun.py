"""``torchrun -m inplace_ttt`` without starting Python anew for every process: torchrun's own launcher, which forks."""

import os
import runpy
import sys
from pathlib import Path

from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def torchrun(processes: int, folder: str, arguments: list[str]) -> list[str]:
    """What each process printed."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK"):
        os.environ.pop(name, None)  # the launcher's to set
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        start_method="fork", monitor_interval=0.05,
    )  # fmt: skip
    elastic_launch(config, _command)(folder, arguments)
    return [(Path(folder) / f"printed{rank}.txt").read_text() for rank in range(processes)]


torchrun.starts_itself = True  # type: ignore[attr-defined]


def _command(folder: str, arguments: list[str]) -> None:
    sys.argv = ["inplace-ttt", *arguments]
    sys.stdout = open(Path(folder) / f"printed{os.environ['RANK']}.txt", "w", encoding="utf-8")  # noqa: SIM115
    try:
        runpy.run_module("inplace_ttt", run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.stdout.flush()
