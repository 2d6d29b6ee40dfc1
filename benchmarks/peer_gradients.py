"""Check of flash-linear-attention's kernels and their gradients on this GPU: against float32, token by token.

    python benchmarks/peer_gradients.py [--tokens 512] [--out FILE.json]

The (Gated) DeltaNet backward of some versions was wrong on Hopper, so this goes before every training of the peers.
Queries, keys, values are rounded to bf16 first, so that both sides get the same numbers. Rows of several documents are
read without an initial state, whole ones with one. Ends with status 1 where an output or a gradient is off by more than
``LIMIT`` of its norm. TTT-Linear and LaCT, whose kernels are PyTorch's own products, are compared with autograd's
gradients token by token, in float32 with products in TF32, as they are trained. FILE has what is compared so far: GLA
takes minutes to compile.
"""

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from peers import MIXERS, PeerConfig, fast_recurrence, lact_reference, recurrence, ttt_linear_reference
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from inplace_ttt.records import about, write_json

LIMIT = 0.02
SHAPES = {
    "gla": (2, 4, 64, 128),
    "mamba2": (2, 8, 64, 64),
    "deltanet": (2, 4, 64, 64),
    "gated_deltanet": (2, 4, 64, 128),
}
"""Rows, heads, widths of keys and values: the heads of replica.yaml."""
LEARNED = ("ttt_linear", "lact")


def is_right(errors: dict[str, float]) -> bool:
    return bool(errors) and max(errors.values()) < LIMIT


def inputs(kind: str, tokens: int, device: str) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(device)  # noqa: E731
    B, H, K, V = SHAPES[kind]
    q, k, v = draw(B, tokens, H, K), draw(B, tokens, H, K), draw(B, tokens, H, V)
    decay = {"gla": draw(B, tokens, H, K), "mamba2": draw(B, tokens, H), "gated_deltanet": draw(B, tokens, H)}.get(kind)
    beta = draw(B, tokens, H).sigmoid().bfloat16().float() if "delta" in kind else None
    found = {"q": q * K**-0.5, "k": normalize(k, dim=-1), "v": v}
    rounded: dict[str, Tensor | None] = {name: x.bfloat16().float().requires_grad_() for name, x in found.items()}
    rounded["decay"] = None if decay is None else (logsigmoid(decay) / 4).requires_grad_()
    rounded["beta"] = None if beta is None else beta.requires_grad_()
    return rounded


def compare(kind: str, tokens: int, packed: bool, device: str = "cuda") -> dict[str, float]:
    """The error of outputs, state and every gradient, relative to its norm."""
    given = inputs(kind, tokens, device)
    B, H, K, V = SHAPES[kind]
    cuts = [0, tokens // 3, tokens // 2] if packed else [0]
    bounds = torch.tensor([b * tokens + c for b in range(B) for c in cuts] + [B * tokens], device=device)
    new = torch.zeros(B, tokens, dtype=torch.bool, device=device)
    new[:, cuts] = True
    state = None if packed else (torch.randn(B, H, K, V, generator=torch.Generator().manual_seed(1)) * 0.1).to(device)
    given["state"] = None if state is None else state.requires_grad_()
    new[:, 0] = state is None
    weights = torch.randn(B, tokens, H, V, generator=torch.Generator().manual_seed(2)).to(device)
    results: list[list[Tensor]] = []
    for way, where in ((fast_recurrence, bounds.int()), (recurrence, new)):
        out, last = way(*(given[n] for n in ("q", "k", "v", "decay", "beta", "state")), where)  # type: ignore[arg-type]
        loss = (out.float() * weights).sum() + last.float().sum()
        trained = [x for x in given.values() if x is not None]
        results.append([out, last, *torch.autograd.grad(loss, trained)])
    names = ["out", "last", *(f"d{name}" for name, x in given.items() if x is not None)]
    return {
        name: float(((a.float() - b.float()).norm() / b.float().norm()).detach())
        for name, a, b in zip(names, *results, strict=True)
    }


def compare_learned(kind: str, device: str = "cuda") -> dict[str, float]:
    """The error of the outputs and every gradient of a mixer that learns by steps; one row of three documents."""
    torch.manual_seed(0)
    T, options = 64, {"ttt_linear": {"batch": 16}, "lact": {"chunk": 16, "inner": 24, "lr": 0.1}}[kind]
    config = PeerConfig(hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32, vocab_size=8)
    layer = MIXERS[kind](config, 0, **options).to(device)
    given = [torch.randn(1, 2, T, 32, device=device).requires_grad_() for _ in range(3)]
    eta = torch.rand((3, 1, 2, T, 1) if kind == "lact" else (1, 2, T, 1), device=device).requires_grad_()
    new = torch.zeros(1, T, dtype=torch.bool, device=device)
    new[0, [0, 20, 27]] = True
    weights, trained = torch.randn(1, 2, T, 32, device=device), [*given, eta]
    trained += [x for name, x in layer.named_parameters() if name in ("W", "b", "scale", "shift", "W1", "W2", "W3")]
    expected = (lact_reference(layer, *given, eta, new) if kind == "lact"
                else ttt_linear_reference(layer, *given, eta[..., 0], new))  # fmt: skip
    outputs = (layer.learn(*given, eta, new, {})[0], expected)
    found, right = ([out, *torch.autograd.grad((out * weights).sum(), trained)] for out in outputs)
    names = ["out", "dq", "dk", "dv", "deta", *(f"dW{i}" for i in range(len(trained) - 4))]
    return {name: float(((a - b).norm() / b.norm()).detach()) for name, a, b in zip(names, found, right, strict=True)}


def check(kind: str, packed: bool, tokens: int) -> tuple[str, dict[str, float]]:
    """A case of a mixer, and its errors; none where it failed."""
    learned = kind in LEARNED
    torch.set_float32_matmul_precision("high" if learned else "highest")
    name, errors = kind if learned else f"{kind}, {'packed' if packed else 'with a state'}", {}
    try:
        errors = compare_learned(kind) if learned else compare(kind, tokens, packed)
    except Exception as error:  # some refuse versions of Triton
        print(f"{name}: FAILED, {error}", flush=True)
    else:
        verdict = "ok" if is_right(errors) else "WRONG"
        print(f"{name}: {verdict}", {n: round(x, 5) for n, x in errors.items()}, flush=True)
    return name, errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    found: dict[str, Any] = {}
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:  # what takes long is compiling
        cases = [(kind, packed) for kind in SHAPES for packed in (True, False)] + [(kind, True) for kind in LEARNED]
        for done in as_completed([pool.submit(check, *case, given.tokens) for case in cases]):
            found |= dict([done.result()])
            if given.out:
                write_json(given.out, {"limit": LIMIT, "errors": found, **about()})
    sys.exit(not all(map(is_right, found.values())))


if __name__ == "__main__":
    main()
