"""The checks of a recipe that go beyond types: ranges, missing files, settings that exclude each other."""

import difflib
import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from inplace_ttt.errors import UserError, in_one_line
from inplace_ttt.train.document import SPLITS
from inplace_ttt.train.schema import RecipeError
from inplace_ttt.train.sources import INSTALLED, check_source, split_source
from inplace_ttt.train.specs import ParallelSpec, Recipe


def check(recipe: Recipe, data: bool = True) -> None:
    """Raises RecipeError for the first thing that cannot work. Reads no data; without ``data`` none need be there."""
    _check_numbers(recipe)
    _check_model(recipe)
    _check_data(recipe, data)
    _check_ttt(recipe)
    _check_alignment(recipe)
    _check_parallel(recipe)


def _check_alignment(recipe: Recipe) -> None:
    if recipe.cut_multiple is not None and not 1 <= recipe.cut_multiple <= recipe.sequence_length:
        raise RecipeError(
            f"cut_multiple: {recipe.cut_multiple} must lie between 1 and sequence_length ({recipe.sequence_length})"
        )
    if recipe.align_documents and (recipe.ttt is None or recipe.sequence_length % recipe.alignment):
        raise RecipeError("align_documents: needs ttt, and a sequence_length that is a multiple of ttt.chunk_size")


def _check_numbers(recipe: Recipe) -> None:
    optimizer, evaluation = recipe.optimizer, recipe.evaluation
    at_least: dict[int, dict[str, float]] = {
        1: {
            "sequence_length - 1": recipe.sequence_length - 1,
            "steps": recipe.steps,
            "batch_size": recipe.batch_size,
            "gradient_accumulation": recipe.gradient_accumulation,
            "log_every": recipe.log_every,
            "evaluation.rows": evaluation.rows,
            "evaluation.windows": evaluation.windows,
            "evaluation.piece": evaluation.piece,
            "evaluation.batch_size": evaluation.batch_size,
        },
        0: {
            "eval_every": recipe.eval_every,
            "save_every": recipe.save_every,
            "ttt_lr_warmup_steps": recipe.ttt_lr_warmup_steps,
            "optimizer.warmup_steps": optimizer.warmup_steps,
            "optimizer.weight_decay": optimizer.weight_decay,
            "optimizer.max_grad_norm": optimizer.max_grad_norm,
            "optimizer.min_lr_ratio": optimizer.min_lr_ratio,
            "seed": recipe.seed,
        },
    }
    for smallest, settings in at_least.items():
        for name, value in settings.items():
            if not value >= smallest:
                raise RecipeError(f"{name}: {value} is too small, it must be at least {smallest}")
    if recipe.peak_tflops is not None and not recipe.peak_tflops > 0:
        raise RecipeError(f"peak_tflops: {recipe.peak_tflops} must be above 0 (989: an H100 in bf16)")
    if not 0 < optimizer.lr < 1:
        raise RecipeError(f"optimizer.lr: {optimizer.lr} must lie between 0 and 1")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(optimizer, name) < 1:
            raise RecipeError(f"optimizer.{name}: {getattr(optimizer, name)} must be at least 0 and below 1")
    if optimizer.min_lr_ratio > 1:
        raise RecipeError(f"optimizer.min_lr_ratio: {optimizer.min_lr_ratio} must be at most 1, it is a share of lr")
    if optimizer.min_lr_ratio and optimizer.schedule != "cosine":
        raise RecipeError("optimizer.min_lr_ratio: only the cosine schedule has one")
    if optimizer.warmup_steps >= recipe.steps:
        raise RecipeError(f"optimizer.warmup_steps: {optimizer.warmup_steps} must be below steps ({recipe.steps})")
    if recipe.ttt_lr_warmup_steps >= recipe.steps:
        raise RecipeError(f"ttt_lr_warmup_steps: {recipe.ttt_lr_warmup_steps} must be below steps ({recipe.steps})")
    if recipe.evaluation_length < 2:
        raise RecipeError("evaluation.length: must be at least 2")
    if list(evaluation.edges) != sorted(set(evaluation.edges)):
        raise RecipeError(f"evaluation.edges: must rise, got {list(evaluation.edges)}")


