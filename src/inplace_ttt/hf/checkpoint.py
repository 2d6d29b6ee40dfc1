"""Saving and loading: the whole model, or the adapter alone.

A saved directory holds

* ``inplace_ttt.json``: the settings, their format version, and samples of the slow weights as a fingerprint;
* ``inplace_ttt.safetensors``: the parameters that attach adds (and, on request, the adapting projections);
* for a whole model, transformers' own files in ``base/``;
* ``config.json`` with a model type of this library: another library gets the whole model or an error, never the plain
  model (see ``auto``);
* ``README.md``: a model card.
"""

import copy
import json
import logging
import re
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import distribute_tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from ..config import InPlaceTTTConfig
from ..errors import UserError, in_one_line
from .attach import PLAIN, detach, install, plain_config, runtime_of, unwrap, unwrap_to_save
from .card import write_card
from .directory import (
    BASE,
    CONFIG,
    FETCHING,
    MODEL_TYPE,
    SETTINGS,
    TENSORS,
    UPLOADING,
    check_free,
    fetch,
    place_of_base,
    read_json,
    read_settings,
    split_config,
    take,
    upload,
    write_config,
)
from .linear import is_dense
from .names import BaseModel, base_of, rename_loaded
from .release import is_release, load_release
from .sharding import is_sharded, whole, whole_state
from .tensor_parallel import is_split

SAMPLES = 16
MODEL_KEYWORDS = ("dtype", "torch_dtype", "attn_implementation", "quantization_config")
"""Keywords that transformers' ``from_pretrained`` accepts beside a configuration."""
HUB_KEYWORDS = ("gguf_file", "revision", "token", "subfolder", "cache_dir", "local_files_only", "trust_remote_code")
"""Those that its ``AutoConfig`` needs."""


def adapter_state(model: nn.Module, projections: bool = False) -> dict[str, Tensor]:
    """Return the parameters that attach added, by name in the transformers model; optionally the projections too."""
    root, runtime = unwrap(model), runtime_of(model)
    names = {id(module): name for name, module in root.named_modules()}
    tensors = {}
    for site in runtime.sites:
        prefix = names[id(site.mlp)]
        for name, held in site.bound_target().named_children():
            child: Any = held
            if hasattr(child, "modules_to_save"):  # peft's wrapper
                child = child.modules_to_save[child.active_adapters[0]]
            for inner, parameter in child.named_parameters():
                tensors[f"{prefix}.ttt_{name}.{inner}"] = parameter
        if projections:
            projection = site.projection()
            for name, parameter in projection.named_parameters(recurse=False):
                tensors[f"{names[id(projection)].replace('.base_layer', '')}.{name}"] = parameter
    return {name: whole(tensor).contiguous() for name, tensor in tensors.items()}


