"""The needs of a run before it starts: memory on one device, arithmetic and time, from formulas (docs/training.md).

Symbols: N parameters (n of them trained), B rows, T tokens a row, L layers, D hidden size, F intermediate size, V
vocabulary, H heads of width d, G of them for keys and values. Gradients and optimizer state are AdamW's in float32.
Several processes: sharded memory is divided by them, and what FSDP2 gathers temporarily is added.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from inplace_ttt.hf.attach import adapting_layers, is_attached
from inplace_ttt.hf.auto import base_config
from inplace_ttt.train.loss import reason_for_whole_logits, tokens_at_once
from inplace_ttt.train.model import prepare_trainable
from inplace_ttt.train.specs import ModelSpec, ParallelSpec, Recipe, TokenizerSpec
from inplace_ttt.train.tokenizer import load_tokenizer

PEAK_TFLOPS: dict[str, tuple[float, float]] = {
    "B200": (2250, 1125), "H200": (989, 494), "H100 PCIe": (756, 378), "H100 NVL": (835, 417), "H100": (989, 494),
    "A100": (312, 156), "A800": (312, 156), "H800": (989, 494), "L40S": (362, 183), "L4": (121, 60), "A10G": (70, 35),
    "RTX 4090": (165, 83), "RTX 3090": (71, 36),
}  # fmt: skip
"""By a part of the device's name: dense matrix products in bf16 and in TF32 with float32 sums, from the data sheets."""
PRODUCTS, ATTENTION, VARLEN, MEMORY = 0.7, 0.53, 0.28, 0.72
"""Shares of a data sheet's numbers that recorded runs reached: matrix products, PyTorch's attention of whole rows, its
attention for packed rows, and memory."""
LOGIT_BYTES = 30
"""Moved for each entry of the logits: cast to float32, normalised, and back."""
_QWEN3 = {"model_type": "qwen3", "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
SHAPES: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-4B-Base": _QWEN3 | {
        "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-14B-Base": _QWEN3 | {
        "hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 40, "num_attention_heads": 40,
        "tie_word_embeddings": False,
    },
    "meta-llama/Llama-3.1-8B": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    },
}  # fmt: skip
"""Bases of the shipped recipes, so that planning them needs no network."""


@dataclass(frozen=True)
class Plan:
    """Bytes on one device; FLOPs and moved bytes of a trained token on one process; tokens that a process reads."""

    parameters: int
    trained: int
    memory: dict[str, int]
    products: float
    attention: float
    moved: float
    tokens: int
    processes: int
    is_packed: bool
    """True when attention is the one for packed rows."""

    @property
    def total(self) -> int:
        return sum(self.memory.values())

    @property
    def flops_per_token(self) -> float:
        """FLOPs, those of recomputed activations included."""
        return self.products + self.attention

    def seconds_per_token(self, tflops: float, bandwidth: float) -> float:
        """Return the time of one process on a device of so many TFLOP/s and TB/s by its data sheet.

        The three parts are added, because eager training overlaps them little. Accurate to 20% for recorded runs; a
        small model that waits for its host takes longer.
        """
        peak, rate = tflops * 1e12, MEMORY * bandwidth * 1e12
        attention = self.attention / (peak * (VARLEN if self.is_packed else ATTENTION))
        return self.products / (peak * PRODUCTS) + attention + self.moved / rate

    def lines(self, tflops: float, bandwidth: float) -> list[str]:
        """Return lines for people; ``tflops`` and ``bandwidth`` (TB/s) of one device by its data sheet."""
        each = self.seconds_per_token(tflops, bandwidth)
        size, unit = (2**30, "GiB") if self.total >= 2**30 else (2**20, "MiB")
        parts = {**self.memory, "together": self.total}
        return [
            f"parameters {_count(self.parameters)}, trained {_count(self.trained)}",
            "memory of one device" + (f", one of {self.processes}:" if self.processes > 1 else ":"),
            *(f"  {name:<32}{value / size:10.2f} {unit}" for name, value in parts.items()),
            f"{self.flops_per_token / 1e9:.4g} GFLOP a token, {_count(self.tokens)} tokens a process",
            f"{self.tokens * each / 3600:,.2f} hours, {self.processes / each:,.0f} tokens a second, on devices of "
            f"{tflops:g} TFLOP/s and {bandwidth:g} TB/s",
        ]


