"""``torchrun`` and ``accelerate launch`` without starting Python anew for each process: their launcher, which forks."""

import os
import runpy
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

from accelerate.commands.launch import launch_command, launch_command_parser
from spawn import free_port
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


def accelerate_launch(processes: int, folder: str, arguments: list[str]) -> list[str]:
    """The same by accelerate's command, which hands over to torchrun's."""
    command = ["--multi_gpu", "--num_processes", str(processes), "--main_process_port", str(free_port()), "-m"]
    given = launch_command_parser().parse_args([*command, "inplace_ttt", *arguments])

    def forking(config: LaunchConfig, entrypoint: Any) -> Any:
        config.start_method, config.monitor_interval = "fork", 0.05
        return lambda *started: elastic_launch(config, _command)(folder, list(started[started.index("train") :]))

    with patch("torch.distributed.run.elastic_launch", forking):
        launch_command(given)
    return [(Path(folder) / f"printed{rank}.txt").read_text() for rank in range(processes)]


accelerate_launch.starts_itself = True  # type: ignore[attr-defined]


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