def fingerprint(model: nn.Module) -> dict[str, list[float]]:
    """Sample each adapting projection's slow weight, to tell one base model from another in any precision."""
    samples = {}
    for site in runtime_of(model).sites:
        weight = whole(site.projection().weight)
        if is_dense(weight) and not weight.is_meta:
            flat = weight.flatten()
            samples[str(site.index)] = flat[:: max(flat.numel() // SAMPLES, 1)][:SAMPLES].float().cpu().tolist()
    return samples


def save_pretrained(
    model: nn.Module,
    directory: str | Path,
    tokenizer: Any = None,
    *,
    adapter_only: bool = False,
    projections: bool = False,
    base: str | None = None,
    results: Mapping[str, Mapping[str, float]] | None = None,
    push_to_hub: bool = False,
    **kwargs: Any,
) -> None:
    """Save an attached model for ``from_pretrained``.

    ``adapter_only`` leaves the base model out (load it with ``from_pretrained(directory, model=base)``);
    ``projections`` then adds the adapting projections, for runs that trained them. ``base``: the name of an
    adapter's base, a directory, OWNER/NAME, or OWNER/NAME@REVISION; default: the one it was loaded from.
    ``results``: losses for the model card, by the name of the text ``{"on": ..., "off": ...}`` in nats per token.
    ``push_to_hub`` uploads the directory, with transformers' keywords (``repo_id``, ``token``, ``private``,
    ``commit_message``, ``revision``, ``create_pr``). Further keywords (``variant``, ``max_shard_size``, ...) go to
    transformers' ``save_pretrained``. A sharded model (FSDP2, tensor parallelism) is saved whole: all ranks call this,
    one writes. Raises UserError when nothing is attached, weights are offloaded, or ``directory`` holds another model.
    """
    root, runtime = unwrap(model) if adapter_only else unwrap_to_save(model), runtime_of(model)
    path, sharded, uploading = Path(directory), is_sharded(root), take(kwargs, UPLOADING)
    check_free(path)
    if empty := [n for n, p in root.named_parameters() if p.is_meta and (is_added(n) or not adapter_only)]:
        raise UserError(f"{empty[0]} has no values here (offloaded, or on the meta device): save the model before that")
    kind: dict[str, Any] = {"model_type": root.config.model_type, "architecture": plain_class(root).__name__}
    settings = {
        "inplace_ttt": runtime.config.to_dict(),
        "kind": "adapter" if adapter_only else "model",
        "base": kind | (_base_to_name(root, base) if adapter_only else {"name": ""}),
        "fingerprint": {} if projections else fingerprint(model),
    }
    added = adapter_state(model, adapter_only and projections)
    state = {} if adapter_only else whole_state(root) if sharded else root.state_dict()
    if not sharded or dist.get_rank() == 0:
        path.mkdir(parents=True, exist_ok=True)
        if not adapter_only:
            with plain_config(root):
                save_base(root, path / BASE, {k: v for k, v in state.items() if not is_added(k)}, sharded, kwargs)
        save_file(added, path / tensors_name(kwargs.get("variant")), metadata={"format": "pt"})
        (path / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        write_config(path)
        if tokenizer is not None:
            tokenizer.save_pretrained(path)
        write_card(path, settings, uploading.get("repo_id"), results)
        if push_to_hub:
            upload(path, **uploading)
    if sharded:
        dist.barrier()


def tensors_name(variant: str | None) -> str:
    """Return the name of the file of added parameters; transformers' own files have the same variant."""
    return TENSORS if not variant else TENSORS.replace(".safetensors", f".{variant}.safetensors")


def plain_class(root: PreTrainedModel) -> type[PreTrainedModel]:
    """Return the model's class without FSDP2's additions."""
    return next(cls for cls in type(root).__mro__ if not issubclass(cls, FSDPModule))  # type: ignore[return-value]


def _base_to_name(root: PreTrainedModel, given: str | None) -> dict[str, Any]:
    """Return an adapter's entry for its base. A directory gets its absolute path, for any current directory."""
    if given is None:
        base = base_of(root)
    else:
        name, at, revision = given.rpartition("@")
        base = BaseModel(name, revision) if at and not Path(given).exists() else BaseModel(given)
    name = str(Path(base.name).expanduser().resolve()) if Path(base.name).expanduser().is_dir() else base.name
    found = {"name": name if base.name else "", "revision": base.revision, "subfolder": base.subfolder}
    return {key: value for key, value in found.items() if key == "name" or value}


def save_base(
    root: PreTrainedModel, path: Path, state: dict[str, Tensor], sharded: bool, kwargs: dict[str, Any]
) -> None:
    """Write transformers' own files of the base model; a sharded one is written through an unsharded meta model."""
    if not sharded:
        type(root).save_pretrained(root, path, state_dict=state, **kwargs)  # not the override
        return
    config = copy.deepcopy(root.config)
    config.dtype = next(x.dtype for x in state.values() if x.is_floating_point())
    config._attn_implementation = "eager"
    if getattr(config, "distributed_config", None) is not None:
        config.distributed_config = None
    plain: Any = plain_class(root)
    with torch.device("meta"):
        bare = plain(config)
    bare.generation_config = root.generation_config
    bare.save_pretrained(path, state_dict=state, **kwargs)


def from_pretrained(directory: str | Path, model: nn.Module | None = None, **kwargs: Any) -> Any:
    """Load a model with fast weights from a directory or hub id.

    Reads the formats of this library's ``save_pretrained`` (an adapter is put on ``model``, or on its base), of
    transformers' own ``save_pretrained`` for an attached model, and the authors' release format. Keywords (``dtype``,
    ``device_map``, ...) go to transformers' ``from_pretrained``. ``revision``, ``subfolder`` and ``variant`` are those
    of ``directory`` (an adapter names its base's own); ``token``, ``cache_dir``, ``local_files_only`` and
    ``force_download`` apply to both. Raises UserError, with the reason, on a missing or foreign directory, a newer
    format, a wrong base model, and missing, extra or misshapen tensors.
    """
    hub, subfolder = take(kwargs, FETCHING), kwargs.pop("subfolder", None) or ""
    path = fetch(directory, subfolder, **hub)
    is_exact = Path(directory).expanduser().is_dir() or subfolder or hub.pop("revision", None) is not None
    name = str(path.resolve()) if is_exact else str(directory)
    if not (path / SETTINGS).is_file():
        model_ = _from_plain_layout(path, kwargs)
        rename_loaded(model_, name, BaseModel())
        return model_
    settings = read_settings(path)
    config = InPlaceTTTConfig.from_dict(settings["inplace_ttt"])
    file = path / tensors_name(kwargs.get("variant"))
    try:
        tensors = load_file(file)
    except (FileNotFoundError, SafetensorError) as error:
        raise UserError(f"{file} is missing or damaged ({error}): save the model again") from None
    base = _base(path, settings, model, kwargs, hub)
    install(base, config)
    try:
        _check_fingerprint(base, settings, path)
        load_added(base, tensors, str(file))
    except UserError:
        detach(base)
        raise
    if settings["kind"] == "model" or settings["base"].get("name"):
        rename_loaded(unwrap(base), name, _named_base(name, path, settings))
    return base


def _named_base(name: str, path: Path, settings: dict[str, Any]) -> BaseModel:
    """Return the base of a loaded directory: inside the directory, or the one that an adapter names."""
    if settings["kind"] == "model":
        inside = str((path / BASE).resolve())
        return BaseModel(inside, place=inside) if Path(name).is_dir() else BaseModel(name, None, BASE, inside)
    wanted = settings["base"]
    return BaseModel(wanted["name"], wanted.get("revision"), wanted.get("subfolder", ""))


def is_added(name: str) -> bool:
    """Tell if attach adds a parameter of this name."""
    return ".ttt_" in name


def load_added(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copy stored parameters into an attached model; UserError unless names and shapes match exactly."""
    root = unwrap(model)
    parameters = dict(root.named_parameters(remove_duplicate=False))
    missing = sorted({n for n in parameters if is_added(n)} - set(tensors))
    extra = sorted(set(tensors) - set(parameters))
    for names, what in ((missing, "lacks"), (extra, "has tensors that this model has not:")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"{source} {what} {', '.join(names[:3])}{more}: wrong base model, or a damaged file")
    for name, tensor in tensors.items():
        if parameters[name].shape != tensor.shape:
            raise UserError(
                f"{source}: {name} has shape {tuple(tensor.shape)}, this model needs {tuple(parameters[name].shape)}"
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameter: Any = parameters[name]
            if is_split(parameter):
                tensor = distribute_tensor(tensor.to(parameter.dtype), parameter.device_mesh, parameter.placements)
            parameter.copy_(tensor)


def load_plain(
    path: Path | str, kwargs: dict[str, Any], architecture: str | None = None, model_type: str | None = None
) -> PreTrainedModel:
    """Load a model as transformers does, but raise UserError on missing weights instead of initialising them.

    ``architecture``: the name of its class, where it is not a causal language model (a classification head).
    ``model_type``: selects the part of a checkpoint of several modalities that also loads as its text model.
    """
    loader: Any = None
    if architecture is not None and not architecture.endswith(("ForCausalLM", "LMHeadModel")):
        loader = getattr(transformers, architecture, None)
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        kwargs = {**kwargs, "output_loading_info": True, "ignore_mismatched_sizes": True}  # an error below names them
        loader = _auto_class(path, kwargs, model_type) if loader is None else loader
        loaded: Any = loader.from_pretrained(path, **kwargs)
    except (OSError, ValueError, SafetensorError, struct.error) as error:
        name = Path(path, kwargs["gguf_file"]) if "gguf_file" in kwargs else path
        raise UserError(f"transformers cannot load {name}: missing or damaged? ({in_one_line(error)})") from None
    finally:
        transformers_logging.set_verbosity(level)
    model, report = loaded
    missing = sorted(report["missing_keys"])
    extra = sorted(k for k in report["unexpected_keys"] if not is_added(k))
    if missing or report["mismatched_keys"]:
        raise UserError(f"{path} lacks or misshapes weights of the base model: {missing or report['mismatched_keys']}")
    if extra:
        raise UserError(f"{path} has weights that {type(model).__name__} does not know: {', '.join(extra[:3])}")
    return model  # type: ignore[no-any-return]


def _auto_class(path: Path | str, kwargs: dict[str, Any], model_type: str | None = None) -> Any:
    """Return transformers' auto class for a checkpoint: with its other modalities if it was saved with them.

    ``model_type``: of the requested model; a text model inside another type of model is loaded alone. ``kwargs``: those
    for ``from_pretrained``. Raises the errors of ``AutoConfig.from_pretrained``.
    """
    config: Any = kwargs.get("config")
    if not hasattr(config, "model_type"):
        config = AutoConfig.from_pretrained(path, **{k: v for k, v in kwargs.items() if k in HUB_KEYWORDS})
    saved = (getattr(config, "architectures", None) or [None])[0]
    several = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    if several is not None and several == saved and model_type in (None, config.model_type):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def stored_added(path: Path, variant: str | None = None) -> dict[str, Tensor]:
    """Return the added parameters among the weights that transformers wrote into a directory."""
    part, end = r"(-\d+-of-\d+)?", rf"\.{re.escape(variant)}" if variant else ""
    name = re.compile(rf"model({part}{end}|{end}{part})\.safetensors")
    files = sorted(file for file in path.glob("*.safetensors") if name.fullmatch(file.name))
    if not files:
        raise UserError(f"{path} has no safetensors file" + (f" of the variant {variant}" if variant else ""))
    return {k: v for file in files for k, v in load_file(file).items() if is_added(k)}


def has_fast_weights(directory: Path) -> bool:
    """Tell if ``from_pretrained`` can read a local directory."""
    if (directory / SETTINGS).is_file() or not (directory / CONFIG).is_file():
        return (directory / SETTINGS).is_file()
    values = read_json(directory / CONFIG)
    return "inplace_ttt" in values or is_release(values)


def add_results(directory: Path, results: Mapping[str, Mapping[str, float]]) -> None:
    """Write the model card of a saved directory again, with results (see ``save_pretrained``)."""
    write_card(directory, read_json(directory / SETTINGS), results=results)


def _from_plain_layout(path: Path, kwargs: dict[str, Any]) -> PreTrainedModel:
    """Load a directory that transformers wrote: of an attached model, or in the authors' format."""
    if not (path / CONFIG).is_file():
        raise UserError(f"{path} holds no model: it has neither {SETTINGS} nor {CONFIG}")
    values = read_json(path / CONFIG)
    architecture = None
    if is_release(values):
        config, dropped = load_release(values)
        if dropped:
            warnings.warn(f"{path} names layers {dropped}, which the model does not have: left out", stacklevel=3)
    elif "inplace_ttt" in values:
        config = InPlaceTTTConfig.from_dict(values["inplace_ttt"])
        architecture = next(iter((values.get("base_config") or values).get("architectures") or []), None)
        kwargs = with_config(split_config(values, path)[0], kwargs)
    elif values.get("unsaved") or "base_config" in values:
        split_config(values, path)
        raise UserError(f"{path / CONFIG} is damaged (no inplace_ttt): save the model again")
    elif values.get("model_type") == MODEL_TYPE:
        raise UserError(f"{path} lacks {SETTINGS}: save or download the model again")
    else:
        raise UserError(f"{path} {PLAIN}")
    model = load_plain(path, kwargs, architecture)
    install(model, config)
    load_added(model, stored_added(path, kwargs.get("variant")), str(path))
    return model


def with_config(config: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return keywords for transformers' ``from_pretrained``; those that are settings move into the configuration."""
    apart = {name: kwargs[name] for name in MODEL_KEYWORDS if name in kwargs}
    settings = {name: value for name, value in kwargs.items() if name not in apart}
    config, rest = type(config).from_dict(config.to_dict(), return_unused_kwargs=True, **settings)
    return {**rest, **apart, "config": config}


def _base(
    path: Path, settings: dict[str, Any], model: nn.Module | None, kwargs: dict[str, Any], hub: dict[str, Any]
) -> Any:
    wanted = settings["base"]
    if settings["kind"] == "model":
        if model is not None:
            raise UserError(f"{path} holds a whole model: leave out model=")
        return load_plain(path / BASE, kwargs, wanted.get("architecture"))
    if model is None:
        if not wanted.get("name"):
            raise UserError(f"{path} is an adapter without its base model's name: pass model=")
        hub = {key: value for key, value in hub.items() if key != "revision"}
        hub |= {key: wanted[key] for key in ("revision", "subfolder") if wanted.get(key)}
        rest = {key: value for key, value in kwargs.items() if key != "variant"}
        try:
            place, more = place_of_base(path, wanted), {**rest, **hub}
            return load_plain(place, more, wanted.get("architecture"), wanted.get("model_type"))
        except UserError as error:
            raise UserError(
                f"{path} is an adapter, and its base model {wanted['name']!r} is not there: pass model= ({error})"
            ) from None
    have = unwrap(model).config.model_type
    if have != wanted.get("model_type"):
        raise UserError(f"{path} belongs on a {wanted.get('model_type')} model, got {have}")
    return model


def _check_fingerprint(model: nn.Module, settings: dict[str, Any], path: Path) -> None:
    have = fingerprint(model)
    for layer, stored in settings.get("fingerprint", {}).items():
        if layer not in have:
            continue
        a, b = torch.tensor(have[layer]), torch.tensor(stored)
        if a.shape != b.shape or not torch.allclose(a, b, rtol=2e-2, atol=1e-6 + 1e-2 * float(b.abs().mean())):
            raise UserError(f"wrong base model: the weights of layer {layer} are not those that {path} was trained on")
