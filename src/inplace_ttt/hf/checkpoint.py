"""Saving and loading: the whole model, or the adapter alone.

A saved directory holds

* ``inplace_ttt.json``: the settings, their format version, and samples of the slow weights as a fingerprint;
* ``inplace_ttt.safetensors``: the parameters that attach adds (and, on request, the adapting projections);
* for a whole model, transformers' own files in ``base/``. The root has no ``config.json`` on purpose: a library that
  knows nothing of fast weights must not load the directory as the plain model.
"""

import copy
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import distribute_tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..config import InPlaceTTTConfig
from ..errors import UserError
from .attach import attach, detach, is_attached, plain_config, runtime_of, unwrap, unwrap_to_save
from .nested import auto_class
from .release import is_release, load_release
from .sharding import is_sharded, whole, whole_state
from .tensor_parallel import is_split

SETTINGS, TENSORS, BASE = "inplace_ttt.json", "inplace_ttt.safetensors", "base"
SAMPLES = 16


def adapter_state(model: nn.Module, projections: bool = False) -> dict[str, Tensor]:
    """The parameters that attach added, by their names in the transformers model; optionally the projections too."""
    root, runtime = unwrap(model), runtime_of(model)
    names = {id(module): name for name, module in root.named_modules()}
    tensors = {}
    for site in runtime.sites:
        prefix = names[id(site.mlp)]
        for name in ("ttt_conv", "ttt_proj"):
            if (module := getattr(site.mlp, name, None)) is not None:
                tensors[f"{prefix}.{name}.weight"] = module.weight
        if projections:
            projection = site.projection()
            for name, parameter in projection.named_parameters(recurse=False):
                tensors[f"{names[id(projection)].replace('.base_layer', '')}.{name}"] = parameter
    return {name: whole(tensor).contiguous() for name, tensor in tensors.items()}


