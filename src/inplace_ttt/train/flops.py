"""Arithmetic of training by formula, and what devices can do at most: together, the share that a run reaches (MFU).

Symbols as in `inplace_ttt.train.plan`.
"""

import math
from typing import Any

import torch
from transformers import PreTrainedModel

from inplace_ttt.hf.attach import inspect, is_attached
from inplace_ttt.train.model import count_parameters
from inplace_ttt.train.specs import Recipe

PEAK_TFLOPS: dict[str, tuple[float, float]] = {
    "B200": (2250, 1125), "H200": (989, 494), "H100 PCIe": (756, 378), "H100 NVL": (835, 417), "H100": (989, 494),
    "A100": (312, 156), "A800": (312, 156), "H800": (989, 494), "L40S": (362, 183), "L4": (121, 60), "A10G": (70, 35),
    "RTX 4090": (165, 83), "RTX 3090": (71, 36),
}  # fmt: skip
"""By a part of the device's name: dense matrix products in bf16 and in TF32 with float32 sums, from the data sheets."""


def flops_per_token(recipe: Recipe, model: PreTrainedModel, *, recomputed: bool) -> float:
    """Of forward and backward, attention and the scan included; of mixtures of experts, all experts count.

    ``recomputed`` counts what activation checkpointing computes again: it does, and MFU by convention does not.
    """
    return products_per_token(recipe, model, recomputed=recomputed) + attention_per_token(
        recipe, model, recomputed=recomputed
    )


def attention_per_token(recipe: Recipe, model: PreTrainedModel, *, recomputed: bool) -> float:
    """The part of ``flops_per_token`` that is attention's."""
    passes = 4 if recomputed and recipe.activation_checkpointing else 3
    return passes * _attention_products(model.config.get_text_config(), recipe.sequence_length)


def products_per_token(recipe: Recipe, model: PreTrainedModel, *, recomputed: bool) -> float:
    """The part of ``flops_per_token`` that is not attention's."""
    config = model.config.get_text_config()
    embeddings: Any = model.get_input_embeddings()
    products = count_parameters(model) - (0 if config.tie_word_embeddings else embeddings.weight.numel())
    scan = 2 * sum(math.prod(layer.shape) for layer in inspect(model)) if is_attached(model) else 0
    flops: float = (4 if recipe.trainable != "all" else 6) * products  # no gradients of frozen weights
    flops += scan * (1 + 3)  # one more product forward, three more backward
    if recomputed and recipe.activation_checkpointing:
        flops += 2 * products + scan
    return flops


def _attention_products(config: Any, tokens: int) -> float:
    """FLOPs of a token's scores and weighted values, forward, all layers: 2 products of 2 H d for each token seen."""
    layers, heads = getattr(config, "num_hidden_layers", 0), getattr(config, "num_attention_heads", 0)
    if not isinstance(heads, int) or heads == 0:
        return 0.0
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    window = getattr(config, "sliding_window", None)
    seen = tokens / 2 if not window or window >= tokens else window
    return float(layers * 2 * 2 * seen * heads * width)


def peak_flops(recipe: Recipe) -> float | None:
    """FLOP/s of one device at most: the recipe's ``peak_tflops``, else a known GPU's; None where neither is there."""
    if recipe.peak_tflops is not None:
        return recipe.peak_tflops * 1e12
    if not torch.cuda.is_available():
        return None
    return known_peak(torch.cuda.get_device_name(), recipe.precision)


def known_peak(name: str, precision: str) -> float | None:
    """FLOP/s of a GPU by its name, such as "NVIDIA H100 80GB HBM3"; None for an unknown one."""
    parts = name.replace("-", " ").split()
    for known, (bf16, tf32) in PEAK_TFLOPS.items():
        words = known.split()
        if any(parts[i : i + len(words)] == words for i in range(len(parts))):
            return (bf16 if precision == "bf16" else tf32) * 1e12
    return None
