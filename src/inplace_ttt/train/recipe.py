"""A training run as one YAML file, checked in full before anything is loaded.

``${NAME}`` in any text is an environment variable; relative paths start at the current directory.
"""

import difflib
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from inplace_ttt.config import OBJECTIVES, InPlaceTTTConfig
from inplace_ttt.errors import UserError, in_one_line
from inplace_ttt.shipped import PACKAGE
from inplace_ttt.train.schema import RecipeError, build, expand_variables, load_yaml
from inplace_ttt.train.sources import SPLITS, source_files, split_source
from inplace_ttt.train.specs import DataSpec, ModelSpec, ParallelSpec, Recipe, TokenizerSpec


def find_recipe(name: str | Path) -> Path:
    """Return a file, or one of the shipped recipes: NAME, NAME.yaml or recipes/NAME.yaml. Raises RecipeError."""
    path = Path(name)
    stem = path.name.removesuffix(".yaml")
    if path.is_file() or str(path) not in (stem, f"{stem}.yaml", str(Path("recipes", f"{stem}.yaml"))):
        return path
    folders = (PACKAGE / "recipes", PACKAGE.parents[1] / "recipes")
    shipped = {file.stem: file for folder in reversed(folders) for file in folder.glob("*.yaml")}
    if stem not in shipped:
        what = "a directory" if path.is_dir() else "no such file"
        raise RecipeError(f"{name}: {what}, nor a recipe of that name, only {', '.join(sorted(shipped))}")
    return shipped[stem]