def fingerprint(model: nn.Module) -> dict[str, list[float]]:
    """A few entries of each adapting projection's slow weight: tells one base model from another, in any precision."""
    samples = {}
    for site in runtime_of(model).sites:
        weight = whole(site.projection().weight)
        if weight.is_floating_point() and weight.device.type != "meta":
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
    **kwargs: Any,
) -> None:
    """Saves an attached model so that ``from_pretrained`` gives it back.

    ``adapter_only`` leaves the base model out (load it with ``from_pretrained(directory, model=base)``);
    ``projections`` then adds the adapting projections, for runs that trained them. Further keywords go to transformers'
    ``save_pretrained``. A sharded model (FSDP2, tensor parallelism) is saved whole: all ranks call this, one writes.
    Raises UserError when nothing is attached, or weights are offloaded.
    """
    root, runtime = unwrap(model) if adapter_only else unwrap_to_save(model), runtime_of(model)
    path, sharded = Path(directory), is_sharded(root)
    if empty := [n for n, p in root.named_parameters() if p.is_meta and (is_added(n) or not adapter_only)]:
        raise UserError(f"{empty[0]} has no values here (offloaded, or on the meta device): save the model before that")
    settings = {
        "inplace_ttt": runtime.config.to_dict(),
        "kind": "adapter" if adapter_only else "model",
        "base": {"model_type": root.config.model_type, "name": root.config._name_or_path if adapter_only else ""},
        "fingerprint": {} if projections else fingerprint(model),
    }
    added = adapter_state(model, adapter_only and projections)
    state = {} if adapter_only else whole_state(root) if sharded else root.state_dict()
    if not sharded or dist.get_rank() == 0:
        path.mkdir(parents=True, exist_ok=True)
        if not adapter_only:
            with plain_config(root):
                save_base(root, path / BASE, {k: v for k, v in state.items() if not is_added(k)}, sharded, kwargs)
        save_file(added, path / TENSORS, metadata={"format": "pt"})
        (path / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(path)
    if sharded:
        dist.barrier()


def save_base(
    root: PreTrainedModel, path: Path, state: dict[str, Tensor], sharded: bool, kwargs: dict[str, Any]
) -> None:
    """transformers' own files of the base model; of a sharded one through a model without weights that is not."""
    if not sharded:
        root.save_pretrained(path, state_dict=state, **kwargs)
        return
    config = copy.deepcopy(root.config)
    config.dtype = next(x.dtype for x in state.values() if x.is_floating_point())
    config._attn_implementation = "eager"
    if getattr(config, "distributed_config", None) is not None:
        config.distributed_config = None
    plain: Any = next(cls for cls in type(root).__mro__ if not issubclass(cls, FSDPModule))
    with torch.device("meta"):
        bare = plain(config)
    bare.generation_config = root.generation_config
    bare.save_pretrained(path, state_dict=state, **kwargs)


def from_pretrained(directory: str | Path, model: nn.Module | None = None, **kwargs: Any) -> Any:
    """A model with fast weights from a directory (or hub id) that holds one.

    Reads what ``save_pretrained`` wrote (an adapter is put on ``model``, or on the base it names), what transformers'
    own ``save_pretrained`` wrote of an attached model, and the authors' release format. Keywords (``dtype``,
    ``device_map``, ...) go to transformers' ``from_pretrained``. Raises UserError, with the reason, on a missing
    or foreign directory, a newer format, a wrong base model, and missing, extra or misshapen tensors.
    """
    path = _resolve(directory)
    if not (path / SETTINGS).is_file():
        return _from_plain_layout(path, kwargs)
    settings = _read_json(path / SETTINGS)
    kinds = {"inplace_ttt": dict, "kind": str, "base": dict, "fingerprint": dict}
    if wrong := [key for key, kind in kinds.items() if not isinstance(settings.get(key), kind)]:
        raise UserError(f"{path / SETTINGS} is damaged (no {', '.join(wrong)}): save the model again")
    config = InPlaceTTTConfig.from_dict(settings["inplace_ttt"])
    try:
        tensors = load_file(path / TENSORS)
    except (FileNotFoundError, SafetensorError) as error:
        raise UserError(f"{path / TENSORS} is missing or damaged ({error}): save the model again") from None
    base = _base(path, settings, model, kwargs)
    attach(base, config)
    try:
        _check_fingerprint(base, settings, path)
        load_added(base, tensors, str(path / TENSORS))
    except UserError:
        detach(base)
        raise
    return base


def is_added(name: str) -> bool:
    """Whether a parameter's name is one that attach adds."""
    return ".ttt_conv." in name or ".ttt_proj." in name


def load_added(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copies stored parameters into an attached model; UserError unless names and shapes match exactly."""
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


def load_plain(path: Path | str, kwargs: dict[str, Any], model_type: str | None = None) -> PreTrainedModel:
    """Load a model as transformers does, but refuse missing weights instead of making them up.

    ``model_type`` tells which part is wanted where a checkpoint of several modalities also loads as its text model.
    """
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        kwargs = {**kwargs, "output_loading_info": True, "ignore_mismatched_sizes": True}  # refused below, by name
        loaded: Any = auto_class(path, kwargs, model_type).from_pretrained(path, **kwargs)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"transformers cannot load {path}: missing or damaged? ({error})") from None
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


def stored_added(path: Path) -> dict[str, Tensor]:
    """The added parameters in a directory's own safetensors files."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise UserError(f"{path} has no safetensors file")
    return {k: v for file in files for k, v in load_file(file).items() if is_added(k)}


def require_hub_id(name: str) -> None:
    """UserError unless a name that is no directory here can be one on the hub (OWNER/NAME)."""
    if Path(name).expanduser().exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(f"no model directory at {name}")


def _resolve(directory: str | Path) -> Path:
    path = Path(directory).expanduser()
    if path.is_dir():
        return path
    require_hub_id(str(directory))
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(directory)))
    except Exception as error:
        raise UserError(f"{directory} is no directory here and could not be fetched from the hub ({error})") from None


def _from_plain_layout(path: Path, kwargs: dict[str, Any]) -> PreTrainedModel:
    """A directory that transformers wrote: of an attached model, or in the authors' format."""
    if not (path / "config.json").is_file():
        raise UserError(f"{path} holds no model: it has neither {SETTINGS} nor config.json")
    values = _read_json(path / "config.json")
    if is_release(values):
        config, dropped = load_release(values)
        if dropped:
            warnings.warn(f"{path} names layers {dropped}, which the model does not have: left out", stacklevel=3)
    elif "inplace_ttt" in values:
        config = InPlaceTTTConfig.from_dict(values["inplace_ttt"])
    else:
        raise UserError(
            f"{path} is a plain model without fast weights: load it with transformers and call inplace_ttt.attach"
        )
    model = load_plain(path, kwargs)
    attach(model, config)
    load_added(model, stored_added(path), str(path))
    return model


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}): save the model again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged (it holds a {type(values).__name__}): save the model again")
    return values


def _base(path: Path, settings: dict[str, Any], model: nn.Module | None, kwargs: dict[str, Any]) -> Any:
    if settings["kind"] == "model":
        if model is not None:
            raise UserError(f"{path} holds a whole model: leave out model=")
        return load_plain(path / BASE, kwargs)
    wanted = settings["base"]
    if model is None:
        if not wanted.get("name"):
            raise UserError(f"{path} is an adapter without its base model's name: pass model=")
        try:
            return load_plain(wanted["name"], kwargs, wanted.get("model_type"))
        except UserError as error:
            raise UserError(
                f"{path} is an adapter, and its base model {wanted['name']!r} is not there: pass model= ({error})"
            ) from None
    if is_attached(model):
        raise UserError("the model has fast weights already: detach(model) first")
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