def _count(number: int) -> str:
    if number < 1e6:
        return f"{number:,}"
    return f"{number / 1e9:.3f}B" if number >= 1e9 else f"{number / 1e6:.3f}M"


def plan(recipe: Recipe, *, logit_tokens: int | None = None) -> Plan:
    """Plan a recipe. Builds the model without weights; UserError when its shape cannot be known.

    ``logit_tokens``: number of tokens whose logits are in memory; None: as many as `inplace_ttt.train.loss` makes.
    """
    with torch.device("meta"):
        make: Any = AutoModelForCausalLM.from_config
        model = make(_shape(recipe.model, recipe.tokenizer), dtype=torch.float32)
    config, ttt, spec = model.config.get_text_config(), recipe.ttt_config(), recipe.parallel or ParallelSpec()
    prepare_trainable(model, ttt, recipe.trainable)
    N, n = model.num_parameters(), model.num_parameters(only_trainable=True)
    L, D, H, V = config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.vocab_size
    F = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * D
    G, d = getattr(config, "num_key_value_heads", None) or H, getattr(config, "head_dim", None) or D // H
    B, T = recipe.batch_size // (spec.data * spec.shard), recipe.sequence_length
    tokens, alone = B * (T // spec.context), spec.processes == 1
    sharers = spec.shard * spec.context * spec.tensor  # of weights, gradients and optimizer state
    half = 2 if recipe.precision == "bf16" else 4  # bytes of a number in products
    casts = half == 2 and alone  # FSDP2 has its own mixed precision, without autocast
    heads = (H + G) * d
    head_norms = any(name.endswith("q_norm") for name, _ in model.named_modules())
    checkpointing, trains_all = recipe.activation_checkpointing, recipe.trainable == "all"
    scored = logit_tokens or tokens
    if logit_tokens is None and spec.tensor == 1 and reason_for_whole_logits(model) is None:
        scored = min(scored, tokens_at_once(V))
    by_piece = logit_tokens is None and scored < tokens

    # Memory at the peak, the beginning of the backward. Of one layer and token are kept: two norms in float32, their
    # outputs (autocast casts them for each of five projections), queries, keys, values, the attention's output, and
    # the MLP's gate, up, activation, product; of targets, in the backward, the keys again.
    kept = 1 if checkpointing else L  # layers whose activations are in memory
    adapting = min(kept, 0 if ttt is None else len(ttt.layer_indices(L)))
    of_layer = 2 * 2 * 4 * D + half * ((5 if casts else 2) * D + 2 * heads + 4 * F)
    of_layer += (2 * 4 + half) * heads if head_norms else 0
    layers = tokens * (kept * of_layer + adapting * (D * (16 if recipe.teach else 8) + F * half))
    logits = scored * V * (half + (4 if by_piece else 4 + 4))
    memory = {
        "weights": 4 * N // sharers,
        "optimizer state": 8 * n // sharers,
        "weights in bf16 (autocast)": 2 * N if casts else 0,
        # float32 under autocast
        "inputs of all layers": tokens * L * D * (4 if alone else half) if checkpointing else 0,
        # With checkpointing the logits are freed before the first layer is recomputed.
        "activations": max(layers - logits, 0) if checkpointing else layers,
        "logits and their gradient": logits,
        # The rule's tensors, and their gradients in the backward.
        "fast weights": 2 * B * max(layer.state_bytes for layer in adapting_layers(model)) if adapting else 0,
    }
    if by_piece and trains_all:  # the pieces' sum in float32, and a piece's product or the scaled sum
        memory["the head's gradient, by piece"] = V * D * 8
    if not alone and spec.tensor == 1:  # the embeddings' and two layers' weights, and their gradients
        embeddings = V * D * (1 if config.tie_word_embeddings else 2)
        memory["gathered by FSDP2"] = 2 * half * (embeddings + 2 * (N - embeddings) // L)
    if spec.context > 1:
        memory["fast weights"] *= (2 if spec.slices == "head_tail" else 1) * adapting
        memory["keys and values of whole rows"] = half * B * T * 2 * G * d * kept
    # Gradients take the place of activations on the way back, unless they wait for the next batch of a step.
    gradients, lasting = 4 * n // sharers, memory["weights"] + memory["optimizer state"]
    is_waiting = recipe.gradient_accumulation > 1
    memory["gradients"] = gradients if is_waiting else max(gradients + lasting - sum(memory.values()), 0)

    # What element-wise operations of a layer read and write for a token, forward, run one by one: two norms of 8 passes
    # in float32, two residual sums, rotary embeddings, the MLP's activation and product; norms of the heads, and
    # autocast's copies for five projections. Then the logits, and by step the norm, AdamW and autocast's copies.
    layer = 2 * 8 * 8 * D + 24 * D + 40 * heads + 9 * half * F
    layer += (8 * 8 * heads if head_norms else 0) + (5 * 6 * D if casts else 0)
    of_token = (4 if checkpointing else 3) * L * layer + LOGIT_BYTES * V * (2 if by_piece else 3) // 3
    of_step = 34 * n // sharers + (3 * half * N if casts else 0)
    step = tokens * recipe.gradient_accumulation
    products, attention = flops_per_token(model, T, is_frozen=not trains_all, recomputed=checkpointing)
    is_packed = recipe.attn_implementation in ("auto", "varlen")
    moved = of_token + of_step / step
    return Plan(N, n, memory, products, attention, moved, recipe.steps * step, spec.processes, is_packed)


def _shape(model: ModelSpec, tokenizer: TokenizerSpec) -> Any:
    """Return the configuration of a model. UserError when it cannot be known."""
    base = str(model.base)
    if model.config is not None:
        trained = tokenizer.train
        size = trained.vocab_size if trained is not None else len(load_tokenizer(str(tokenizer.path)))
        values = model.config | {"vocab_size": size}
    elif base in SHAPES:
        values = SHAPES[base]
    else:
        return base_config(base)[0]
    return AutoConfig.for_model(values["model_type"], **{k: v for k, v in values.items() if k != "model_type"})


def flops_per_token(
    model: PreTrainedModel, length: int, *, is_frozen: bool = False, recomputed: bool = False
) -> tuple[float, float]:
    """Return FLOPs of forward and backward: of matrix products, the scan's included, and of attention.

    ``length``: tokens of a row. For mixtures of experts, all experts count. ``is_frozen``: the base gets no gradients.
    ``recomputed`` adds the recomputation of activation checkpointing, which MFU by convention leaves out.
    """
    config = model.config.get_text_config()
    embeddings: Any = model.get_input_embeddings()
    products = model.num_parameters() - (0 if config.tie_word_embeddings else embeddings.weight.numel())
    scan = 2 * sum(math.prod(layer.shape) for layer in adapting_layers(model)) if is_attached(model) else 0
    # The scan: one more product forward, three more backward.
    flops = (4 if is_frozen else 6) * products + 4 * scan + (2 * products + scan if recomputed else 0)
    heads = getattr(config, "num_attention_heads", 0)
    if not isinstance(heads, int) or heads == 0:
        return float(flops), 0.0
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    window = getattr(config, "sliding_window", None)
    seen = length / 2 if not window or window >= length else window
    # Forward, scores and weighted values: 2 products of 2 H d for each token seen.
    return float(flops), float((4 if recomputed else 3) * config.num_hidden_layers * 2 * 2 * seen * heads * width)


def peak_flops(given: float | None, precision: str) -> float | None:
    """Return FLOP/s of one device at most: ``given`` TFLOP/s, else a known GPU's; None where neither is there."""
    if given is not None:
        return given * 1e12
    return known_peak(torch.cuda.get_device_name(), precision) if torch.cuda.is_available() else None


def known_peak(name: str, precision: str) -> float | None:
    """Return FLOP/s of a GPU by its name, such as "NVIDIA H100 80GB HBM3"; None for an unknown one."""
    words = f" {name.replace('-', ' ')} "
    found = next((peaks for known, peaks in PEAK_TFLOPS.items() if f" {known} " in words), None)
    return found and found[precision != "bf16"] * 1e12
