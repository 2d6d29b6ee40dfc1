"""Whether flash-linear-attention's kernels and their gradients are right on this GPU: against float32, token by token.

    python benchmarks/peer_gradients.py [--tokens 512] [--out FILE.json]

The (Gated) DeltaNet backward of some versions was wrong on Hopper, so this goes before every training of the peers.
Queries, keys, values are rounded to bf16 first, so that both sides get the same numbers. Rows of several documents are
read without an initial state, whole ones with one. Ends with status 1 where an output or a gradient is off by more than
``LIMIT`` of its norm.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from peers import fast_recurrence, recurrence
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from inplace_ttt.records import about, write_json

LIMIT = 0.02


def inputs(kind: str, tokens: int, device: str) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(device)  # noqa: E731
    B, H, K, V = 2, 3, 32, 64
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
    B = 2
    cuts = [0, tokens // 3, tokens // 2] if packed else [0]
    bounds = torch.tensor([b * tokens + c for b in range(B) for c in cuts] + [B * tokens], device=device)
    new = torch.zeros(B, tokens, dtype=torch.bool, device=device)
    new[:, cuts] = True
    state = None if packed else (torch.randn(B, 3, 32, 64, generator=torch.Generator().manual_seed(1)) * 0.1).to(device)
    given["state"] = None if state is None else state.requires_grad_()
    new[:, 0] = state is None
    weights = torch.randn(B, tokens, 3, 64, generator=torch.Generator().manual_seed(2)).to(device)
    results: list[list[Tensor]] = []
    for way, where in ((fast_recurrence, bounds.int()), (recurrence, new)):
        out, last = way(*(given[n] for n in ("q", "k", "v", "decay", "beta", "state")), where)  # type: ignore[arg-type]
        loss = (out.float() * weights).sum() + last.float().sum()
        trained = [x for x in given.values() if x is not None]
        results.append([out, last, *torch.autograd.grad(loss, trained)])
    names = ["out", "last", *(f"d{name}" for name, x in given.items() if x is not None)]
    return {
        name: float((a.float() - b.float()).norm() / b.float().norm())
        for name, a, b in zip(names, *results, strict=True)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    found: dict[str, Any] = {}
    for kind in ("gla", "mamba2", "deltanet", "gated_deltanet"):
        for packed in (True, False):
            errors = compare(kind, given.tokens, packed)
            found[f"{kind}, {'packed' if packed else 'with a state'}"] = errors
            verdict = "ok" if max(errors.values()) < LIMIT else "WRONG"
            print(f"{kind:15} packed={packed}: {verdict}", {n: round(x, 5) for n, x in errors.items()}, flush=True)
    if given.out:
        write_json(given.out, {"limit": LIMIT, "errors": found, **about()})
    sys.exit(any(not max(errors.values()) < LIMIT for errors in found.values()))


if __name__ == "__main__":
    main()
