"""What a run will need before it starts: memory on one device, arithmetic and time, from formulas.

Symbols: N parameters (n of them trained), B rows, T tokens a row, L layers, D hidden size, F intermediate size, V
vocabulary, H heads of width d, G of them for keys and values. Gradients and optimizer state are AdamW's in float32.
Several processes: what they share is divided by them, what FSDP2 gathers for a while is added.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from inplace_ttt.errors import UserError
from inplace_ttt.train.flops import flops_per_token
from inplace_ttt.train.loss import tokens_at_once, why_whole
from inplace_ttt.train.model import count_parameters, prepare_trainable
from inplace_ttt.train.parallel_spec import ParallelSpec
from inplace_ttt.train.recipe import Recipe

SHAPES: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-4B-Base": {
        "model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-14B-Base": {
        "model_type": "qwen3", "hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 40,
        "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
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
    """Bytes on one device, FLOPs of one trained token (forward and backward), tokens that one process reads."""

    parameters: int
    trained: int
    memory: dict[str, int]
    flops_per_token: float
    tokens: int
    processes: int = 1

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.memory.values())

    def seconds(self, flops_per_second: float, mfu: float) -> float:
        """Time of the run on one device of this rate, of which the share ``mfu`` is reached."""
        return self.flops_per_token * self.tokens / (flops_per_second * mfu)

    def lines(self, tflops: float, mfu: float) -> list[str]:
        """For people."""
        hours = self.seconds(tflops * 1e12, mfu) / 3600
        size, unit = (2**30, "GiB") if self.total >= 2**30 else (2**20, "MiB")
        parts = {**self.memory, "together": self.total}
        return [
            f"parameters {_count(self.parameters)}, trained {_count(self.trained)}",
            "memory of one device" + (f", one of {self.processes}:" if self.processes > 1 else ":"),
            *(f"  {name:<32}{value / size:10.2f} {unit}" for name, value in parts.items()),
            f"{self.flops_per_token / 1e9:.4g} GFLOP a token, {_count(self.tokens)} tokens a process",
            f"{hours:,.2f} hours at {tflops:g} TFLOP/s and an MFU of {mfu:.0%} (assumed)",
        ]


def _count(number: int) -> str:
    if number < 1e6:
        return f"{number:,}"
    return f"{number / 1e9:.3f}B" if number >= 1e9 else f"{number / 1e6:.3f}M"


def plan(recipe: Recipe) -> Plan:
    """The plan of a recipe. Builds the model without weights; UserError when its shape cannot be known."""
    with torch.device("meta"):
        make: Any = AutoModelForCausalLM.from_config
        model = make(_shape(recipe), dtype=torch.float32)
    ttt = recipe.ttt_config()
    prepare_trainable(model, recipe)
    config = model.config
    N, n = count_parameters(model), count_parameters(model, trainable=True)
    B, T, L, D, V = (
        _rows(recipe), recipe.sequence_length, config.num_hidden_layers, config.hidden_size, config.vocab_size,
    )  # fmt: skip
    F = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * D
    H = config.num_attention_heads
    G = getattr(config, "num_key_value_heads", None) or H
    d = getattr(config, "head_dim", None) or D // H
    half = 2 if recipe.precision == "bf16" else 4
    adapting = 0 if ttt is None else len(ttt.layer_indices(L))
    spec = recipe.parallel or ParallelSpec()
    sharers = spec.shard * spec.context * spec.tensor
    own = T // spec.context
    kept = 1 if recipe.activation_checkpointing else L  # layers whose activations are there at once
    adapting_kept = min(kept, adapting)

    # Of one layer and token, kept for the backward: two norms in float32, their outputs, queries, keys, values, the
    # attention's output and the MLP's gate, up, activation and product.
    per_token = 2 * 2 * 4 * D + half * (2 * D + 2 * (H + G) * d + 4 * F)
    extra = D * 8 + F * half  # targets and, in the backward, the keys again
    activations = B * own * (kept * per_token + adapting_kept * extra)
    if recipe.activation_checkpointing:  # the input of every layer: float32 under autocast
        activations += B * own * L * D * (4 if spec.processes == 1 else half)
    scored = B * own  # tokens whose logits are there at once
    if spec.tensor == 1 and why_whole(model) is None:
        scored = min(scored, tokens_at_once(V))
    memory = {
        "weights": 4 * N // sharers,
        "gradients": 4 * n // sharers,
        "optimizer state": 8 * n // sharers,
        "weights in bf16 (autocast)": 2 * N if half == 2 and spec.processes == 1 else 0,
        "activations": activations,
        "fast weights": 2 * 4 * B * D * F if adapting else 0,  # S, and its gradient in the backward
        "logits and their gradient": scored * V * (half + 4 + 4),
    }
    if scored < B * own and recipe.trainable == "all":  # a piece's gradient, and their sum in float32 or its cast
        memory["the head's gradient, by piece"] = V * D * (8 if half == 2 else 4)
    if spec.processes > 1 and spec.tensor == 1:  # the embeddings' and two layers' weights, and their gradients
        embeddings = V * D * (1 if config.tie_word_embeddings else 2)
        memory["gathered by FSDP2"] = 2 * half * (embeddings + 2 * (N - embeddings) // L)
    if spec.context > 1:
        pieces = 2 if spec.slices == "head_tail" else 1
        memory["fast weights"] *= pieces * adapting_kept
        memory["keys and values of whole rows"] = half * B * T * 2 * G * d * kept
    flops = flops_per_token(recipe, model, recomputed=True)
    return Plan(N, n, memory, flops, recipe.steps * B * recipe.gradient_accumulation * own, spec.processes)


def _rows(recipe: Recipe) -> int:
    """Rows that one process reads at a time."""
    spec = recipe.parallel
    return recipe.batch_size // (1 if spec is None else spec.data * spec.shard)


def _shape(recipe: Recipe) -> Any:
    if recipe.model.config is not None:
        values = dict(recipe.model.config)
        kind, tokenizer = values.pop("model_type"), recipe.tokenizer
        if tokenizer.train is not None:
            values["vocab_size"] = tokenizer.train.vocab_size
        else:
            from inplace_ttt.train.tokenizer import load_tokenizer

            values["vocab_size"] = len(load_tokenizer(str(tokenizer.path)))
        return AutoConfig.for_model(kind, **values)
    base = str(recipe.model.base)
    if base in SHAPES:
        values = dict(SHAPES[base])
        return AutoConfig.for_model(values.pop("model_type"), **values)
    from pathlib import Path

    inner = Path(base) / "base"
    try:
        return AutoConfig.from_pretrained(str(inner) if inner.is_dir() else base)
    except (OSError, ValueError) as error:
        raise UserError(f"model.base: the shape of {base} is not known: {str(error).splitlines()[0]}") from None