def load_recipe(
    path: str | Path, overrides: Sequence[str] = (), *, data: bool = True, resume: bool | None = None
) -> Recipe:
    """Read and check a recipe. ``overrides`` are ``key.sub=value`` with a YAML value. Raises RecipeError.

    ``data``: require that its data exists (a plan needs none). ``resume``: also check that the run can be resumed, or
    (False) begun.
    """
    try:
        values = load_yaml(find_recipe(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not YAML ({in_one_line(error, None)})") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: expected settings (key: value)")
    for override in overrides:
        apply_override(values, override)
    return make_recipe(values, data=data, resume=resume)


def make_recipe(values: Mapping[str, Any], *, data: bool = True, resume: bool | None = None) -> Recipe:
    """Make a checked recipe from plain values. Raises RecipeError. ``data``, ``resume``: as for ``load_recipe``."""
    recipe = build(Recipe, expand_variables(dict(values), optional=None if data else "data"))
    object.__setattr__(recipe, "raw", dict(values))  # as written, so that results contain no machine's paths
    _check_numbers(recipe)
    _check_model(recipe.model, recipe.tokenizer)
    _check_data(recipe.data, data)
    if resume is not None:
        start_from(recipe, resume)
    config = _check_ttt(recipe)
    if recipe.parallel is not None:
        _check_parallel(recipe, recipe.parallel, config)
    if config is not None:
        _check_target(recipe, config)
    _check_shape(recipe.model, config)
    return recipe


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set ``key.sub=value`` in place."""
    key, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
        raise RecipeError(f"{override!r}: write key=value or key.sub=value")
    try:
        value = load_yaml(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{override!r}: the value is not YAML ({in_one_line(error, None)})") from None
    *folders, last = key.split(".")
    for folder in folders:
        if not isinstance(values.get(folder), dict):
            values[folder] = {}
        values = values[folder]
    values[last] = value


# -- checks that go beyond types: ranges, missing files, settings that exclude each other ------------------------------


def _check_numbers(recipe: Recipe) -> None:
    optimizer, steps, edges = recipe.optimizer, recipe.steps, list(recipe.evaluation.edges)
    if recipe.peak_tflops is not None and not recipe.peak_tflops > 0:
        raise RecipeError(f"peak_tflops: {recipe.peak_tflops} must be above 0 (989: an H100 in bf16)")
    if not 0 < optimizer.lr < 1:
        raise RecipeError(f"optimizer.lr: {optimizer.lr} must lie between 0 and 1")
    for name, beta in (("beta1", optimizer.beta1), ("beta2", optimizer.beta2)):
        if not 0 <= beta < 1:
            raise RecipeError(f"optimizer.{name}: {beta} must be at least 0 and below 1")
    if optimizer.ttt_lr is not None and not 0 < optimizer.ttt_lr < 1:
        raise RecipeError(f"optimizer.ttt_lr: {optimizer.ttt_lr} must lie between 0 and 1")
    if optimizer.min_lr_ratio > 1:
        raise RecipeError(f"optimizer.min_lr_ratio: {optimizer.min_lr_ratio} must be at most 1, it is a share of lr")
    if optimizer.min_lr_ratio and optimizer.schedule != "cosine":
        raise RecipeError("optimizer.min_lr_ratio: only the cosine schedule has one")
    warmups = {"optimizer.warmup_steps": optimizer.warmup_steps, "ttt_lr_warmup_steps": recipe.ttt_lr_warmup_steps}
    for name, warmup in warmups.items():
        if warmup >= steps:
            raise RecipeError(f"{name}: {warmup} must be below steps ({steps})")
    if edges != sorted(set(edges)):
        raise RecipeError(f"evaluation.edges: must rise, got {edges}")
    if recipe.cut_multiple is not None and not 1 <= recipe.cut_multiple <= recipe.sequence_length:
        limits = f"must lie between 1 and sequence_length ({recipe.sequence_length})"
        raise RecipeError(f"cut_multiple: {recipe.cut_multiple} {limits}")
    for name in recipe.report_to:
        if importlib.util.find_spec(name) is None:
            raise RecipeError(f"report_to: {name} is not installed: pip install {name}")
    for name, place in (("output", recipe.output), ("data.cache", recipe.data.cache)):
        if Path(place).is_file():
            raise RecipeError(f"{name}: {place} is a file, name a directory")
    if recipe.eval_every and not recipe.data.validation:
        raise RecipeError("eval_every: needs data.validation (or set it to 0)")


def _check_model(model: ModelSpec, tokenizer: TokenizerSpec) -> None:
    base, path, is_trained = model.base, tokenizer.path, tokenizer.train is not None
    if (base is None) == (model.config is None):
        raise RecipeError("model: give either base (a directory or hub id) or config (model_type and its settings)")
    if path is not None and is_trained:
        raise RecipeError("tokenizer: give either path or train, not both")
    if base is None and path is None and not is_trained:
        raise RecipeError("tokenizer: missing, a model trained from scratch needs path or train")
    if base is not None and is_trained:
        raise RecipeError("tokenizer.train: a base model keeps its own tokenizer, leave this out")
    _check_place("model.base", base, ("config.json", "inplace_ttt.json"), "model")
    _check_place("tokenizer.path" if path else "tokenizer", path or base, ("*token*", "vocab*"), "tokenizer")
    if model.settings and base is None:
        raise RecipeError("model.settings: only a base has settings to replace, write them in model.config")


def _check_place(name: str, place: str | None, files: Sequence[str], what: str) -> None:
    """Refuse a missing directory or one without ``files``; other names are the hub's, OWNER/NAME at most."""
    if place is None:
        return
    folder = Path(place)
    if (re.match(r"[./~]", place) or place.count("/") > 1) and not folder.is_dir():
        raise RecipeError(f"{name}: there is no directory {place}")
    if folder.is_dir() and not any(next(folder.glob(file), None) for file in files):
        raise RecipeError(f"{name}: there is no {what} in {place}, give a directory that holds one")


def _check_shape(model: ModelSpec, config: InPlaceTTTConfig | None) -> None:
    """Check what transformers knows. The last check: importing it takes seconds."""
    _check_rope("model.settings", model.settings)
    if (shape := model.config) is None:
        return
    _check_config(shape)
    if config is not None and (config.layers_path is None or config.projection_path is None):
        from inplace_ttt.hf.families import FAMILIES

        if shape["model_type"] not in FAMILIES:
            raise RecipeError(
                f"ttt: {shape['model_type']} is not in the table of families: say where its projections are with "
                "ttt.layers_path and ttt.projection_path"
            )


def _check_rope(where: str, values: Mapping[str, Any]) -> None:
    for name in ("rope_parameters", "rope_scaling"):
        if not isinstance(values.get(name), Mapping):
            continue
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        known, kind = sorted({"default", *ROPE_INIT_FUNCTIONS}), values[name].get("rope_type", "default")
        if kind not in known:
            raise RecipeError(f"{where}.{name}.rope_type: {kind!r} is not one of {', '.join(known)}")


def _check_config(config: Mapping[str, Any]) -> None:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    model_type = str(config.get("model_type"))
    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise RecipeError(f"model.config.model_type: {model_type!r} is not a causal language model of transformers")
    default = CONFIG_MAPPING[model_type]()
    for key in config:
        if key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"):
            raise RecipeError(f"model.config.{key}: comes from the tokenizer, leave it out")
        if key != "rope_theta" and not hasattr(default, key):
            close = difflib.get_close_matches(key, default.to_dict(), 1)
            hint = f", did you mean {close[0]}?" if close else ""
            raise RecipeError(f"model.config.{key}: {model_type} has no such setting{hint}")
    _check_rope("model.config", config)
    try:
        built = CONFIG_MAPPING[model_type](**{key: value for key, value in config.items() if key != "model_type"})
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise RecipeError(f"model.config: {in_one_line(error)}") from None
    heads, shared = getattr(built, "num_attention_heads", None), getattr(built, "num_key_value_heads", None)
    if isinstance(heads, int) and isinstance(shared, int) and (shared < 1 or heads % shared):
        raise RecipeError(f"model.config.num_key_value_heads: {shared} must divide num_attention_heads ({heads})")


def _check_data(data: DataSpec, is_there: bool) -> None:
    if not data.train:
        raise RecipeError("data.train: give at least one domain, such as books: jsonl:books.jsonl")
    for split in SPLITS:
        for name, domain in getattr(data, split).items():
            where = f"data.{split}.{name}"
            if not re.fullmatch(r"[\w-]+", name):
                raise RecipeError(f"{where}: a domain's name has letters, digits, - and _ only")
            if not domain.sources:
                raise RecipeError(f"{where}: no sources")
            for source in domain.sources:
                try:
                    kind, wanted = split_source(source)
                    if is_there:
                        source_files(source)
                except UserError as error:
                    raise RecipeError(f"{where}: {error}") from None
                if kind == "library" and wanted != split:
                    raise RecipeError(f"{where}: {source} belongs to another split, write library:{split}")


def _check_ttt(recipe: Recipe) -> InPlaceTTTConfig | None:
    shape, update, trainable = recipe.model.config, recipe.ttt_relative_update, recipe.trainable
    if recipe.ttt is None:
        if recipe.ttt_lr_warmup_steps:
            raise RecipeError("ttt_lr_warmup_steps: there is no ttt whose lr could warm up")
        if update is not None:
            raise RecipeError("ttt_relative_update: there is no ttt whose lr could be chosen")
        if trainable != "all":
            raise RecipeError(f"trainable: {trainable} needs ttt, there is no adapter without it")
        if recipe.align_documents:
            raise RecipeError(_ALIGNED)
        for name, given in (("optimizer.ttt_lr", recipe.optimizer.ttt_lr is not None), ("teach", recipe.teach > 0)):
            if given:
                raise RecipeError(f"{name}: there is no ttt whose target could learn")
        if recipe.teach_alone:
            raise RecipeError(_ALONE)
        return None
    if update is not None and not 0 < update < 1:
        raise RecipeError(f"ttt_relative_update: {update} must lie between 0 and 1, try 0.003")
    if update is not None and "lr" in recipe.ttt:
        raise RecipeError("ttt_relative_update: chooses the inner learning rate, leave ttt.lr out")
    if trainable != "all" and recipe.model.base is None:
        raise RecipeError(f"trainable: {trainable} freezes the base, which must not be random: give model.base")
    try:
        config = recipe.ttt_config()
        assert config is not None
        if shape is not None:
            config.layer_indices(shape.get("num_hidden_layers", 1 << 20))
    except RecipeError:
        raise
    except UserError as error:
        raise RecipeError(f"ttt: {error}") from None
    _check_learning(recipe, config)
    if config.objective == "loss":
        _check_loss(recipe, config)
    if recipe.sequence_length <= config.chunk_size:
        raise RecipeError(
            f"sequence_length: {recipe.sequence_length} tokens never see an update with ttt.chunk_size "
            f"{config.chunk_size}: make the sequence longer or the chunk smaller"
        )
    if recipe.align_documents and recipe.sequence_length % config.chunk_size:
        raise RecipeError(_ALIGNED)
    return config


_ALONE = "teach_alone: the target would learn from nothing: give teach (1.0, say)"
_ALIGNED = "align_documents: needs ttt, and a sequence_length that is a multiple of ttt.chunk_size"


def _check_target(recipe: Recipe, config: InPlaceTTTConfig) -> None:
    """Check the target and what needs one that learns. Late, because it imports torch."""
    owns_parameters, starts_at_zero = True, False
    if config.objective in OBJECTIVES:
        from inplace_ttt.core import make_target

        try:
            target: Any = make_target(config.objective, 1, config.objective_options, config.settings)
        except UserError as error:
            raise RecipeError(f"ttt: {error}") from None
        owns_parameters = any(True for _ in target.parameters())
        starts_at_zero = hasattr(target, "proj") and not target.proj.weight.any()
        if config.init_std is not None and config.objective_options.get("start") == "next_token":
            raise RecipeError("ttt.init_std: with start: next_token P begins at zero, leave it out")
    for name, given in (("optimizer.ttt_lr", recipe.optimizer.ttt_lr is not None), ("teach", recipe.teach > 0)):
        if given and not owns_parameters:
            raise RecipeError(f"{name}: objective {config.objective!r} has no parameters that could learn")
    base = recipe.model.base
    is_fresh = base is None or (Path(base).is_dir() and not (Path(base) / "inplace_ttt.json").exists())
    if recipe.ttt_relative_update is not None and starts_at_zero and is_fresh:
        raise RecipeError(
            "ttt_relative_update: this target begins with P at zero, and so with updates of size zero: "
            "set ttt.lr instead, or ttt.update_size"
        )


def _check_learning(recipe: Recipe, config: InPlaceTTTConfig) -> None:
    """Refuse settings of what the target learns that would do nothing, or that a run could not follow."""
    if recipe.optimizer.ttt_lr is not None and recipe.trainable == "adapter":
        raise RecipeError("optimizer.ttt_lr: with trainable: adapter nothing else is trained, set optimizer.lr instead")
    if recipe.teach_alone and not recipe.teach:
        raise RecipeError(_ALONE)
    if recipe.teach_alone and config.objective_options.get("gates"):
        raise RecipeError("teach_alone: teaching turns values and does not size them, so gates would learn nothing")
    if recipe.teach and recipe.compile:
        raise RecipeError("teach: not supported together with compile, leave one of them out")
    if recipe.teach and recipe.parallel is not None:
        for kind in ("context", "tensor"):
            if getattr(recipe.parallel, kind) > 1:
                raise RecipeError(f"teach: not supported together with parallel.{kind}, leave one of them out")
    for name, given in (
        ("ttt_lr_warmup_steps", recipe.ttt_lr_warmup_steps > 0),
        ("ttt_relative_update", recipe.ttt_relative_update is not None),
    ):
        if given and "lr" in config.rule_options:
            raise RecipeError(f"{name}: ttt.rule_options.lr fixes the inner learning rate, write ttt.lr instead")
        if given and config.update_size == "auto":
            raise RecipeError(f'{name}: ttt.update_size "auto" finds the same sizes whatever ttt.lr is: give a number')
    if recipe.ttt_relative_update is not None and config.update_size is not None:
        raise RecipeError(
            "ttt_relative_update: ttt.update_size sets the size of an update already, leave one of them out"
        )


def _check_loss(recipe: Recipe, config: InPlaceTTTConfig) -> None:
    """Refuse what a model that reads with the loss as objective cannot be trained with."""
    if not config.first_order:
        raise RecipeError(
            "ttt.objective: the loss needs no training; to train a model for reading with it, its updates taken as "
            "constants, set ttt.first_order: true"
        )
    if recipe.trainable == "adapter":
        raise RecipeError("trainable: the loss as objective has no parameters of its own, an adapter would be empty")
    for name, given in (
        ("activation_checkpointing", recipe.activation_checkpointing),
        ("compile", recipe.compile),
        ("liger", recipe.liger),  # its backward overwrites what the second walk through a graph needs
        ("parallel", recipe.parallel is not None),
        ("ttt_relative_update", recipe.ttt_relative_update is not None),
    ):
        if given:
            raise RecipeError(f"{name}: not supported with ttt.objective: loss, leave it out")


def _check_parallel(recipe: Recipe, spec: ParallelSpec, config: InPlaceTTTConfig | None) -> None:
    for name in ("compile", "liger"):
        if getattr(recipe, name):
            raise RecipeError(f"{name}: not supported together with parallel, leave it out")
    if recipe.batch_size % (groups := spec.data * spec.shard):
        raise RecipeError(
            f"batch_size: {recipe.batch_size} rows cannot be dealt to {groups} processes (parallel.data x "
            f"parallel.shard): use a multiple of {groups}"
        )
    if spec.tensor > 1:
        if spec.processes != spec.tensor:
            raise RecipeError("parallel.tensor: not supported together with data, shard or context")
        if recipe.model.base is None:
            raise RecipeError("parallel.tensor: only for model.base (transformers splits a model while it loads it)")
        if recipe.precision == "bf16":
            raise RecipeError("parallel.tensor: needs precision: fp32 (it has no mixed precision)")
        if recipe.trainable != "all" or recipe.ttt_relative_update is not None:
            excluded = "no trainable, no ttt_relative_update"
            raise RecipeError(f"parallel.tensor: trains all weights with a given ttt.lr: {excluded}")
        if config is not None and config.clip is not None:
            raise RecipeError("parallel.tensor: ttt.clip needs the norm of whole updates, leave it out (decay works)")
    if spec.context > 1:
        slices = spec.context * (2 if spec.slices == "head_tail" else 1)
        multiple = slices * (1 if config is None else config.chunk_size)
        if recipe.sequence_length % multiple:
            raise RecipeError(
                f"sequence_length: {recipe.sequence_length} cannot be cut into {slices} slices that end on chunk "
                f"boundaries: use a multiple of {multiple} (slices x ttt.chunk_size)"
            )
        if config is not None and not recipe.align_documents:
            reason = "so that no document's chunk lies on two processes"
            raise RecipeError(f"align_documents: must be true with parallel.context, {reason}")
        if recipe.attn_implementation != "auto":
            raise RecipeError("attn_implementation: parallel.context chooses it, leave it out (auto)")
        has_window = bool((recipe.model.config or {}).get("sliding_window"))
        if spec.attention == "torch" and (spec.slices != "head_tail" or has_window or recipe.align_documents):
            unknown = "neither windows nor packed documents nor contiguous slices"
            raise RecipeError(f'parallel.attention: "torch" knows {unknown}: use "gather"')


# -- a run that is there already ---------------------------------------------------------------------------------------

COMPLETE = "complete"
"""Name of the empty file in a checkpoint that is whole."""
_FREE_ON_RESUME = {
    "activation_checkpointing", "name", "output", "peak_tflops", "log_every", "eval_every", "save_every", "evaluation",
    "parallel",
}  # fmt: skip
"""Settings that may differ between a run and its continuation."""


def start_from(recipe: Recipe, resume: bool) -> str | None:
    """Return the checkpoint to resume, None for a fresh start. Raises UserError rather than overwrite or mix runs."""
    output = Path(recipe.output)
    checkpoints = output / "checkpoints"
    last = last_complete(checkpoints)
    if not resume:
        if last is not None or (output / "run.json").exists():
            raise UserError(f"{output} holds a run already: add --resume, or choose another output=...")
        return None
    if last is None and not (output / "recipe.json").exists():
        raise UserError(f"nothing to resume: there is no checkpoint in {checkpoints} (save_every sets how often)")
    if not (output / "recipe.json").exists():
        raise UserError(
            f"cannot resume: {output / 'recipe.json'}, the recipe that the checkpoints were made with, is missing: put "
            "it back, or choose another output=..."
        )
    before = json.loads((output / "recipe.json").read_text(encoding="utf-8"))
    now = json.loads(json.dumps(recipe.raw, default=str))
    changed = {name for name in before | now if before.get(name) != now.get(name)} - _FREE_ON_RESUME
    if changed:
        raise UserError(f"cannot resume: {', '.join(sorted(changed))} changed since the run in {output}")
    if last is not None and (Path(last) / "sharded").exists() != (recipe.parallel is not None):
        fix = "leave parallel out" if recipe.parallel is not None else "set parallel={} for one process"
        kind = "without" if recipe.parallel is not None else "with"
        raise UserError(f"cannot resume: the checkpoints in {checkpoints} were written {kind} parallel: {fix}")
    return last


def last_complete(checkpoints: Path) -> str | None:
    """Return the newest checkpoint that is whole: one that a killed process left half-written has no mark."""
    marked = [path.parent for path in checkpoints.glob(f"checkpoint-*/{COMPLETE}")]
    return str(max(marked, key=lambda path: int(path.name.rpartition("-")[2]))) if marked else None
