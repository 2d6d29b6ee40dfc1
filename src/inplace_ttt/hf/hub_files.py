"""Directories on the hub: fetch one, upload one."""

from pathlib import Path
from typing import Any

from ..errors import UserError, in_one_line
from ..hub import require_hub_id

FETCHING = ("revision", "token", "cache_dir", "local_files_only", "force_download")
UPLOADING = ("repo_id", "token", "private", "commit_message", "revision", "create_pr")


def take(kwargs: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Take the keywords with these names out of ``kwargs``."""
    return {name: kwargs.pop(name) for name in names if name in kwargs}


def fetch(directory: str | Path, subfolder: str = "", **hub: Any) -> Path:
    """Return the local directory of a model: ``directory`` itself, or a copy of that hub id; in it, ``subfolder``.

    ``hub``: the keywords in ``FETCHING``, as huggingface_hub has them. Raises UserError when there is none.
    """
    path = Path(directory).expanduser()
    if path.is_dir():
        if hub.get("revision") not in (None, "main"):
            raise UserError(f"{directory} is a local directory, which has no revision {hub['revision']!r}")
    else:
        require_hub_id(str(directory))
        from huggingface_hub import snapshot_download

        if subfolder:
            hub["allow_patterns"] = [f"{subfolder.strip('/')}/*"]
        try:
            path = Path(snapshot_download(str(directory), **hub))
        except Exception as error:
            raise UserError(
                f"{directory} is not a local directory and could not be fetched from the hub ({in_one_line(error)})"
            ) from None
    if not (path / subfolder).is_dir():
        raise UserError(f"{directory} has no directory {subfolder}")
    return path / subfolder


def upload(
    directory: Path, *, repo_id: str | None = None, token: Any = None, private: bool | None = None, **how: Any
) -> None:
    """Upload a directory to the hub; ``repo_id`` None: its own name. ``how``: further keywords of ``UPLOADING``."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo = api.create_repo(repo_id or directory.resolve().name, private=private, exist_ok=True).repo_id
    how["commit_message"] = how.get("commit_message") or "Upload model with fast weights"
    api.upload_folder(repo_id=repo, folder_path=directory, **how)
