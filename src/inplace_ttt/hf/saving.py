"""Overrides of an attached model for other libraries that save it or read its name."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .directory import CONFIG, mark_config
from .hub_files import UPLOADING, take, upload
from .names import rename_attached, rename_detached


class SavePretrained:
    """A ``save_pretrained`` of an attached model (the Trainer calls it): transformers' own plus our ``config.json``.

    The weights are in the files that the Trainer loads when it resumes. ``push_to_hub`` uploads the finished directory.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        model, uploading = self.model, take(kwargs, UPLOADING) if push_to_hub else {}
        type(model).save_pretrained(model, save_directory, is_main_process, state_dict, **kwargs)
        writes = getattr(model, "should_save_on_this_rank", lambda main: main)(is_main_process)
        path = Path(save_directory)
        if writes and (path / CONFIG).is_file():
            mark_config(path)
            (path / "inplace_ttt.json").unlink(missing_ok=True)  # of a model that was saved there before
        if writes and push_to_hub:
            upload(path, **uploading)


def after_attach(model: PreTrainedModel) -> None:
    """Set ``save_pretrained`` of a model that was just attached, and replace the base's name."""
    model.__dict__["save_pretrained"] = SavePretrained(model)
    rename_attached(model)


def before_detach(model: PreTrainedModel) -> None:
    """Undo ``after_attach``."""
    del model.__dict__["save_pretrained"]
    rename_detached(model)
