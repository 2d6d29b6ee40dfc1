"""Where the state of sessions is kept: named blobs in one folder, on a local disk or NFS."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class ExistsError(Exception):
    """A blob of this name is there already."""


class LocalFiles:
    """Blobs by name ("folder/folder/blob") below a directory. A blob is there as a whole or not at all."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True, mode=0o700)

    def create(self, name: str, data: bytes) -> None:
        """Writes a new blob to disk. Raises ExistsError when there is one: of several who try, one succeeds."""
        target = self.root / name
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, part = tempfile.mkstemp(prefix=".", suffix=".part", dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.link(part, target)
        except FileExistsError:
            raise ExistsError(name) from None
        finally:
            with suppress(FileNotFoundError):
                os.unlink(part)
        _sync(target.parent)

    def read(self, name: str) -> bytes:
        """A blob's content. Raises FileNotFoundError."""
        return (self.root / name).read_bytes()

    def names(self, folder: str) -> list[str]:
        """Names of the blobs and folders in a folder, without those that are being written."""
        try:
            return [entry.name for entry in os.scandir(self.root / folder) if not entry.name.startswith(".")]
        except FileNotFoundError:
            return []

    def remove(self, name: str) -> None:
        """Deletes a blob, or a folder with all that is in it; harmless when it is not there."""
        path = self.root / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def sweep(self, folder: str) -> None:
        """Deletes what processes that were killed while they wrote have left, when it is an hour old."""
        with suppress(FileNotFoundError):
            for entry in os.scandir(self.root / folder):
                if entry.name.startswith(".") and time.time() - entry.stat().st_mtime > 3600:
                    self.remove(f"{folder}/{entry.name}")

    def put(self, name: str, write: Callable[[Path], None]) -> None:
        """Lets ``write`` make a large blob, given a path; it must be durable when ``write`` returns."""
        write(self.root / name)

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """A large blob as a local file, for as long as the context lasts."""
        yield self.root / name


def _sync(folder: Path) -> None:
    with suppress(OSError):  # not every system can
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
