"""A process of its own without ten seconds of imports: a copy of the test process, which can be stopped and killed."""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import IO, Any


class Forked:
    """``work()`` in a copy of this process; ``terminal``: its standard streams, else what it prints is ``stdout``."""

    def __init__(self, work: Callable[[], Any], terminal: int | None = None) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        reading, writing = os.pipe()
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else tokenizers warns of the fork
        self.pid = os.fork()
        if self.pid == 0:
            self._run(work, writing if terminal is None else terminal, terminal is not None)
        os.close(writing)
        self.stdout: IO[bytes] = os.fdopen(reading, "rb")
        self.returncode: int | None = None

    def _run(self, work: Callable[[], Any], stream: int, is_terminal: bool) -> None:
        code = 1
        try:
            os.setsid()
            nothing = stream if is_terminal else os.open(os.devnull, os.O_RDWR)
            for fd, source in enumerate((nothing, stream, nothing)):
                os.dup2(source, fd)
            sys.stdin = os.fdopen(0, closefd=False)
            sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
            signal.signal(signal.SIGINT, signal.default_int_handler)
            work()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        finally:
            sys.stdout.flush()
            os._exit(code)

    def poll(self) -> int | None:
        """Return its exit status, as ``Popen`` has it; None while it runs."""
        return self._wait(os.WNOHANG)

    def wait(self) -> int:
        """Return its exit status when it has ended."""
        found = self._wait(0)
        assert found is not None
        return found

    def kill(self) -> None:
        """Kill it, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def _wait(self, how: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, how)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
                self.stdout.close()
        return self.returncode


def run_fresh(work: Callable[[], Any], forget: Sequence[str] = (), missing: Sequence[str] = ()) -> tuple[int, str]:
    """Exit status and output of ``work()`` in a process that has not imported ``forget`` and never can ``missing``."""

    def begin() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] in (*forget, *missing)]:
            del sys.modules[name]
        sys.modules.update(dict.fromkeys(missing))
        try:
            work()
        except Exception:
            traceback.print_exc()
            raise

    child = Forked(begin)
    said = child.stdout.read().decode()
    return child.wait(), said
