"""Peers of In-Place TTT as Hugging Face models of one shape: recurrent mixers in the place of attention.

Importing this module makes the model type ``peer`` known to transformers, and so to recipes: a Mistral whose layers
``mixer_layers`` mix tokens by ``mixer`` instead of attention:

* ``gla`` (Yang et al. 2023), ``mamba2`` (Dao & Gu 2024), ``deltanet`` and ``gated_deltanet`` (Yang et al. 2024): one
  recurrence, S' = decay * S + k write^T, write = v or beta (v - S^T k), read as S^T q. On a GPU by the kernels of
  flash-linear-attention (the extra ``peers``), elsewhere by ``recurrence``, which is also what ``peer_gradients.py``
  compares the kernels with;
* ``ttt_linear`` (Sun et al. 2024): a linear model with a layer norm, trained by a gradient step a token; the gradients
  of a mini-batch are taken at its beginning;
* ``lact`` (Zhang et al. 2025): a SwiGLU MLP, updated after each large chunk, beside sliding-window attention. Without
  Muon.

Documents that are packed in a row (``position_ids`` that begin again) begin with a fresh state. Reading goes through
transformers' cache, piece by piece.

Shapes: B rows, T tokens, H heads, K width of keys and queries, V of values.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, normalize, pad, silu, softplus
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from inplace_ttt.config import InPlaceTTTConfig
from inplace_ttt.errors import UserError
from inplace_ttt.hf.attach import adapting_layers, is_attached
from inplace_ttt.train.attention import document_bounds

# -- recurrences -------------------------------------------------------------------------------------------------------


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, state: Tensor | None, new: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the outputs [B, T, H, V] and the last state [B, H, K, V] token by token, in float32 at least.

    ``log_decay``: [B, T, H] or [B, T, H, K], None: none. ``beta`` [B, T, H]: the delta rule's, None: plain sums.
    ``new`` [B, T]: tokens that begin a document.
    """
    q, k, v = map(precise, (q, k, v))
    S = q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[-1]) if state is None else precise(state)
    out = []
    for t in range(q.shape[1]):
        S = torch.where(new[:, t, None, None, None], 0, S)
        if log_decay is not None:
            decay = precise(log_decay[:, t]).exp()
            S = S * (decay[..., None] if decay.dim() == 3 else decay[..., None, None])
        write = v[:, t]
        if beta is not None:
            write = precise(beta[:, t, :, None]) * (write - torch.einsum("bhkv,bhk->bhv", S, k[:, t]))
        S = S + k[:, t, :, :, None] * write[:, :, None]
        out.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]))
    return torch.stack(out, 1), S


def fast_recurrence(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, state: Tensor | None, bounds: Tensor
) -> tuple[Tensor, Tensor]:
    """The same by flash-linear-attention's kernels, in bf16 (decays in float32), as these models are trained.

    ``bounds``: where documents begin in the flattened rows, and the end.
    """
    try:
        one_configuration()
        from fla.ops.delta_rule import chunk_delta_rule
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
        from fla.ops.gla import chunk_gla
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError as error:
        raise UserError(f"the mixers' kernels need flash-linear-attention: pip install '.[peers]' ({error})") from None
    B, T = q.shape[:2]
    how: dict[str, Any] = {"scale": 1.0, "initial_state": state, "output_final_state": True}
    given = [x.to(torch.bfloat16) for x in (q, k, v)]
    decay, rate = (None if x is None else x.float() for x in (log_decay, beta))
    is_packed = len(bounds) != B + 1
    if is_packed:
        given = [x.flatten(0, 1)[None] for x in given]
        decay, rate = (None if x is None else x.flatten(0, 1)[None] for x in (decay, rate))
        how["cu_seqlens"] = in_64_bits(bounds)
    if beta is None:
        assert decay is not None
        out, last = (chunk_simple_gla if decay.dim() == 3 else chunk_gla)(*given, g=decay, **how)
    elif decay is None:
        assert rate is not None
        out, last = chunk_delta_rule(*given, beta=rate.to(torch.bfloat16), **how)
    else:
        out, last = chunk_gated_delta_rule(*given, g=decay, beta=rate, **how)
    if is_packed:  # of each row its last document's
        ends = torch.arange(T, (B + 1) * T, T, device=bounds.device, dtype=bounds.dtype)
        out, last = out.view(B, T, *out.shape[2:]), last[torch.searchsorted(bounds, ends) - 1]
    return out, last


