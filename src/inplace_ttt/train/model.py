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
from inplace_ttt.hf.attach import configure, install, is_attached
from inplace_ttt.hf.checkpoint import from_pretrained, has_fast_weights, save_pretrained
from inplace_ttt.hf.names import base_of
from inplace_ttt.train.specs import Recipe


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, attention: str) -> PreTrainedModel:
    """The recipe's model with float32 weights, fast weights attached when the recipe has ``ttt``.

    ``attention`` is transformers' name of an attention implementation. The slow weights of two recipes that differ in
    ``ttt`` alone start out equal. Raises UserError for a base model that cannot be loaded or settings it refuses.
    """
    torch.manual_seed(recipe.seed)
    if recipe.model.base is not None:
        model = _load_base(recipe, attention)
        embeddings: Any = model.get_input_embeddings()
        known = embeddings.weight.shape[0]
        if len(tokenizer) > known:
            raise UserError(
                f"the tokenizer has {len(tokenizer)} tokens, {recipe.model.base} only {known}: "
                "use the base model's own tokenizer"
            )
    else:
        model = _from_scratch(recipe, tokenizer, attention)
    model.config.use_cache = True
    config = recipe.ttt_config()
    if config is not None and not is_attached(model):
        install(model, config)
    elif config is not None:
        _continue_with(model, config, recipe.ttt or {})
    elif is_attached(model):
        raise UserError(f"model.base: {recipe.model.base} has fast weights: repeat its settings under ttt")
    _freeze(model, recipe.trainable)
    return model


def prepare_trainable(model: PreTrainedModel, recipe: Recipe) -> None:
    """Fast weights on a model that has none yet, and what the recipe freezes."""
    config = recipe.ttt_config()
    if config is not None:
        install(model, config)
    _freeze(model, recipe.trainable)


def _continue_with(model: PreTrainedModel, config: InPlaceTTTConfig, given: Mapping[str, Any]) -> None:
    """Goes on with a base's own fast weights; only how it reads may differ, where the recipe says so."""
    from inplace_ttt.hf.attach import READING, runtime_of

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


def _freeze(model: PreTrainedModel, trainable: str) -> None:
    if trainable == "all":
        return
    from inplace_ttt.hf.attach import runtime_of
    from inplace_ttt.hf.checkpoint import is_added

    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_added(name))
    if trainable == "adapter_and_projections":
        for site in runtime_of(model).sites:
            site.projection().requires_grad_(True)


def _load_base(recipe: Recipe, attention: str) -> PreTrainedModel:
    base = recipe.model.base
    assert base is not None
    keywords = {"dtype": torch.float32, "attn_implementation": attention, **recipe.model.settings}
    attached = has_fast_weights(Path(base))
    tensor = 1 if recipe.parallel is None else recipe.parallel.tensor
    if tensor > 1:
        if attached:
            raise UserError(f"parallel.tensor: {base} has fast weights, which cannot be split while it is loaded")
        _check_heads(base, tensor)
        from transformers.distributed.configuration_utils import DistributedConfig

        keywords["distributed_config"] = DistributedConfig(tp_size=tensor, tp_plan="auto")
    try:
        if attached:
            model: Any = from_pretrained(base, **keywords)
        else:
            model = AutoModelForCausalLM.from_pretrained(base, **keywords)
    except UserError:
        raise
    except (OSError, ValueError, TypeError, StrictDataclassError, SafetensorError) as error:
        raise UserError(f"model.base: cannot load {base}: {in_one_line(error)}") from None
    except KeyError as error:  # of settings that are not complete
        raise UserError(f"model.base: cannot load {base}: its settings lack {error}") from None
    assert isinstance(model, PreTrainedModel)
    return model


def _check_heads(base: str, tensor: int) -> None:
    try:
        config = AutoConfig.from_pretrained(base).get_text_config()
    except (OSError, ValueError) as error:
        raise UserError(f"model.base: cannot load {base}: {in_one_line(error)}") from None
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if isinstance(heads, int) and heads % tensor:
            raise UserError(f"parallel.tensor: {tensor} does not divide {name} of {base} ({heads}): take one that does")


def _from_scratch(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, attention: str) -> PreTrainedModel:
    values: dict[str, Any] = dict(recipe.model.config or {})
    model_type = values.pop("model_type")
    values.setdefault("max_position_embeddings", max(recipe.sequence_length, recipe.evaluation_length))
    try:
        config = AutoConfig.for_model(
            model_type,
            **values,
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        make: Any = AutoModelForCausalLM.from_config
        model = make(config, attn_implementation=attention, dtype=torch.float32)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"model.config: {model_type} cannot be built: {in_one_line(error)}") from None
    assert isinstance(model, PreTrainedModel)
    return model


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    dtype: torch.dtype | None,
    recipe: Recipe,
) -> None:
    """Writes what was trained and the tokenizer, weights as ``dtype`` (None: as they are; converts the model in place).

    Of a frozen base that is the adapter, which names the base; else the whole model.
    """
    if dtype is not None:
        nn.Module.to(model, dtype)
    if is_attached(model):
        frozen = recipe.trainable != "all" and bool(base_of(model).name)
        save_pretrained(model, directory, tokenizer, adapter_only=frozen, projections=frozen and _has_own(recipe))
    else:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


def _has_own(recipe: Recipe) -> bool:
    """Whether the adapting projections are not the base's: trained now, or by an adapter that the run began with."""
    settings = Path(str(recipe.model.base)) / "inplace_ttt.json"
    before = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    return recipe.trainable == "adapter_and_projections" or (
        before.get("kind") == "adapter" and not before["fingerprint"]
    )


def load_saved(directory: Path, attached: bool) -> PreTrainedModel:
    """What `save_model` wrote, with float32 weights, on the CPU."""
    if attached:
        model: Any = from_pretrained(directory)
    else:
        model = AutoModelForCausalLM.from_pretrained(directory)
    return model.float().eval()  # type: ignore[no-any-return]


def count_parameters(model: nn.Module, trainable: bool = False) -> int:
    """All numbers, or the trainable ones; tied ones once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)
