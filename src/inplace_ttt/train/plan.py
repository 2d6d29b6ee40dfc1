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
from inplace_ttt.train.duration import LOGIT_BYTES, Work, layer_bytes
from inplace_ttt.train.flops import attention_per_token, products_per_token
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
    """Bytes on one device, what one process computes and moves for a trained token, tokens that it reads."""

    parameters: int
    trained: int
    memory: dict[str, int]
    work: Work
    tokens: int
    processes: int = 1

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.memory.values())

    @property
    def flops_per_token(self) -> float:
        """What is computed again included."""
        return self.work.products + self.work.attention

    def lines(self, tflops: float, bandwidth: float) -> list[str]:
        """For people; ``tflops`` and ``bandwidth`` (TB/s) of one device by its data sheet."""
        each = self.work.seconds_per_token(tflops, bandwidth)
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
    """The plan of a recipe. Builds the model without weights; UserError when its shape cannot be known.

    ``logit_tokens``: how many tokens' logits are there at once; None: as many as `inplace_ttt.train.loss` makes.
    """
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
    checkpointing, casts = recipe.activation_checkpointing, half == 2 and spec.processes == 1
    kept = 1 if checkpointing else L  # layers whose activations are there at once
    adapting_kept = min(kept, adapting)

    # Of one layer and token, kept for the backward: two norms in float32, their outputs (autocast casts them for each
    # of five projections), queries, keys, values, the attention's output, and the MLP's gate, up, activation, product.
    per_token = 2 * 2 * 4 * D + half * ((5 if casts else 2) * D + 2 * (H + G) * d + 4 * F)
    head_norms = any(name.endswith("q_norm") for name, _ in model.named_modules())
    if head_norms:
        per_token += (2 * 4 + half) * (H + G) * d
    extra = D * 8 + F * half  # targets and, in the backward, the keys again
    layers = B * own * (kept * per_token + adapting_kept * extra)
    inputs = B * own * L * D * (4 if spec.processes == 1 else half) if checkpointing else 0  # float32 under autocast
    scored = logit_tokens or B * own
    if logit_tokens is None and spec.tensor == 1 and why_whole(model) is None:
        scored = min(scored, tokens_at_once(V))
    by_piece, logits = logit_tokens is None and scored < B * own, scored * V * (half + 4 + 4)
    memory = {
        "weights": 4 * N // sharers,
        "optimizer state": 8 * n // sharers,
        "weights in bf16 (autocast)": 2 * N if casts else 0,
        "inputs of all layers": inputs,
        # With checkpointing the logits are gone before the first layer is computed again.
        "activations": max(layers - logits, 0) if checkpointing else layers,
        "logits and their gradient": logits,
        "fast weights": 2 * 4 * B * D * F if adapting else 0,  # S, and its gradient in the backward
    }
    if by_piece and recipe.trainable == "all":  # a piece's gradient, and their sum in float32 or its cast
        memory["the head's gradient, by piece"] = V * D * (8 if half == 2 else 4)
    if spec.processes > 1 and spec.tensor == 1:  # the embeddings' and two layers' weights, and their gradients
        embeddings = V * D * (1 if config.tie_word_embeddings else 2)
        memory["gathered by FSDP2"] = 2 * half * (embeddings + 2 * (N - embeddings) // L)
    if spec.context > 1:
        pieces = 2 if spec.slices == "head_tail" else 1
        memory["fast weights"] *= pieces * adapting_kept
        memory["keys and values of whole rows"] = half * B * T * 2 * G * d * kept
    # Gradients take the place of activations on the way back, unless they wait for the next batch of a step.
    gradients, room = 4 * n // sharers, sum(memory.values()) - 4 * N // sharers - 8 * n // sharers
    memory["gradients"] = gradients if recipe.gradient_accumulation > 1 else max(gradients - room, 0)
    passes = 4 if checkpointing else 3
    per_layer = layer_bytes(D, F, H * d, G * d, half, casts=casts, head_norms=head_norms)
    work = Work(
        products=products_per_token(recipe, model, recomputed=True)
        + (0 if checkpointing or not by_piece else 2 * V * D),
        attention=attention_per_token(recipe, model, recomputed=True),
        token_bytes=passes * L * per_layer + LOGIT_BYTES * V * (4 if by_piece else 3) // 3,
        step_bytes=34 * n // sharers + (3 * half * N if casts else 0),  # gradients' norm, AdamW, autocast's copies
        tokens_per_step=B * own * recipe.gradient_accumulation,
        packed=recipe.attn_implementation in ("auto", "varlen"),
    )
    return Plan(N, n, memory, work, recipe.steps * B * recipe.gradient_accumulation * own, spec.processes)


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