_last_bounds: list[tuple[Tensor, Tensor]] = []


def in_64_bits(bounds: Tensor) -> Tensor:
    """The same tensor for all layers of a forward: by it the kernels know again what they have worked out of it."""
    if not _last_bounds or _last_bounds[0][0] is not bounds:
        _last_bounds[:] = [(bounds, bounds.long())]
    return _last_bounds[0][1]


@cache
def one_configuration() -> None:
    """Let Triton compile one configuration of each kernel: of its list one of middle size, four warps, few stages.

    For its autotuner flash-linear-attention has hundreds of a mixer, and each takes seconds.
    """
    try:
        from triton.runtime.autotuner import Autotuner
    except ImportError:  # and importing the kernels says so
        return
    begin = Autotuner.__init__

    def begin_with_one(self: Any, fn: Any, arg_names: Any, configs: Any, *rest: Any, **named: Any) -> None:
        kept = [config for config in configs or [] if config.num_warps == 4] or list(configs or [])
        kept = [config for config in kept if config.num_stages == min(x.num_stages for x in kept)]
        begin(self, fn, arg_names, kept[len(kept) // 2 :][:1] or configs, *rest, **named)

    Autotuner.__init__ = begin_with_one


def precise(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# -- mixers ------------------------------------------------------------------------------------------------------------


class HeadNorm(nn.Module):
    """RMS norm of every head's outputs [..., H, V], and optionally a gate."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads * width))  # one vector, so that it does not decay

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        x = precise(x) * torch.rsqrt(precise(x).square().mean(-1, keepdim=True) + 1e-6)
        x = x * self.weight.view(x.shape[-2:])
        return x if gate is None else x * silu(precise(gate).view_as(x))


class ShortConv(nn.Module):
    """A causal depthwise convolution of four taps, then SiLU, which sees nothing before its document."""

    def __init__(self, width: int, taps: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(taps, width).uniform_(-0.5, 0.5))

    def forward(self, x: Tensor, positions: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [B, T, W], positions [B, T] in the document, past [B, taps - 1, W]; the last inputs for the next call."""
        taps, T, weight = len(self.weight), x.shape[1], self.weight.to(x.dtype)
        whole = pad(x, (0, 0, taps - 1, 0)) if past is None else torch.cat([past.to(x.dtype), x], 1)
        out = x * weight[-1]
        for back in range(1, taps):
            seen = (positions >= back)[..., None]
            out = out + torch.where(seen, whole[:, taps - 1 - back : taps - 1 - back + T], 0) * weight[-1 - back]
        return silu(out), whole[:, T:].detach()


class Mixer(nn.Module):
    """A mixer with a state in transformers' cache, and documents by their positions."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        self.layer, self.width = layer, config.hidden_size
        self.heads = config.num_attention_heads

    def linear(self, out: int) -> nn.Linear:
        return nn.Linear(self.width, out, bias=False)

    def forward(self, hidden_states: Tensor, position_ids: Tensor | None = None, **given: Any) -> tuple[Tensor, None]:
        B, T, _ = hidden_states.shape
        cache = given.get("cache") if given.get("cache") is not None else given.get("past_key_values")
        state: dict[str, Any] = {}
        if cache is not None:
            length = cache.get_seq_length(self.layer)
            empty = hidden_states.new_zeros(B, 1, T, 1)
            cache.update(empty, empty, self.layer)  # so that masks and positions know how much was read
            state = cache.layers[self.layer].__dict__.setdefault("peer", {}) if length else {}
        if position_ids is None:
            position_ids = torch.arange(T, device=hidden_states.device)[None]
        out, left = self.mix(hidden_states, position_ids.expand(B, T), state, position_ids)
        if cache is not None:
            cache.layers[self.layer].peer = left
        return out, None

    def mix(self, x: Tensor, positions: Tensor, state: dict[str, Any], ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """The output [B, T, D] and the state that a call leaves; ``ids``: positions as the model was given them."""
        raise NotImplementedError

    def is_replayed(self, q: Tensor, state: dict[str, Any], size: int) -> bool:
        """Return whether whole rows are trained on a GPU, in parts of ``size``."""
        return q.is_cuda and self.training and not state and not q.shape[2] % size

    def replayed(self, steps: Callable[..., Tensor], *given: Tensor) -> Tensor:
        """``steps(*given)`` by a CUDA graph of its forward and its backward: of some 10,000 small kernels that a layer
        launches, one launch is left. What is trained must be among ``given``, and the shapes stay as they are.
        """
        graphs = self.__dict__.setdefault("graphs", {})
        key = tuple(x.shape for x in given)
        if key not in graphs:
            sample = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in given)
            graphs[key] = torch.cuda.make_graphed_callables(steps, sample)  # type: ignore[no-untyped-call]
        out: Tensor = graphs[key](*given)
        return out

    def flops(self) -> float:
        """FLOPs of a token, forward, without the products of `nn.Linear`: by chunks, a linear recurrence's."""
        K, V = self.K, self.V  # type: ignore[attr-defined]
        by_chunk = 4 * K * V + KERNEL_CHUNK * (K + V)
        solved = 2 * K * V + KERNEL_CHUNK * (K + V) if isinstance(self, Delta) else 0  # what the keys read already
        return float(self.heads * (by_chunk + solved))

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, state: Any, ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Outputs and the last state, by the fastest way there is here."""
        B, T = q.shape[:2]
        S = state.get("S")
        if q.is_cuda and T > 16:  # a step of decoding is not worth a kernel's chunk
            if S is None:
                bounds = document_bounds(ids, B, T, q.device)
            else:
                bounds = torch.arange(0, (B + 1) * T, T, device=q.device)
            return fast_recurrence(q, k, v, decay, beta, S, bounds)
        return recurrence(q, k, v, decay, beta, S, starts(ids.expand(B, T), S is not None))


def starts(positions: Tensor, continues: bool = False) -> Tensor:
    """Tokens [B, T] that begin a document; ``continues``: the first token of the call does not."""
    return positions.diff(dim=-1, prepend=positions[:, :1] - (1 if continues else 2)) != 1


class GatedLinear(Mixer):
    """GLA: a decay for every channel of the keys, an output gate."""

    def __init__(self, config: Any, layer: int, key: float = 0.5, value: float = 1.0, low_rank: int = 16) -> None:
        super().__init__(config, layer)
        self.K, self.V = round(self.width * key / self.heads), round(self.width * value / self.heads)
        self.q, self.k = self.linear(self.heads * self.K), self.linear(self.heads * self.K)
        self.v, self.g = self.linear(self.heads * self.V), self.linear(self.heads * self.V)
        self.decay = nn.Sequential(self.linear(low_rank), nn.Linear(low_rank, self.heads * self.K))
        self.norm, self.o = HeadNorm(self.heads, self.V), nn.Linear(self.heads * self.V, self.width, bias=False)

    def mix(self, x: Tensor, positions: Tensor, state: dict[str, Any], ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)) for f in (self.q, self.k, self.v))
        decay = logsigmoid(precise(self.decay(x))).unflatten(-1, (self.heads, -1)) / 16
        out, S = self.recur(q * self.K**-0.5, k, v, decay, None, state, ids)
        return self.o(self.norm(out, self.g(x)).flatten(-2).to(x.dtype)), {"S": S}


class Delta(Mixer):
    """DeltaNet, and with ``gated`` Gated DeltaNet: a decay for every head, an output gate."""

    def __init__(self, config: Any, layer: int, key: float = 1.0, value: float = 1.0, gated: bool = False) -> None:
        super().__init__(config, layer)
        self.K, self.V = round(self.width * key / self.heads), round(self.width * value / self.heads)
        self.q, self.k = self.linear(self.heads * self.K), self.linear(self.heads * self.K)
        self.v, self.beta = self.linear(self.heads * self.V), self.linear(self.heads)
        self.conv = ShortConv(self.heads * (2 * self.K + self.V))
        self.gated = gated
        if gated:
            self.a, self.g = self.linear(self.heads), self.linear(self.heads * self.V)
            self.A_log, self.dt_bias = decay_parameters(self.heads)
        self.norm, self.o = HeadNorm(self.heads, self.V), nn.Linear(self.heads * self.V, self.width, bias=False)

    def mix(self, x: Tensor, positions: Tensor, state: dict[str, Any], ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
        mixed, past = self.conv(torch.cat([self.q(x), self.k(x), self.v(x)], -1), positions, state.get("conv"))
        sizes = [self.heads * self.K, self.heads * self.K, self.heads * self.V]
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in mixed.split(sizes, -1))
        q, k = normalize(precise(q), dim=-1) * self.K**-0.5, normalize(precise(k), dim=-1)
        decay = -self.A_log.exp() * softplus(precise(self.a(x)) + self.dt_bias) if self.gated else None
        out, S = self.recur(q, k, v, decay, precise(self.beta(x)).sigmoid(), state, ids)
        out = self.norm(out, self.g(x) if self.gated else None)
        return self.o(out.flatten(-2).to(x.dtype)), {"S": S, "conv": past}


class Mamba2(Mixer):
    """Mamba-2: keys and queries shared by all heads, one decay a head, a skip connection, a gate before the norm."""

    def __init__(self, config: Any, layer: int, value: float = 2.0, state: int = 64, head: int = 64) -> None:
        super().__init__(config, layer)
        self.K, self.V = state, head
        self.heads = round(self.width * value / head)
        inner = self.heads * self.V
        self.x, self.z = self.linear(inner), self.linear(inner)
        self.bc, self.dt = self.linear(2 * state), self.linear(self.heads)
        self.conv = ShortConv(inner + 2 * state)
        self.A_log, self.dt_bias = decay_parameters(self.heads)
        self.skip = nn.Parameter(torch.ones(self.heads))
        self.norm, self.o = HeadNorm(self.heads, self.V), nn.Linear(inner, self.width, bias=False)

    def mix(self, x: Tensor, positions: Tensor, state: dict[str, Any], ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
        mixed, past = self.conv(torch.cat([self.x(x), self.bc(x)], -1), positions, state.get("conv"))
        inner, k, q = mixed.split([self.heads * self.V, self.K, self.K], -1)
        v, shape = inner.unflatten(-1, (self.heads, -1)), (*x.shape[:2], self.heads, self.K)
        dt = softplus(precise(self.dt(x)) + self.dt_bias)
        q, k = (y[:, :, None].expand(shape) for y in (q, k))
        out, S = self.recur(q, k, v * dt[..., None], -self.A_log.exp() * dt, None, state, ids)
        out = self.norm((out + self.skip[:, None] * v) * silu(precise(self.z(x))).view_as(v))
        return self.o(out.flatten(-2).to(x.dtype)), {"S": S, "conv": past}


def decay_parameters(heads: int) -> tuple[nn.Parameter, nn.Parameter]:
    """A_log and the bias of the step size, as Mamba-2 begins: A from 1 to 16, steps from 0.001 to 0.1."""
    step = torch.exp(torch.rand(heads) * math.log(100) + math.log(0.001))
    return nn.Parameter(torch.empty(heads).uniform_(1, 16).log()), nn.Parameter(step + torch.log(-torch.expm1(-step)))


# -- mixers that learn by gradient steps -------------------------------------------------------------------------------


class TTTLinear(Mixer):
    """TTT-Linear: f(x) = x + norm(x W + b), a step on |f(k) - v|^2 / 2 for every token.

    The gradients of ``batch`` tokens are all taken at the weights before the first of them.
    """

    def __init__(self, config: Any, layer: int, batch: int = 64, lr: float = 0.1, heads: int | None = None) -> None:
        super().__init__(config, layer)
        self.heads = heads or self.heads
        self.K, self.batch, self.lr = self.width // self.heads, batch, lr
        self.q, self.k, self.v, self.g = (self.linear(self.width) for _ in range(4))
        self.eta = nn.Linear(self.width, self.heads)
        self.conv = ShortConv(2 * self.width)
        self.W = nn.Parameter(torch.randn(self.heads, self.K, self.K) * 0.02)
        self.scale, self.shift, self.b = (
            nn.Parameter(f(self.heads * self.K)) for f in (torch.ones, *[torch.zeros] * 2)
        )
        self.norm, self.o = HeadNorm(self.heads, self.K), self.linear(self.width)

    def mix(self, x: Tensor, positions: Tensor, state: dict[str, Any], ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
        mixed, past = self.conv(torch.cat([self.q(x), self.k(x)], -1), positions, state.get("conv"))
        heads = lambda y: precise(y.unflatten(-1, (self.heads, -1)).transpose(1, 2))  # noqa: E731
        q, k = (normalize(heads(y), dim=-1) for y in mixed.chunk(2, -1))
        eta = self.lr * precise(self.eta(x)).sigmoid().transpose(1, 2)[..., None]
        with torch.autocast(x.device.type, enabled=False):
            out, left = self.learn(q, k, heads(self.v(x)), eta, starts(positions, bool(state)), state)
        return self.o(self.norm(out.transpose(1, 2), self.g(x)).flatten(-2).to(x.dtype)), {**left, "conv": past}

    def learn(
        self, q: Tensor, k: Tensor, v: Tensor, eta: Tensor, new: Tensor, state: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """Outputs [B, H, T, K] of q, k, v and steps eta [B, H, T, 1]; new [B, T] begins a document."""
        before = state["pending"][0].shape[2] if state else 0
        if before:  # the tokens since the last update, once more
            q, k, v, eta = (torch.cat([old, x], 2) for old, x in zip(state["pending"], (q, k, v, eta), strict=True))
            new = torch.cat([state["new"], new], 1)
        W0, b0 = (x.expand(len(q), -1, -1, -1).contiguous() for x in (self.W, self.by_head(self.b)))
        W, b = (state["W"], state["b"]) if state else (W0, b0)
        scale, shift = self.by_head(self.scale), self.by_head(self.shift)
        whole = q.shape[2] - q.shape[2] % self.batch
        if self.is_replayed(q, state, STEPS_AT_ONCE * self.batch):
            steps = partial(compiled_in_turn, self.batch)
            return self.replayed(steps, q, k, v, eta, new, W0, b0, scale, shift), {}
        done, rest = (
            [*(x[:, :, part] for x in (q, k, v, eta)), new[:, part]] for part in (slice(whole), slice(whole, None))
        )
        out = []
        if whole:
            read, W, b = ttt_steps(self.batch, *done, W, b, W0, b0, scale, shift)
            out.append(read)
        if whole < q.shape[2]:  # it is learned from when its mini-batch is complete
            out.append(ttt_steps(self.batch, *rest, W, b, W0, b0, scale, shift)[0])
        *pending, kept = rest
        left = {"W": W, "b": b, "pending": tuple(pending), "new": kept}
        return torch.cat(out, 2)[:, :, before:], left

    def flops(self) -> float:
        return float(self.heads * (6 * self.K * self.K + 2 * self.batch * self.K))

    def by_head(self, x: Tensor) -> Tensor:
        return x.view(self.heads, 1, self.K)


STEPS_AT_ONCE = 4
"""Mini-batches of one compiled function: 256 of them in a row of 16,384 tokens, each some fifty small operators."""


def ttt_steps(
    batch: int, q: Tensor, k: Tensor, v: Tensor, eta: Tensor, new: Tensor,
    W: Tensor, b: Tensor, W0: Tensor, b0: Tensor, scale: Tensor, shift: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Outputs of TTT-Linear, mini-batch by mini-batch, and its weights and biases after the last."""
    out = []
    for qs, ks, vs, etas, begins in zip(*(x.split(batch, 2) for x in (q, k, v, eta)), new.split(batch, 1), strict=True):
        document = begins.cumsum(1)
        fresh = (document > 0)[:, None, :, None]  # of documents that begin here: they learn from W0
        last = document[:, -1:]
        alike = (document[:, :, None] == document[:, None, :]).tril()[:, None]
        step = etas * torch.where(
            fresh,
            ttt_gradient(ks, vs, ks @ W0 + b0, scale, shift),
            ttt_gradient(ks, vs, ks @ W + b, scale, shift),
        )
        scores = torch.where(alike, qs @ ks.mT + 1, 0)  # the one: of b
        read = torch.where(fresh, qs @ W0 + b0, qs @ W + b) - scores @ step
        out.append(qs + nn.functional.layer_norm(read, read.shape[-1:], eps=1e-6) * scale + shift)
        kept = torch.where((document == last)[:, None, :, None], step, 0)
        is_new = (last > 0)[:, None, :, None]
        W = torch.where(is_new, W0, W) - ks.mT @ kept
        b = torch.where(is_new, b0, b) - kept.sum(2, keepdim=True)
    return torch.cat(out, 2), W, b


compiled_steps = torch.compile(ttt_steps, dynamic=False, fullgraph=True)


def compiled_in_turn(
    batch: int, q: Tensor, k: Tensor, v: Tensor, eta: Tensor, new: Tensor,
    W0: Tensor, b0: Tensor, scale: Tensor, shift: Tensor,
) -> Tensor:  # fmt: skip
    """The outputs of `ttt_steps` for rows of whole mini-batches from the beginning, some of them at a time."""
    size, out, W, b = STEPS_AT_ONCE * batch, [], W0, b0
    for part in zip(*(x.split(size, 2) for x in (q, k, v, eta)), new.split(size, 1), strict=True):
        read, W, b = compiled_steps(batch, *part, W, b, W0, b0, scale, shift)
        out.append(read)
    return torch.cat(out, 2)


def ttt_gradient(k: Tensor, v: Tensor, y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """d/dy of |k + norm(y) - v|^2 / 2."""
    centred = y - y.mean(-1, keepdim=True)
    rate = torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-6)
    hat = centred * rate
    g = (k + hat * scale + shift - v) * scale
    return rate * (g - g.mean(-1, keepdim=True) - hat * (g * hat).mean(-1, keepdim=True))


def ttt_linear_reference(mixer: TTTLinear, q: Tensor, k: Tensor, v: Tensor, eta: Tensor, new: Tensor) -> Tensor:
    """Compute `TTTLinear.learn` for one row without a state, token by token, its gradients by autograd."""
    out, T = torch.zeros_like(q), q.shape[2]
    for h in range(q.shape[1]):
        scale, shift, first = (mixer.by_head(x)[h, 0] for x in (mixer.scale, mixer.shift, mixer.b))
        for t in range(T):
            if new[0, t]:
                W, b = mixer.W[h], first
                anchor = W, b
            elif t % mixer.batch == 0:
                anchor = W, b
            theta = [x.detach().requires_grad_() if not x.requires_grad else x for x in anchor]
            told = nn.functional.layer_norm(k[0, h, t] @ theta[0] + theta[1], (mixer.K,), scale, shift, 1e-6)
            loss = (k[0, h, t] + told - v[0, h, t]).square().sum() / 2
            gradients = torch.autograd.grad(loss, theta, create_graph=True)
            W, b = (x - eta[0, h, t] * g for x, g in zip((W, b), gradients, strict=True))
            read = nn.functional.layer_norm(q[0, h, t] @ W + b, (mixer.K,), scale, shift, 1e-6)
            out[0, h, t] = q[0, h, t] + read
    return out


class LaCT(Mixer):
    """A SwiGLU MLP f as fast weights beside a window; after a chunk W' = |W0| unit(W + sum eta_t d(f(k_t) v_t)).

    ``unit`` and the norms are those of columns. Every token reads the weights of before its chunk; what its chunk holds
    it sees through the window, whose queries, keys and values both parts share.
    """

    def __init__(self, config: Any, layer: int, chunk: int = 512, inner: int = 48, lr: float = 0.01) -> None:
        from transformers.models.mistral.modeling_mistral import MistralAttention

        super().__init__(config, layer)
        self.attention = MistralAttention(config, layer)
        self.K, self.chunk, self.lr = self.width // self.heads, chunk, lr
        self.eta, self.norm = nn.Linear(self.width, 3 * self.heads), HeadNorm(self.heads, self.K)
        self.W1, self.W3 = (nn.Parameter(torch.randn(self.heads, self.K, inner) * self.K**-0.5) for _ in range(2))
        self.W2 = nn.Parameter(torch.randn(self.heads, inner, self.K) * inner**-0.5)
        self.o = self.linear(self.width)
        self.shared: list[Tensor] = []
        for project in (self.attention.q_proj, self.attention.k_proj, self.attention.v_proj):
            # A copy: some rotary embeddings turn what attention gets in place.
            project.register_forward_hook(lambda _, __, out: self.shared.append(out.clone()))

    def forward(self, hidden_states: Tensor, position_ids: Tensor | None = None, **given: Any) -> tuple[Tensor, None]:
        B, T, _ = hidden_states.shape
        cache = given.get("cache") if given.get("cache") is not None else given.get("past_key_values")
        state = {}
        self.shared.clear()
        if cache is not None and cache.get_seq_length(self.layer):
            state = cache.layers[self.layer].__dict__.get("peer", {})
        seen, _ = self.attention(hidden_states, position_ids=position_ids, **given)
        if position_ids is None:
            position_ids = torch.arange(T, device=hidden_states.device)[None]
        out, left = self.mix(hidden_states, position_ids.expand(B, T), state, position_ids)
        if cache is not None:
            cache.layers[self.layer].peer = left
        return seen + out, None

    def flops(self) -> float:
        return float(18 * self.W1.numel())

    def mix(self, x: Tensor, positions: Tensor, state: dict[str, Any], ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
        found = []
        for projected in self.shared:
            y = silu(precise(projected)).unflatten(-1, (-1, self.K)).transpose(1, 2)
            found.append(y.repeat_interleave(self.heads // y.shape[1], 1))
        q, k = (normalize(y, dim=-1) for y in found[:2])
        eta = self.lr * softplus(precise(self.eta(x))).unflatten(-1, (3, self.heads)).permute(2, 0, 3, 1)[..., None]
        with torch.autocast(x.device.type, enabled=False):
            out, left = self.learn(q, k, found[2], eta, starts(positions, bool(state)), state)
        self.shared.clear()
        return self.o(self.norm(out.transpose(1, 2)).flatten(-2).to(x.dtype)), left

    def learn(
        self, q: Tensor, k: Tensor, v: Tensor, eta: Tensor, new: Tensor, state: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """Outputs [B, H, T, K] of q, k, v and steps eta [3, B, H, T, 1]; new [B, T] begins a document."""
        W0 = tuple(W.expand(len(q), -1, -1, -1).contiguous() for W in (self.W1, self.W2, self.W3))
        W, held = (state["W"], state["held"]) if state else (W0, None)
        document = new.cumsum(1)
        document = document - document[:, :1] * (0 if state else 1)
        if self.is_replayed(q, state, self.chunk):
            steps = lambda q, k, v, eta, document, *W0: self.walk(q, k, v, eta, document, W0, W0, None)[0]  # noqa: E731
            return self.replayed(steps, q, k, v, eta, document, *W0), {}
        out, W, held = self.walk(q, k, v, eta, document, W, W0, held)
        if held is not None:  # numbers of documents count from the last one, with which the next call continues
            held = (*held[:4], held[4] - document[:, None, -1:, None])
        return out, {"W": W, "held": held}

    def walk(
        self, q: Tensor, k: Tensor, v: Tensor, eta: Tensor, document: Tensor, W: Any, W0: Any, held: Any
    ) -> tuple[Tensor, Any, Any]:
        """Outputs chunk by chunk, the weights after the last whole one, and what is held of the one after it."""
        out, at = [], 0
        while at < q.shape[2]:
            room = self.chunk - (0 if held is None else held[0].shape[2])
            part = slice(at, at + room)
            fresh = (document[:, part] > document[:, at - 1 : at] if at else document[:, part] > 0)[:, None, :, None]
            out.append(torch.where(fresh, swiglu(q[:, :, part], W0), swiglu(q[:, :, part], W)))
            given = (k[:, :, part], v[:, :, part], eta[:, :, :, part], fresh.expand_as(k[:, :, part, :1]))
            given += (document[:, None, part, None].expand_as(given[3]),)
            held = given if held is None else tuple(torch.cat(pair, -2) for pair in zip(held, given, strict=True))
            at += room
            if held[0].shape[2] == self.chunk:
                W, held = self.update(W, W0, *held), None
        return torch.cat(out, 2), W, held

    def update(self, W: Any, W0: Any, k: Tensor, v: Tensor, eta: Tensor, fresh: Tensor, document: Tensor) -> Any:
        """The weights after a chunk, of the document that its last token is in."""
        begins = fresh[:, :, -1:]
        W1, W2, W3 = (torch.where(begins, old, now) for old, now in zip(W0, W, strict=True))
        eta = torch.where(document == document[:, :, -1:], eta, 0)
        a, b = k @ W1, k @ W3
        sigma = a.sigmoid()
        back = v @ W2.mT
        steps = (
            k.mT @ (eta[0] * back * b * sigma * (1 + a * (1 - sigma))),
            (a * sigma * b).mT @ (eta[1] * v),
            k.mT @ (eta[2] * back * a * sigma),
        )
        sizes = [old.norm(dim=-2, keepdim=True) for old in W0]
        return tuple(size * normalize(w + d, dim=-2) for size, w, d in zip(sizes, (W1, W2, W3), steps, strict=True))


def swiglu(x: Tensor, W: Any) -> Tensor:
    return (silu(x @ W[0]) * (x @ W[2])) @ W[1]


def lact_reference(mixer: LaCT, q: Tensor, k: Tensor, v: Tensor, eta: Tensor, new: Tensor) -> Tensor:
    """Compute `LaCT.learn` for one row without a state, token by token, its gradients by autograd."""
    out = torch.zeros_like(q)
    for h in range(q.shape[1]):
        first = W = [X[h] for X in (mixer.W1, mixer.W2, mixer.W3)]
        told: list[int] = []
        for t in range(q.shape[2]):
            if new[0, t]:
                W, told = first, []
            out[0, h, t] = swiglu(q[0, h, t], W)
            told.append(t)
            if (t + 1) % mixer.chunk == 0:
                theta = [x if x.requires_grad else x.detach().requires_grad_() for x in W]
                moved = []
                for i in range(3):  # every matrix has steps of its own
                    goal = sum(eta[i, 0, h, s, 0] * (swiglu(k[0, h, s], theta) * v[0, h, s]).sum() for s in told)
                    (gradient,) = torch.autograd.grad(goal, theta[i], create_graph=True)  # type: ignore[arg-type]
                    moved.append(theta[i] + gradient)
                sizes = [x.norm(dim=0) for x in first]
                W, told = [n * x / x.norm(dim=0) for n, x in zip(sizes, moved, strict=True)], []
    return out


# -- models ------------------------------------------------------------------------------------------------------------

MIXERS: dict[str, Any] = {
    "gla": GatedLinear, "mamba2": Mamba2, "deltanet": Delta,
    "gated_deltanet": lambda config, layer, **options: Delta(config, layer, gated=True, **options),
    "ttt_linear": TTTLinear, "lact": LaCT,
}  # fmt: skip


class PeerConfig(MistralConfig):
    """A Mistral's settings; ``mixer`` by name with its ``mixer_options``, in ``mixer_layers`` (a slice)."""

    model_type = "peer"

    mixer: str = "gla"
    mixer_layers: str = ":"
    mixer_options: dict[str, Any] | None = None


class PeerForCausalLM(MistralForCausalLM):
    """A Mistral with mixers in the place of attention."""

    config_class = PeerConfig

    def __init__(self, config: PeerConfig) -> None:
        super().__init__(config)
        if config.mixer not in MIXERS:
            raise UserError(f"mixer must be one of {', '.join(MIXERS)}, got {config.mixer!r}")
        for i in InPlaceTTTConfig(layers=config.mixer_layers).layer_indices(config.num_hidden_layers):
            try:
                self.model.layers[i].self_attn = MIXERS[config.mixer](config, i, **(config.mixer_options or {}))
            except TypeError as error:
                raise UserError(f"mixer_options of {config.mixer}: {error}") from None
        self.post_init()


AutoConfig.register("peer", PeerConfig, exist_ok=True)
AutoModelForCausalLM.register(PeerConfig, PeerForCausalLM, exist_ok=True)
with suppress(ImportError):  # a recipe's `liger: true`: norms, MLPs and rotary embeddings are a Mistral's
    from liger_kernel.transformers import monkey_patch

    monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN["peer"] = monkey_patch.apply_liger_kernel_to_mistral


# -- what they cost ----------------------------------------------------------------------------------------------------

KERNEL_CHUNK = 64
"""Tokens of a chunk in flash-linear-attention's kernels."""


def cost(model: Any, length: int) -> tuple[int, float]:
    """Parameters, and FLOPs of a trained token in rows of ``length``: forward and twice as much backward.

    Of fast weights of In-Place TTT as `inplace_ttt.train.plan` counts them. Convolutions, norms and gates are left out.
    """
    products, other = 0, 0.0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            products += 2 * module.weight.numel()
        elif isinstance(module, Mixer):
            other += module.flops()
        elif type(module).__name__ == "MistralAttention":
            window = module.config.sliding_window
            seen = length / 2 if not window or window >= length else window
            other += 4 * seen * module.config.num_attention_heads * module.head_dim
    scan = 8 * sum(math.prod(layer.shape) for layer in adapting_layers(model)) if is_attached(model) else 0
    return model.num_parameters(), 3 * (products + other) + scan