def _check_model(recipe: Recipe) -> None:
    model, tokenizer = recipe.model, recipe.tokenizer
    if (model.base is None) == (model.config is None):
        raise RecipeError("model: give either base (a directory or hub id) or config (model_type and its settings)")
    if tokenizer.path is not None and tokenizer.train is not None:
        raise RecipeError("tokenizer: give either path or train, not both")
    if model.base is None and tokenizer.path is None and tokenizer.train is None:
        raise RecipeError("tokenizer: missing, a model trained from scratch needs path or train")
    if model.base is not None and tokenizer.train is not None:
        raise RecipeError("tokenizer.train: a base model keeps its own tokenizer, leave this out")
    _check_place("model.base", model.base, ("config.json", "inplace_ttt.json"), "model")
    path = tokenizer.path or model.base
    _check_place("tokenizer.path" if tokenizer.path else "tokenizer", path, ("*token*", "vocab*"), "tokenizer")
    if model.settings and model.base is None:
        raise RecipeError("model.settings: only a base has settings to replace, write them in model.config")
    _check_rope("model.settings", model.settings)
    for name in recipe.report_to:
        if name not in ("tensorboard", "wandb"):
            raise RecipeError(f"report_to: {name!r} is none of tensorboard, wandb")
        if importlib.util.find_spec(name) is None:
            raise RecipeError(f"report_to: {name} is not installed: pip install {name}")
    if model.config is not None:
        _check_config(model.config)


def _check_place(name: str, place: str | None, files: Sequence[str], what: str) -> None:
    """A directory must be there and hold one of ``files``; other names are the hub's, OWNER/NAME at most."""
    if place is None:
        return
    folder = Path(place)
    if (re.match(r"[./~]", place) or place.count("/") > 1) and not folder.is_dir():
        raise RecipeError(f"{name}: there is no directory {place}")
    if folder.is_dir() and not any(next(folder.glob(file), None) for file in files):
        raise RecipeError(f"{name}: there is no {what} in {place}, give a directory that holds one")


def _check_rope(where: str, values: Mapping[str, Any]) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for name in ("rope_parameters", "rope_scaling"):
        kind = values[name].get("rope_type", "default") if isinstance(values.get(name), Mapping) else "default"
        if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
            known = ", ".join(sorted({"default", *ROPE_INIT_FUNCTIONS}))
            raise RecipeError(f"{where}.{name}.rope_type: {kind!r} is none of {known}")


def _check_config(config: Mapping[str, Any]) -> None:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    model_type = str(config.get("model_type"))
    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise RecipeError(f"model.config.model_type: {model_type!r} is no causal language model of transformers")
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


def _check_data(recipe: Recipe, there: bool) -> None:
    data = recipe.data
    if not data.train:
        raise RecipeError("data.train: give at least one domain, such as books: jsonl:books.jsonl")
    for name, folder in (("output", recipe.output), ("data.cache", data.cache)):
        if Path(folder).is_file():
            raise RecipeError(f"{name}: {folder} is a file, name a directory")
    if recipe.eval_every and not data.validation:
        raise RecipeError("eval_every: needs data.validation (or set it to 0)")
    for split in SPLITS:
        for domain, spec in data.split(split).items():
            where = f"data.{split}.{domain}"
            if not re.fullmatch(r"[\w-]+", domain):
                raise RecipeError(f"{where}: a domain's name has letters, digits, - and _ only")
            if not spec.sources:
                raise RecipeError(f"{where}: no sources")
            if spec.max_bytes is not None and spec.max_bytes < 1:
                raise RecipeError(f"{where}.max_bytes: {spec.max_bytes} is too small, it must be at least 1")
            for source in spec.sources:
                try:
                    kind, wanted = split_source(source)
                    if there:
                        check_source(source)
                except UserError as error:
                    raise RecipeError(f"{where}: {error}") from None
                if kind in INSTALLED and wanted != split:
                    raise RecipeError(f"{where}: {source} belongs to another split, write {kind}:{split}")


