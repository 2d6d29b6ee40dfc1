"""Storage of sessions' state: named blobs in one folder, on a disk, NFS or an object store.

A blob that is there is never overwritten. Of several who create one, one succeeds: only file systems that can promise
this are taken.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import UserError

EXCLUSIVE = ("abfs", "abfss", "az", "gcs", "gs", "memory", "s3", "s3a")
"""fsspec's protocols that create a blob only where there is none (``pipe_file(mode="create")``), as one operation."""


def open_files(place: str | Path) -> "LocalFiles | RemoteFiles":
    """Open a directory or URL. UserError for a file system that cannot compare and set, or is not installed."""
    protocol, found, rest = str(place).partition("://")
    if not found or protocol in ("file", "local"):
        return LocalFiles(Path(rest if found else place))
    if protocol not in EXCLUSIVE:
        raise UserError(
            f"{place}: two servers could overwrite each other's sessions there, because {protocol}:// cannot create a "
            f"file only if there is none. Take a directory (NFS too) or {', '.join(f'{p}://' for p in EXCLUSIVE)}"
        )
    import fsspec

    try:
        system, root = fsspec.core.url_to_fs(str(place), use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise UserError(f"{place}: {error}") from None
    return RemoteFiles(system, root)


class ExistsError(Exception):
    """A blob of this name is there already."""


class LocalFiles:
    """Blobs by name ("folder/folder/blob") below a directory. A blob is there as a whole or not at all."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True, mode=0o700)

    def create(self, name: str, data: bytes) -> None:
        """Write a new blob to disk. Raises ExistsError when there is one: of several who try, one succeeds."""
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
        """Return a blob's content. Raises FileNotFoundError."""
        return (self.root / name).read_bytes()

    def names(self, folder: str) -> list[str]:
        """List the blobs and folders in a folder, without those that are being written."""
        try:
            return [entry.name for entry in os.scandir(self.root / folder) if not entry.name.startswith(".")]
        except FileNotFoundError:
            return []

    def remove(self, name: str) -> None:
        """Delete a blob, or a folder with all that is in it; harmless when it is not there."""
        path = self.root / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def sweep(self, folder: str) -> None:
        """Delete what processes that were killed while they wrote have left, when it is an hour old."""
        with suppress(FileNotFoundError):
            for entry in os.scandir(self.root / folder):
                if entry.name.startswith(".") and time.time() - entry.stat().st_mtime > 3600:
                    self.remove(f"{folder}/{entry.name}")

    def put(self, name: str, write: Callable[[Path], None]) -> None:
        """Let ``write`` make a large blob, given a path; it must be durable when ``write`` returns."""
        write(self.root / name)

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """Yield a large blob as a local file, for as long as the context lasts."""
        yield self.root / name


class RemoteFiles:
    """As ``LocalFiles``, on a file system of fsspec."""

    def __init__(self, system: Any, root: str) -> None:
        self.system, self.root = system, root.rstrip("/")

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def create(self, name: str, data: bytes) -> None:
        path = self._path(name)
        try:
            self.system.pipe_file(path, data, mode="create")
        except FileExistsError:
            raise ExistsError(name) from None
        except OSError:  # S3's "precondition failed" has no error of its own
            if self.system.exists(path):
                raise ExistsError(name) from None
            raise

    def read(self, name: str) -> bytes:
        found: bytes = self.system.cat_file(self._path(name))
        return found

    def names(self, folder: str) -> list[str]:
        path = self._path(folder)
        self.system.invalidate_cache(path)
        try:
            found = {name.rstrip("/") for name in self.system.ls(path, detail=False)} - {path}  # S3 may list the folder
            return [name.rpartition("/")[2] for name in found]
        except FileNotFoundError:
            return []

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self.system.rm(self._path(name), recursive=True)

    def sweep(self, folder: str) -> None:
        """Do nothing: a blob appears as a whole."""

    def put(self, name: str, write: Callable[[Path], None]) -> None:
        with tempfile.TemporaryDirectory() as place:
            write(Path(place) / "blob")
            self.system.put_file(str(Path(place) / "blob"), self._path(name))

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """Copy a blob to a local file, for as long as the context lasts."""
        with tempfile.TemporaryDirectory() as place:
            self.system.get_file(self._path(name), str(Path(place) / "blob"))
            yield Path(place) / "blob"


def _sync(folder: Path) -> None:
    with suppress(OSError):  # not every system can
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
