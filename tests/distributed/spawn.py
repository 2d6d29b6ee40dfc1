"""Runs a function on several gloo processes of one machine, with a timeout.

One process imports what is needed and forks the ranks, so that a test pays for the imports once.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

TIMEOUT = 100  # seconds for one group of processes, starting them included


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def run_ranks(module: str, function: str, ranks: int, *arguments: Any, timeout: float = TIMEOUT) -> list[Any]:
    """``function(*arguments)`` of tests/distributed/``module``.py on each rank; what each of them returned.

    Raises AssertionError with the output of the ranks that failed, or after ``timeout`` seconds; no process is left.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.save(arguments, Path(folder) / "arguments.pt")
        environment = os.environ | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        command = [sys.executable, __file__, folder, module, function, str(ranks)]
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        try:
            output, late = process.communicate(timeout=timeout)[0], False
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, late = process.communicate()[0], True
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        texts = [path.read_text()[-5000:] for path in sorted(Path(folder).glob("rank*.txt"))]
        assert not late, f"{module}.{function} on {ranks} ranks took over {timeout} s\n" + "\n".join([output, *texts])
        assert process.returncode == 0, f"{module}.{function} on {ranks} ranks:\n" + "\n".join([output, *texts])
        return [torch.load(Path(folder) / f"result{rank}.pt", weights_only=False) for rank in range(ranks)]


def _main(folder: str, module: str, function: str, ranks: str) -> int:
    import importlib

    torch.set_num_threads(1)
    work = getattr(importlib.import_module(module), function)
    children = []
    for rank in range(int(ranks)):
        if (child := os.fork()) == 0:
            code = 1
            try:
                _rank(Path(folder), work, rank)
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    failed = 0
    for _ in children:
        _, status = os.wait()
        if status and not failed:  # the others wait for this one
            failed = 1
            for child in children:
                try:
                    os.kill(child, signal.SIGTERM)
                except ProcessLookupError:
                    continue
    return failed


def _rank(folder: Path, work: Any, rank: int) -> None:
    from datetime import timedelta

    import torch.distributed as dist

    log = os.open(folder / f"rank{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    arguments = torch.load(folder / "arguments.pt", weights_only=False)
    torch.save(work(*arguments), folder / f"result{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    here = Path(__file__).parent
    sys.path[:0] = [str(here), str(here.parent)]
    sys.exit(_main(*sys.argv[1:]))
