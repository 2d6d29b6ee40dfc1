"""The model of a recipe: built or loaded, given fast weights, saved."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from inplace_ttt.config import InPlaceTTTConfig
from inplace_ttt.errors import UserError, in_one_line
from inplace_ttt.hf.attach import READING, configure, install, is_attached, runtime_of
from inplace_ttt.hf.checkpoint import from_pretrained, has_fast_weights, is_added, save_pretrained
from inplace_ttt.hf.names import base_of
from inplace_ttt.train.specs import Recipe


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, attention: str) -> PreTrainedModel:
    """Build the recipe's model with float32 weights, fast weights attached when the recipe has ``ttt``.

    ``attention`` is transformers' name of an attention implementation. The slow weights of two recipes that differ in
    ``ttt`` alone start out equal. Raises UserError for a base model that cannot be loaded or settings it refuses.
    """
    torch.manual_seed(recipe.seed)
    base, config = recipe.model.base, recipe.ttt_config()
    if base is None:
        positions = max(recipe.sequence_length, recipe.evaluation_length)
        model = _from_scratch(
            {"max_position_embeddings": positions} | (recipe.model.config or {}), tokenizer, attention
        )
    else:
        tensor = 1 if recipe.parallel is None else recipe.parallel.tensor
        keywords = {"dtype": torch.float32, "attn_implementation": attention, **recipe.model.settings}
        model = _load_base(base, keywords, tensor)
        embeddings: Any = model.get_input_embeddings()
        if len(tokenizer) > (known := embeddings.weight.shape[0]):
            raise UserError(
                f"the tokenizer has {len(tokenizer)} tokens, {base} only {known}: use the base model's own tokenizer"
            )
    model.config.use_cache = True
    if config is None and is_attached(model):
        raise UserError(f"model.base: {base} has fast weights: repeat its settings under ttt")
    if config is not None and is_attached(model):
        _continue_with(model, config, recipe.ttt or {})
        config = None
    prepare_trainable(model, config, recipe.trainable)
    return model


def prepare_trainable(model: PreTrainedModel, config: InPlaceTTTConfig | None, trainable: str) -> None:
    """Attach fast weights to a model that has none yet (None: leave it), and freeze what is not ``trainable``."""
    if config is not None:
        install(model, config)
    if trainable == "all":
        return
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_added(name))
    if trainable == "adapter_and_projections":
        for site in runtime_of(model).sites:
            site.projection().requires_grad_(True)


def _continue_with(model: PreTrainedModel, config: InPlaceTTTConfig, given: Mapping[str, Any]) -> None:
    """Keep a base's own fast weights; only how it reads may differ, where the recipe says so."""
    have, count = runtime_of(model).config, model.config.get_text_config().num_hidden_layers
    for field in dataclasses.fields(config):
        if field.name in READING or field.name == "init_std":
            continue
        a, b = getattr(have, field.name), getattr(config, field.name)
        if field.name == "layers":
            a, b = have.layer_indices(count), config.layer_indices(count)
        if a != b:
            raise UserError(f"ttt.{field.name}: the base has {a}, the recipe {b}: they must agree")
    configure(model, **{name: getattr(config, name) for name in READING if name in given})


def _load_base(base: str, keywords: dict[str, Any], tensor: int) -> PreTrainedModel:
    """Load a base, plain or with fast weights; ``tensor``: processes that its matrices are split over."""
    loader: Any = from_pretrained if has_fast_weights(Path(base)) else AutoModelForCausalLM.from_pretrained
    try:
        if tensor > 1:
            if loader is from_pretrained:
                raise UserError(f"parallel.tensor: {base} has fast weights, which cannot be split while it is loaded")
            from transformers.distributed.configuration_utils import DistributedConfig

            config = AutoConfig.from_pretrained(base).get_text_config()
            for name in ("num_attention_heads", "num_key_value_heads"):
                heads = getattr(config, name, None)
                if isinstance(heads, int) and heads % tensor:
                    reason = f"does not divide {name} of {base} ({heads})"
                    raise UserError(f"parallel.tensor: {tensor} {reason}: take one that does")
            keywords = keywords | {"distributed_config": DistributedConfig(tp_size=tensor, tp_plan="auto")}
        model = loader(base, **keywords)
    except UserError:
        raise
    except (OSError, ValueError, TypeError, StrictDataclassError, SafetensorError) as error:
        raise UserError(f"model.base: cannot load {base}: {in_one_line(error)}") from None
    except KeyError as error:  # incomplete settings
        raise UserError(f"model.base: cannot load {base}: its settings lack {error}") from None
    assert isinstance(model, PreTrainedModel)
    return model


def _from_scratch(values: dict[str, Any], tokenizer: PreTrainedTokenizerBase, attention: str) -> PreTrainedModel:
    model_type, ids = values.pop("model_type"), ("bos_token_id", "eos_token_id")
    try:
        special = {name: getattr(tokenizer, name) for name in ids}
        config = AutoConfig.for_model(model_type, **values, vocab_size=len(tokenizer), **special)
        make: Any = AutoModelForCausalLM.from_config
        model = make(config, attn_implementation=attention, dtype=torch.float32)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"model.config: {model_type} cannot be built: {in_one_line(error)}") from None
    assert isinstance(model, PreTrainedModel)
    return model


def recompute_activations(model: PreTrainedModel) -> None:
    """Turn on activation checkpointing, under the name that this version of transformers gives it."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    enable = getattr(model, f"{name}_checkpointing_enable")
    enable(**{f"{name}_checkpointing_kwargs": {"use_reentrant": False}})


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path, trainable: str, base: str | None
) -> None:
    """Write a trained model as bfloat16, converting it in place, and the tokenizer.

    With a frozen ``base`` only the adapter, which names the base; else the whole model.
    """
    nn.Module.to(model, torch.bfloat16)
    if not is_attached(model):
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return
    is_adapter = trainable != "all" and bool(base_of(model).name)
    # Save the adapting projections if they differ from the base's: trained now, or in the adapter it started from.
    settings = Path(str(base)) / "inplace_ttt.json"
    before = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    has_own = before.get("kind") == "adapter" and not before["fingerprint"]
    projections = is_adapter and (has_own or trainable == "adapter_and_projections")
    save_pretrained(model, directory, tokenizer, adapter_only=is_adapter, projections=projections)
