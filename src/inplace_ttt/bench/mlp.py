"""One gated MLP block: forward, and forward + backward, with peak memory.

Shapes: T tokens, D hidden, F intermediate, C chunk, M chunks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from ..core import ChunkTable
from ..core.targets import convolve, convolved
from ..errors import UserError
from ..fast import scan
from .materialised import product
from .timing import interleaved, peak_bytes, rates

LR, LOOKAHEAD, KERNEL = 0.1, 2, 5
SHARES = (0.3, 1.0)
"""Norms of the fast weights' output over the slow one's at which errors are measured; the first decides."""
WORSE = 1.5
"""Limit of our rounding error, over that of a plain linear layer."""


@dataclass(frozen=True)
class Shape:
    """Sizes of the block and of its input."""

    hidden: int
    intermediate: int
    tokens: int


class Block:
    """Weights of one block, its input, and the sources of its targets; all need gradients."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        def make(*size: int, scale: float) -> Tensor:
            return (scale * torch.randn(*size, device=device)).to(dtype).requires_grad_()

        torch.manual_seed(0)
        D, F = shape.hidden, shape.intermediate
        self.x, self.u = make(1, shape.tokens, D, scale=1.0), make(1, shape.tokens, D, scale=0.02)
        self.gate, self.up, self.down = make(F, D, scale=0.02), make(F, D, scale=0.02), make(D, F, scale=0.02)
        self.kappa, self.proj = make(D, KERNEL, scale=0.05), make(D, D, scale=0.02)
        self.slow = [self.x, self.gate, self.up, self.down]

    def z(self) -> Tensor:
        return silu(linear(self.x, self.gate)) * linear(self.x, self.up)

    def plain(self) -> Tensor:
        return linear(self.z(), self.down)

    def ours(self, C: int) -> Tensor:
        z = self.z()
        table = ChunkTable.build(1, z.shape[1], C)
        v = target(self.u, self.kappa, self.proj, table)
        return scan(z, v, self.down, table, lr=LR)[0]

    def materialised(self, C: int) -> Tensor:
        """Compute one weight per chunk in z's precision, by a cumulative sum, as the authors' release does."""
        z = self.z()
        u = self.u.view(-1, C, self.u.shape[2])
        v = convolve(u.float(), self.kappa.float(), LOOKAHEAD).to(z.dtype) @ self.proj
        return product(z, v[:-1].flatten(0, 1)[None], self.down, C, LR)[0]


def target(u_BTD: Tensor, kappa: Tensor, proj: Tensor, table: ChunkTable) -> Tensor:
    """Return the learned target's values [B, U * C, D] of the chunks that update."""
    n = table.updates * table.chunk_size
    c = convolved(u_BTD[:, :n].unflatten(1, (-1, table.chunk_size)), kappa, LOOKAHEAD, proj.dtype)
    return (c.to(proj.dtype) @ proj).flatten(1, 2)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


