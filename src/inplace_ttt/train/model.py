"""The model of a recipe: built or loaded, given fast weights, saved."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from inplace_ttt import is_attached
from inplace_ttt.errors import UserError
from inplace_ttt.train.recipe import Recipe


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, attention: str) -> PreTrainedModel:
    """The recipe's model with float32 weights, fast weights attached when the recipe has ``ttt``.

    ``attention`` is transformers' name of an attention implementation. The slow weights of two recipes that differ in
    ``ttt`` alone start out equal. Raises UserError for a base model that cannot be loaded or settings it refuses.
    """
    torch.manual_seed(recipe.seed)
    if recipe.model.base is not None:
        model = _load_base(recipe.model.base, attention, 1 if recipe.parallel is None else recipe.parallel.tensor)
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
    if config is not None:
        from inplace_ttt import attach

        attach(model, config)
    return model


def _load_base(base: str, attention: str, tensor: int) -> PreTrainedModel:
    settings: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": attention}
    if tensor > 1:
        from transformers.distributed.configuration_utils import DistributedConfig

        settings["distributed_config"] = DistributedConfig(tp_size=tensor, tp_plan="auto")
    try:
        model = AutoModelForCausalLM.from_pretrained(base, **settings)
    except (OSError, ValueError) as error:
        raise UserError(f"model.base: cannot load {base}: {str(error).splitlines()[0]}") from None
    assert isinstance(model, PreTrainedModel)
    return model


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
        raise UserError(f"model.config: {model_type} cannot be built: {' '.join(str(error).split())[:300]}") from None
    assert isinstance(model, PreTrainedModel)
    return model


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path, dtype: torch.dtype | None
) -> None:
    """Writes model and tokenizer, weights as ``dtype`` (None: as they are; converts the model in place)."""
    if dtype is not None:
        nn.Module.to(model, dtype)
    if is_attached(model):
        from inplace_ttt import save_pretrained

        save_pretrained(model, directory, tokenizer=tokenizer)
    else:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


def load_saved(directory: Path, attached: bool) -> PreTrainedModel:
    """What `save_model` wrote, with float32 weights, on the CPU."""
    if attached:
        from inplace_ttt import from_pretrained

        model: Any = from_pretrained(directory)
    else:
        model = AutoModelForCausalLM.from_pretrained(directory)
    return model.float().eval()  # type: ignore[no-any-return]


def count_parameters(model: nn.Module) -> int:
    """Trainable numbers, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
