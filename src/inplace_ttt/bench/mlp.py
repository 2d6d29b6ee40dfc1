"""One gated MLP block: forward, and forward + backward, with peak memory.

Shapes: T tokens, D hidden, F intermediate, C chunk, M chunks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from ..core import ChunkTable
from ..core.targets import convolve, convolved
from ..errors import UserError
from ..fast import scan
from . import SHAPES
from .materialised import product as formula
from .timing import measured, rates

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
        self.slow, self.g = [self.x, self.gate, self.up, self.down], torch.randn_like(self.x, requires_grad=False)

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
        return formula(z, v[:-1].flatten(0, 1)[None], self.down, C, LR)[0]

    def runs(self, C: int, backward: bool) -> dict[str, Callable[[], Any]]:
        """Return the block's three forms by name: forward, or forward and the gradients of all inputs."""
        fast = [*self.slow, self.kappa, self.proj, self.u]
        forms: dict[str, tuple[Callable[[], Tensor], list[Tensor]]] = {
            "no TTT": (self.plain, self.slow),
            "ours": (partial(self.ours, C), fast),
            "materialised": (partial(self.materialised, C), fast),
        }
        if not backward:
            return {name: forward for name, (forward, _) in forms.items()}

        def step(forward: Callable[[], Tensor], inputs: list[Tensor]) -> Any:
            return torch.autograd.grad(forward(), inputs, self.g)

        return {name: partial(step, *form) for name, form in forms.items()}


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

    def outcomes(x: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
        layers: dict[str, tuple[Callable[..., Tensor], list[str], str]] = {
            "plain": (linear, ["z", "weight"], "g"),
            "scan": (lambda z, v, W: scan(z, v, W, table, lr=LR, backend=backend)[0], ["z", "v", "weight"], "g"),
            "target": (lambda u, kappa, proj: target(u, kappa, proj, table), ["u", "kappa", "proj"], "v"),
        }
        found = {}
        for name, (run, inputs, g) in layers.items():
            used = [x[i].detach().requires_grad_() for i in inputs]
            out = run(*used)
            gradients = torch.autograd.grad(out, used, x[g])
            found[f"{name}: output"] = out.detach()
            found |= {f"{name}: gradient of {i}": grad for i, grad in zip(inputs, gradients, strict=True)}
        return found

    exact = outcomes({name: x.double() for name, x in half.items()}, "torch")
    found = {name: relative(x, exact[name]) for name, x in outcomes(half, "auto").items()}
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
    shape: str, lengths: list[int], chunks: list[int], device: torch.device, dtype: torch.dtype,
    *, rounds: int, log: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """Measure everything about the block, JSON-ready; seconds are medians of interleaved runs.

    UserError for a length that is not a multiple, at least twofold, of every chunk size.
    """
    size = Shape(SHAPES[shape]["hidden_size"], SHAPES[shape]["intermediate_size"], *lengths)
    if any(size.tokens % C or size.tokens < 2 * C for C in chunks):
        raise UserError(f"--tokens {size.tokens}: take a multiple, at least twofold, of every chunk size")
    found: dict[str, Any] = {"shape": vars(size), "dtype": str(dtype), "errors": {}, "results": []}
    for C in chunks:
        found["errors"][str(C)] = check(size, C, device, dtype)
        worst = [f"{max(ratios.values()):.2f}" for ratios in found["errors"][str(C)].values()]
        log(
            f"C {C}: largest error over a plain layer's {' and '.join(worst)}, "
            f"the fast part {' and '.join(map(str, SHARES))} of the slow one"
        )
    found["rates"] = rates(device, dtype, size.tokens, size.intermediate, size.hidden)
    block = Block(size, device, dtype)
    for C, backward in product(chunks, (False, True)):
        runs = block.runs(C, backward)
        with torch.set_grad_enabled(backward):
            times, peaks = measured(runs, device, rounds=rounds, warmup=2)
        over = {name: t / times["no TTT"] for name, t in times.items()}
        row = {
            "chunk_size": C,
            "pass": "forward + backward" if backward else "forward",
            "seconds": times,
            "peak_bytes": peaks,
            "limit": limit(size, backward),
            "over_no_ttt": over,
        }
        found["results"].append(row)
        log(f"C {C}, {row['pass']}: ours {over['ours']:.3f}, materialised {over['materialised']:.3f}")
    return found


def table(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for row in record["results"]:
        ratio, peaks = row["over_no_ttt"], row["peak_bytes"]
        known = peaks["ours"] is not None
        memory = ", ".join(f"{peaks[k] / peaks['no TTT']:.2f}" for k in ("ours", "materialised")) if known else ""
        cells = [f"{row['seconds']['no TTT'] * 1000:.2f}", f"{ratio['ours']:.3f}", f"{ratio['materialised']:.3f}"]
        rows.append([str(row["chunk_size"]), row["pass"], *cells, f"{row['limit']:.2f}", memory])
    return ["chunk", "pass", "no TTT (ms)", "ours", "materialised", "limit", "peak memory: ours, materialised"], rows
