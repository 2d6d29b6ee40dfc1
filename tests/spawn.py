"""Runs a function on several processes of one machine, with a timeout.

A test process starts one launcher, which imports what is needed and forks: first a job, then the job's ranks. So the
imports, which cost more than most of the work, are paid for once. Ranks on GPUs are new processes: what autograd keeps
per device does not survive a fork.
"""

import atexit
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).parent
TIMEOUT = 100  # seconds for one group of processes, starting them included


def free_port() -> int:
    """Another one in every call, below the ports that connections are given: nobody takes it before it is used."""
    while True:
        port = random.SystemRandom().randrange(20_000, 30_000)
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in _given:
            _given.add(port)
            return port


_given: set[int] = set()


def run_ranks(
    module: str, function: str, ranks: int, *arguments: Any, timeout: float = TIMEOUT, backend: str = "gloo"
) -> list[Any]:
    """``function(*arguments)`` of ``module`` (in tests/distributed or tests/train) on each rank; what they returned.

    Raises AssertionError with the output of the ranks that failed, or after ``timeout`` seconds; no process is left.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.save(arguments, Path(folder) / "arguments.pt")
        environment = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "BACKEND": backend,
        }
        if backend == "gloo":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        job = {"folder": folder, "module": module, "function": function, "ranks": ranks, "environment": environment}
        status = _launcher().run(job, timeout)
        texts = [path.read_text()[-5000:] for path in sorted(Path(folder).glob("*.txt"))]
        late = f"took over {timeout} s" if status is None else ""
        assert status == 0, f"{module}.{function} on {ranks} ranks {late}:\n" + "\n".join(texts)
        return [torch.load(Path(folder) / f"result{rank}.pt", weights_only=False) for rank in range(ranks)]


class Launcher:
    """The process that forks jobs, one at a time."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(self.process.kill)

    def run(self, job: dict[str, Any], timeout: float) -> int | None:
        """Exit status of a job; None when it was killed after ``timeout`` seconds (imports not counted)."""
        assert self.process.stdin is not None
        print(json.dumps(job), file=self.process.stdin, flush=True)
        pid = int(self._line())
        try:
            late = not select.select([self.process.stdout], [], [], timeout)[0]
        except BaseException:
            os.killpg(pid, signal.SIGKILL)
            raise
        if late:
            os.killpg(pid, signal.SIGKILL)
        status = int(self._line())
        return None if late else status

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the launcher ended"
        return line


@cache
def _launcher() -> Launcher:
    return Launcher()


def _serve() -> None:
    """Forks a job for every line of the standard input; prints its process number, then its exit status."""
    import gc
    import importlib

    # What the jobs would import one by one.
    import transformers.models.llama.modeling_llama
    import transformers.models.mistral.modeling_mistral  # noqa: F401

    import inplace_ttt.train.parallel
    import inplace_ttt.train.run  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        module = importlib.import_module(job["module"])
        gc.freeze()
        if (child := os.fork()) == 0:
            os.setsid()
            _redirect(Path(job["folder"]) / "job.txt")
            os.environ |= job["environment"]
            os._exit(_start_ranks(Path(job["folder"]), module, job["function"], job["ranks"]))
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _start_ranks(folder: Path, module: Any, function: str, ranks: int) -> int:
    """Exit status: 0 when all ranks succeed."""
    children = []
    for rank in range(ranks):
        if os.environ["BACKEND"] == "nccl":
            command = [sys.executable, __file__, str(folder), module.__name__, function, str(rank)]
            child = os.posix_spawn(sys.executable, command, os.environ)
        elif (child := os.fork()) == 0:
            code = 1
            try:
                torch.set_num_threads(1)  # renews PyTorch's pool, which threads of this process would race to do
                _rank(folder, getattr(module, function), rank)
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

    _redirect(folder / f"rank{rank}.txt")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    own = getattr(work, "starts_itself", False)
    if not own:
        if os.environ["BACKEND"] == "nccl":
            torch.cuda.set_device(rank)
        dist.init_process_group(os.environ["BACKEND"], timeout=timedelta(seconds=60))
    arguments = torch.load(folder / "arguments.pt", weights_only=False)
    torch.save(work(*arguments), folder / f"result{rank}.pt")
    if not own:
        dist.barrier()
        dist.destroy_process_group()


def _redirect(path: Path) -> None:
    """Sends this process's output to a file, and takes its input away."""
    log, nothing = os.open(path, os.O_WRONLY | os.O_CREAT), os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)


if __name__ == "__main__":
    sys.path[:0] = [str(TESTS / "distributed"), str(TESTS / "train"), str(TESTS)]
    if sys.argv[1:]:
        import importlib

        folder, module, function, rank = sys.argv[1:]
        _rank(Path(folder), getattr(importlib.import_module(module), function), int(rank))
    else:
        _serve()
