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
from inplace_ttt.hf.auto import base_config
from inplace_ttt.train.duration import LOGIT_BYTES, Work, layer_bytes
from inplace_ttt.train.flops import attention_per_token, products_per_token
from inplace_ttt.train.loss import tokens_at_once, why_whole
from inplace_ttt.train.model import count_parameters, prepare_trainable
from inplace_ttt.train.specs import ParallelSpec, Recipe

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


@dataclass(frozen=True)
class Symbols:
    """The symbols above of a recipe, for one of its processes, and the settings that the formulas ask for."""

    spec: ParallelSpec
    N: int
    n: int
    B: int
    T: int
    own: int
    """Tokens of a row that this process has."""
    L: int
    adapting: int
    D: int
    F: int
    V: int
    H: int
    G: int
    d: int
    half: int
    """Bytes of a number in products."""
    tied: bool
    head_norms: bool
    checkpointing: bool
    logit_tokens: int
    """Tokens whose logits are there at once."""
    by_piece: bool

    @property
    def sharers(self) -> int:
        """Processes that share weights, gradients and optimizer state."""
        return self.spec.shard * self.spec.context * self.spec.tensor

    @property
    def casts(self) -> bool:
        """Whether autocast runs: FSDP2 has its own mixed precision."""
        return self.half == 2 and self.spec.processes == 1

    @classmethod
    def of(cls, recipe: Recipe, model: Any, logit_tokens: int | None) -> "Symbols":
        config, ttt = model.config.get_text_config(), recipe.ttt_config()
        spec = recipe.parallel or ParallelSpec()
        L, D, H, V = config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.vocab_size
        B, own = recipe.batch_size // (spec.data * spec.shard), recipe.sequence_length // spec.context
        scored = logit_tokens or B * own
        if logit_tokens is None and spec.tensor == 1 and why_whole(model) is None:
            scored = min(scored, tokens_at_once(V))
        return cls(
            spec=spec,
            N=count_parameters(model),
            n=count_parameters(model, trainable=True),
            B=B,
            T=recipe.sequence_length,
            own=own,
            L=L,
            adapting=0 if ttt is None else len(ttt.layer_indices(L)),
            D=D,
            F=getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * D,
            V=V,
            H=H,
            G=getattr(config, "num_key_value_heads", None) or H,
            d=getattr(config, "head_dim", None) or D // H,
            half=2 if recipe.precision == "bf16" else 4,
            tied=config.tie_word_embeddings,
            head_norms=any(name.endswith("q_norm") for name, _ in model.named_modules()),
            checkpointing=recipe.activation_checkpointing,
            logit_tokens=scored,
            by_piece=logit_tokens is None and scored < B * own,
        )


def plan(recipe: Recipe, *, logit_tokens: int | None = None) -> Plan:
    """The plan of a recipe. Builds the model without weights; UserError when its shape cannot be known.

    ``logit_tokens``: how many tokens' logits are there at once; None: as many as `inplace_ttt.train.loss` makes.
    """
    with torch.device("meta"):
        make: Any = AutoModelForCausalLM.from_config
        model = make(_shape(recipe), dtype=torch.float32)
    prepare_trainable(model, recipe)
    s = Symbols.of(recipe, model, logit_tokens)
    a_step = s.B * s.own * recipe.gradient_accumulation
    memory = _memory(s, keeps_gradients=recipe.gradient_accumulation > 1, trains_head=recipe.trainable == "all")
    again = 0 if s.checkpointing or not s.by_piece else 2 * s.V * s.D  # of the pieces' logits
    work = Work(
        products=products_per_token(recipe, model, recomputed=True) + again,
        attention=attention_per_token(recipe, model, recomputed=True),
        token_bytes=_token_bytes(s),
        step_bytes=34 * s.n // s.sharers + (3 * s.half * s.N if s.casts else 0),  # norm, AdamW, autocast's copies
        tokens_per_step=a_step,
        packed=recipe.attn_implementation in ("auto", "varlen"),
    )
    return Plan(s.N, s.n, memory, work, recipe.steps * a_step, s.spec.processes)


def _memory(s: Symbols, *, keeps_gradients: bool, trains_head: bool) -> dict[str, int]:
    """Bytes at the peak, the beginning of the backward, by what holds them."""
    tokens = s.B * s.own
    kept = 1 if s.checkpointing else s.L  # layers whose activations are there at once
    adapting_kept = min(kept, s.adapting)
    # Of one layer and token, kept for the backward: two norms in float32, their outputs (autocast casts them for each
    # of five projections), queries, keys, values, the attention's output, and the MLP's gate, up, activation, product.
    heads = (s.H + s.G) * s.d
    of_layer = 2 * 2 * 4 * s.D + s.half * ((5 if s.casts else 2) * s.D + 2 * heads + 4 * s.F)
    of_layer += (2 * 4 + s.half) * heads if s.head_norms else 0
    of_targets = s.D * 8 + s.F * s.half  # and, in the backward, the keys again
    layers = tokens * (kept * of_layer + adapting_kept * of_targets)
    logits = s.logit_tokens * s.V * (s.half + 4 + 4)
    memory = {
        "weights": 4 * s.N // s.sharers,
        "optimizer state": 8 * s.n // s.sharers,
        "weights in bf16 (autocast)": 2 * s.N if s.casts else 0,
        # float32 under autocast
        "inputs of all layers": tokens * s.L * s.D * (4 if s.spec.processes == 1 else s.half) if s.checkpointing else 0,
        # With checkpointing the logits are gone before the first layer is computed again.
        "activations": max(layers - logits, 0) if s.checkpointing else layers,
        "logits and their gradient": logits,
        "fast weights": 2 * 4 * s.B * s.D * s.F if s.adapting else 0,  # S, and its gradient in the backward
    }
    if s.by_piece and trains_head:  # a piece's gradient, and their sum in float32 or its cast
        memory["the head's gradient, by piece"] = s.V * s.D * (8 if s.half == 2 else 4)
    if s.spec.processes > 1 and s.spec.tensor == 1:  # the embeddings' and two layers' weights, and their gradients
        embeddings = s.V * s.D * (1 if s.tied else 2)
        memory["gathered by FSDP2"] = 2 * s.half * (embeddings + 2 * (s.N - embeddings) // s.L)
    if s.spec.context > 1:
        memory["fast weights"] *= (2 if s.spec.slices == "head_tail" else 1) * adapting_kept
        memory["keys and values of whole rows"] = s.half * s.B * s.T * 2 * s.G * s.d * kept
    # Gradients take the place of activations on the way back, unless they wait for the next batch of a step.
    gradients, lasting = 4 * s.n // s.sharers, memory["weights"] + memory["optimizer state"]
    memory["gradients"] = gradients if keeps_gradients else max(gradients + lasting - sum(memory.values()), 0)
    return memory


def _token_bytes(s: Symbols) -> int:
    """What element-wise operations move for a token, forward and backward; the loss's last, again by pieces."""
    layer = layer_bytes(s.D, s.F, s.H * s.d, s.G * s.d, s.half, casts=s.casts, head_norms=s.head_norms)
    return (4 if s.checkpointing else 3) * s.L * layer + LOGIT_BYTES * s.V * (4 if s.by_piece else 3) // 3


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
    try:
        return base_config(base)[0]
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"model.base: the shape of {base} is not known: {str(error).splitlines()[0]}") from None