def errors(shape: Shape, C: int, device: torch.device, dtype: torch.dtype, share: float) -> dict[str, float]:
    """Return our errors against float64, values and all gradients, over those of a plain linear layer.

    The scan alone and the target alone, each as one layer. The targets are scaled so that in the last chunk the fast
    weights' output has ``share`` of the norm of the slow weight's.
    """
    D, F, T = shape.hidden, shape.intermediate, min(shape.tokens, 4 * C + C // 2)
    torch.manual_seed(1)
    half = {
        "z": torch.randn(1, T, F), "weight": 0.02 * torch.randn(D, F), "u": 0.02 * torch.randn(1, T, D),
        "kappa": 0.05 * torch.randn(D, KERNEL), "proj": 0.02 * torch.randn(D, D), "g": torch.randn(1, T, D),
    }  # fmt: skip
    half = {name: x.to(device, dtype) for name, x in half.items()}
    table = ChunkTable.build(1, T, C)
    with torch.no_grad():
        half["v"] = target(half["u"], half["kappa"], half["proj"], table)
        fast = scan(half["z"], half["v"], None, table, lr=LR)[0][:, -C:].norm()
        half["v"] *= share * linear(half["z"][:, -C:], half["weight"]).norm() / fast
    exact = {name: x.double() for name, x in half.items()}

    def layers(x: dict[str, Tensor]) -> Iterator[tuple[str, Callable[..., Any], list[str], Tensor]]:
        backend = "torch" if x is exact else "auto"
        yield "plain", lambda z, weight: linear(z, weight), ["z", "weight"], x["g"]
        yield (
            "scan",
            lambda z, v, weight: scan(z, v, weight, table, lr=LR, backend=backend)[0],
            ["z", "v", "weight"],
            x["g"],
        )
        yield (
            "target",
            lambda u, kappa, proj: target(u, kappa, proj, table),
            ["u", "kappa", "proj"],
            x["v"],
        )

    found = {}
    for (name, run, inputs, g), (_, again, _, g64) in zip(layers(half), layers(exact), strict=True):
        used, used64 = ([x[i].detach().requires_grad_() for i in inputs] for x in (half, exact))
        out, out64 = run(*used), again(*used64)
        pairs = zip(torch.autograd.grad(out, used, g), torch.autograd.grad(out64, used64, g64), strict=True)
        found[f"{name}: output"] = relative(out.detach(), out64.detach())
        found |= {f"{name}: gradient of {i}": relative(a, b) for i, (a, b) in zip(inputs, pairs, strict=True)}
    base = max(error for name, error in found.items() if name.startswith("plain"))
    floor = 1e-6 if dtype == torch.float32 else 0.0  # in float32, summation order matters more than rounding
    return {name: error / max(base, floor) for name, error in found.items() if not name.startswith("plain")}


def check(shape: Shape, C: int, device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Return ``errors`` by share. UserError where one is above ``WORSE``, or nan, with the first of ``SHARES``."""
    found = {str(share): errors(shape, C, device, dtype, share) for share in SHARES}
    wrong = [f"{name} {ratio:.2f}" for name, ratio in found[str(SHARES[0])].items() if not ratio <= WORSE]
    if wrong:
        too_large = f"errors over a plain layer's above {WORSE}: {', '.join(wrong)}"
        raise UserError(f"results are wrong, so no timings are shown: {too_large}")
    return found


def limit(shape: Shape, backward: bool) -> float:
    """Return the block's matrix products with TTT over those without: the cost of arithmetic alone."""
    proj = shape.hidden / shape.intermediate
    return (13 + 3 * proj) / 9 if backward else (4 + proj) / 3


def measure(
    shape: Shape,
    chunks: list[int],
    device: torch.device,
    dtype: torch.dtype,
    *,
    rounds: int,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Measure everything about the block, JSON-ready; seconds are medians of interleaved runs."""
    found: dict[str, Any] = {"shape": vars(shape), "dtype": str(dtype), "errors": {}, "results": []}
    for C in chunks:
        found["errors"][str(C)] = check(shape, C, device, dtype)
        worst = [f"{max(ratios.values()):.2f}" for ratios in found["errors"][str(C)].values()]
        log(
            f"C {C}: largest error over a plain layer's {' and '.join(worst)}, "
            f"the fast part {' and '.join(map(str, SHARES))} of the slow one"
        )
    found["rates"] = rates(device, dtype, shape.tokens, shape.intermediate, shape.hidden)
    block = Block(shape, device, dtype)
    g = torch.randn_like(block.x)

    def step(forward: Callable[[], Tensor], inputs: list[Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(forward(), inputs, g)

    for C in chunks:
        fast = [*block.slow, block.kappa, block.proj, block.u]
        for backward in (False, True):
            runs: dict[str, Callable[[], Any]] = {
                "no TTT": step(block.plain, block.slow) if backward else block.plain,
                "ours": step(lambda C=C: block.ours(C), fast) if backward else lambda C=C: block.ours(C),  # type: ignore[misc]
                "materialised": step(lambda C=C: block.materialised(C), fast)  # type: ignore[misc]
                if backward
                else lambda C=C: block.materialised(C),  # type: ignore[misc]
            }
            with torch.set_grad_enabled(backward):
                times = interleaved(runs, device, rounds=rounds)
                peaks = {name: peak_bytes(run, device) for name, run in runs.items()}
            found["results"].append(
                {
                    "chunk_size": C,
                    "pass": "forward + backward" if backward else "forward",
                    "seconds": times,
                    "peak_bytes": peaks,
                    "limit": limit(shape, backward),
                    "over_no_ttt": {name: t / times["no TTT"] for name, t in times.items()},
                }
            )
            row = found["results"][-1]["over_no_ttt"]
            log(
                f"C {C}, {found['results'][-1]['pass']}: ours {row['ours']:.3f}, materialised {row['materialised']:.3f}"
            )
    return found


def table(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows to print."""
    rows = []
    for row in record["results"]:
        ratio, peaks = row["over_no_ttt"], row["peak_bytes"]
        known = peaks["ours"] is not None
        memory = ", ".join(f"{peaks[k] / peaks['no TTT']:.2f}" for k in ("ours", "materialised")) if known else ""
        cells = [f"{row['seconds']['no TTT'] * 1000:.2f}", f"{ratio['ours']:.3f}", f"{ratio['materialised']:.3f}"]
        rows.append([str(row["chunk_size"]), row["pass"], *cells, f"{row['limit']:.2f}", memory])
    return ["chunk", "pass", "no TTT (ms)", "ours", "materialised", "limit", "peak memory: ours, materialised"], rows