def _check_ttt(recipe: Recipe) -> None:
    if recipe.ttt is None:
        if recipe.ttt_lr_warmup_steps:
            raise RecipeError("ttt_lr_warmup_steps: there is no ttt whose lr could warm up")
        if recipe.ttt_relative_update is not None:
            raise RecipeError("ttt_relative_update: there is no ttt whose lr could be chosen")
        if recipe.trainable != "all":
            raise RecipeError(f"trainable: {recipe.trainable} needs ttt, there is no adapter without it")
        return
    if recipe.ttt_relative_update is not None:
        if not 0 < recipe.ttt_relative_update < 1:
            raise RecipeError(f"ttt_relative_update: {recipe.ttt_relative_update} must lie between 0 and 1, try 0.003")
        if "lr" in recipe.ttt:
            raise RecipeError("ttt_relative_update: chooses the inner learning rate, leave ttt.lr out")
    if recipe.trainable != "all" and recipe.model.base is None:
        raise RecipeError(f"trainable: {recipe.trainable} freezes the base, which must not be random: give model.base")
    try:
        config = recipe.ttt_config()
        if config is not None and recipe.model.config is not None:
            config.layer_indices(recipe.model.config.get("num_hidden_layers", 1 << 20))
    except RecipeError:
        raise
    except UserError as error:
        raise RecipeError(f"ttt: {error}") from None
    assert config is not None
    if recipe.model.config is not None and (config.layers_path is None or config.projection_path is None):
        from inplace_ttt.hf.families import FAMILIES

        model_type = recipe.model.config["model_type"]
        if model_type not in FAMILIES:
            raise RecipeError(
                f"ttt: {model_type} is not in the table of families: say where its projections are with "
                "ttt.layers_path and ttt.projection_path"
            )
    if recipe.sequence_length <= config.chunk_size:
        raise RecipeError(
            f"sequence_length: {recipe.sequence_length} tokens never see an update with ttt.chunk_size "
            f"{config.chunk_size}: make the sequence longer or the chunk smaller"
        )


def _check_parallel(recipe: Recipe) -> None:
    """Raises RecipeError for combinations that cannot work. Reads no data, starts no process."""
    spec = recipe.parallel
    if spec is None:
        return
    for name in ("data", "shard", "context", "tensor"):
        if getattr(spec, name) < 1:
            raise RecipeError(f"parallel.{name}: must be at least 1, got {getattr(spec, name)}")
    if recipe.compile:
        raise RecipeError("compile: not supported together with parallel, leave it out")
    readers = spec.data * spec.shard
    if recipe.batch_size % readers:
        raise RecipeError(
            f"batch_size: {recipe.batch_size} rows cannot be dealt to {readers} processes (parallel.data x "
            f"parallel.shard): use a multiple of {readers}"
        )
    if spec.tensor > 1:
        _check_tensor(recipe, spec)
    if spec.context > 1:
        _check_context(recipe, spec)


def _check_tensor(recipe: Recipe, spec: ParallelSpec) -> None:
    if spec.processes != spec.tensor:
        raise RecipeError("parallel.tensor: not supported together with data, shard or context")
    if recipe.model.base is None:
        raise RecipeError("parallel.tensor: only for model.base (transformers splits a model while it loads it)")
    if recipe.precision == "bf16":
        raise RecipeError("parallel.tensor: needs precision: fp32 (it has no mixed precision)")
    if recipe.trainable != "all" or recipe.ttt_relative_update is not None:
        raise RecipeError(
            "parallel.tensor: trains all weights with a given ttt.lr: no trainable, no ttt_relative_update"
        )
    config = recipe.ttt_config()
    if config is not None and config.clip is not None:
        raise RecipeError("parallel.tensor: ttt.clip needs the norm of whole updates, leave it out (decay works)")


def _check_context(recipe: Recipe, spec: ParallelSpec) -> None:
    config = recipe.ttt_config()
    pieces = spec.context * (2 if spec.slices == "head_tail" else 1)
    multiple = pieces * (1 if config is None else config.chunk_size)
    if recipe.sequence_length % multiple:
        raise RecipeError(
            f"sequence_length: {recipe.sequence_length} cannot be cut into {pieces} slices that end on chunk "
            f"boundaries: use a multiple of {multiple} (slices x ttt.chunk_size)"
        )
    if config is not None and not recipe.align_documents:
        raise RecipeError(
            "align_documents: must be true with parallel.context, so that no document's chunk lies on two processes"
        )
    if recipe.attn_implementation != "auto":
        raise RecipeError("attn_implementation: parallel.context chooses it, leave it out (auto)")
    window = (recipe.model.config or {}).get("sliding_window")
    if spec.attention == "torch" and (spec.slices != "head_tail" or window or recipe.align_documents):
        raise RecipeError(
            'parallel.attention: "torch" knows neither windows nor packed documents nor contiguous slices: use "gather"'
        )
