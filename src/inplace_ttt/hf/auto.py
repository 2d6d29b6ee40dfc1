"""Registration of this library's directories with transformers' Auto classes.

Their ``config.json`` has a model type of its own. Unless this library is imported, transformers does not know that type
and raises an error; once it is, ``AutoModelForCausalLM`` (used by trl, peft, pipelines, ...) loads the whole model.
Two kinds of directory have such a file:

* those of this library's ``save_pretrained``: the file holds nothing else;
* those of transformers' own ``save_pretrained`` (the Trainer's) for an attached model: weights under the names of the
  base and of the added parameters, and in the file the fast weights' settings beside ``base_config`` (without its
  model type, which ``LlamaForCausalLM`` would accept).
"""

import warnings
from pathlib import Path
from typing import Any, ClassVar

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from ..config import InPlaceTTTConfig
from ..errors import UserError, in_one_line
from .checkpoint import from_pretrained
from .directory import (
    BASE,
    CONFIG,
    MODEL_TYPE,
    SETTINGS,
    fetch,
    place_of_base,
    read_json,
    read_settings,
    split_config,
    tokenizer_places,
)
from .names import UNSAVED, base_in_memory
from .release import is_release, load_release

CLASSIFIER = "ForSequenceClassification"


class FastWeightsConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """A directory's ``config.json``. The model's own configuration is a different object, see ``model.config``."""

    model_type = MODEL_TYPE
    auto_map: ClassVar[dict[str, str]] = {}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Pass all keywords on to the model: none of them are settings of this file."""
        wants_rest = kwargs.pop("return_unused_kwargs", False)
        for name in ("_from_auto", "_from_pipeline"):
            kwargs.pop(name, None)
        config = super().from_dict(config_dict, name_or_path=kwargs.pop("name_or_path", ""))
        return (config, kwargs) if wants_rest else config


class InPlaceTTTForCausalLM:
    """A loader of this library's directories for transformers' Auto classes; models have the base's own class."""

    config_class = FastWeightsConfig

    @classmethod
    def from_pretrained(cls, directory: str | Path, *args: Any, **kwargs: Any) -> Any:
        """Call ``inplace_ttt.from_pretrained``. UserError when the directory holds a model with another head."""
        for name in ("config", "adapter_kwargs", "_from_auto", "code_revision"):
            kwargs.pop(name, None)
        wants_report = kwargs.pop("output_loading_info", False)
        model = from_pretrained(directory, **kwargs)
        kind = type(model).__name__
        if kind.endswith(CLASSIFIER) != (cls is not InPlaceTTTForCausalLM):
            raise UserError(f"{directory} holds a {kind}: load it with inplace_ttt.from_pretrained")
        report: dict[str, set[str]] = {name: set() for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        return (model, {**report, "error_msgs": []}) if wants_report else model

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        raise UserError(
            "the configuration of a directory does not say how to build its model: use inplace_ttt.from_pretrained, "
            "or build the base and call inplace_ttt.attach"
        )


class InPlaceTTTForSequenceClassification(InPlaceTTTForCausalLM):
    """A loader of models with a classification head (reward models)."""


class FolderTokenizer(PreTrainedTokenizerFast):
    """A loader of tokenizers for transformers' Auto classes: a directory's own, or its base's."""

    @classmethod
    def from_pretrained(cls, directory: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Load the tokenizer with transformers from the place of its files."""
        if (Path(directory) / CONFIG).is_file() and read_json(Path(directory) / CONFIG).get("unsaved"):
            return AutoTokenizer.from_pretrained(
                base_in_memory(str(directory).removeprefix(str(UNSAVED))), *args, **kwargs
            )
        if any(Path(directory).glob("tokenizer*")) or not Path(directory).is_dir():
            return PreTrainedTokenizerFast.from_pretrained(directory, *args, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in ("_commit_hash", "_from_auto")}
        place, where = tokenizer_places(directory)[-1]
        return AutoTokenizer.from_pretrained(place, *args, **{**kwargs, **where})


AutoConfig.register(MODEL_TYPE, FastWeightsConfig, exist_ok=True)
AutoModelForCausalLM.register(FastWeightsConfig, InPlaceTTTForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(FastWeightsConfig, InPlaceTTTForSequenceClassification, exist_ok=True)
AutoTokenizer.register(  # type: ignore[no-untyped-call]
    FastWeightsConfig, fast_tokenizer_class=FolderTokenizer, exist_ok=True
)


def base_config(name: str | Path) -> tuple[PretrainedConfig, InPlaceTTTConfig | None]:
    """Return the base's configuration and the fast weights' settings (None: a plain model) of a directory or hub id.

    An adapter gives the configuration of the base that it names. Raises UserError when they cannot be read.
    """
    path = Path(name).expanduser()
    place = str(path) if path.is_dir() else str(name)
    if not (path / SETTINGS).is_file():
        config = _config(place)
        if is_release(config.__dict__):
            settings, dropped = load_release(config.to_dict())
            if dropped:
                warnings.warn(f"{name} names layers {dropped}, which the model does not have: left out", stacklevel=3)
            return config, settings
        if not isinstance(config, FastWeightsConfig):
            values = config.__dict__.pop("inplace_ttt", None)
            return config, None if values is None else InPlaceTTTConfig.from_dict(values)
        if config.__dict__.keys() & {"base_config", "unsaved"}:
            config, values = split_config(config.to_dict(), path)
            return config, None if values is None else InPlaceTTTConfig.from_dict(values)
        path = fetch(place, allow_patterns=[SETTINGS])
    stored = read_settings(path)
    settings, base = InPlaceTTTConfig.from_dict(stored["inplace_ttt"]), stored["base"]
    if stored["kind"] == "model":
        return _config(place, subfolder=BASE), settings
    if not base.get("name"):
        raise UserError(f"{name} is an adapter without its base model's name: name the base model instead")
    where = {key: base[key] for key in ("revision", "subfolder") if base.get(key)}
    return _config(place_of_base(path, base), **where), settings


def _config(place: str, **where: str) -> Any:
    try:
        return AutoConfig.from_pretrained(place, **where)
    except (OSError, ValueError) as error:
        raise UserError(f"the configuration of {place} cannot be read: {in_one_line(error, 200)}") from None
