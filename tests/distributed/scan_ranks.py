"""What the processes of test_scan_ranks.py do: the scan over slices against the reference on whole rows."""

from typing import Any

import torch
import torch.distributed as dist
from method import target
from torch import Tensor

from inplace_ttt.core import Sum, reference
from inplace_ttt.core.layer import written
from inplace_ttt.fast.ranks import Slices, SliceTable, exclusive_scan, scan_slice

C, D, F, K = 4, 6, 10, 5
LR = 0.3


def documents(name: str, T: int) -> Tensor | None:
    """[2, T]: ``one``: None; others end documents at and between slice boundaries. T is a multiple of 8 * C."""
    if name == "one":
        return None
    half = T // 2
    rows = {
        # a long document from 0, one that begins on a chunk and crosses boundaries; the other row: four equal ones
        "packed": ([half + C, T - half - C], [T // 4] * 4),
        # documents shorter than a chunk cross every boundary; a long one ends in a partial chunk
        "short": ([3] * (T // 3) + [T % 3] * (T % 3 > 0), [T - C - 3, 3, C]),
        # the whole row is one document of which the second row's end is padding
        "padded": ([T], [half + 2, -(T - half - 2)]),
    }[name]
    made = torch.empty(2, T, dtype=torch.int64)
    for b, lengths in enumerate(rows):
        numbers = [torch.full((abs(n),), -1 if n < 0 else i) for i, n in enumerate(lengths)]
        made[b] = torch.cat(numbers)
    return made


def inputs(T: int) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).requires_grad_()

    leaves = [draw(2, T, F), draw(2, T, D), draw(D, F), draw(D, K, scale=0.3), draw(D, D, scale=0.3)]
    return leaves, torch.randn(2, T, D, generator=generator, dtype=torch.float64)


def whole(T: int, docs: Tensor | None, decay: float, clip: float | None) -> list[Tensor]:
    """Outputs and the gradients of z, u, W0, kappa, P by the reference."""
    (z, u, weight, kappa, proj), g = inputs(T)
    out, _ = reference(z, u, weight, kappa, proj, lr=LR, chunk_size=C, documents_BT=docs, decay=decay, clip=clip)
    grads = torch.autograd.grad((out * g).sum(), (z, u, weight, kappa, proj))
    return [out.detach(), *grads]


def sliced(slices: Slices, T: int, docs: Tensor | None, decay: float, clip: float | None) -> list[Tensor]:
    """This rank's part of the same; gradients of the parameters are summed over the ranks."""
    (z, u, weight, kappa, proj), g = inputs(T)
    table = SliceTable.build(slices, 2, T, C, documents=docs, keep=1 - decay)
    mine = [slices.cut(x.detach()).requires_grad_() for x in (z, u)]
    R, t = table.table.rows, table.table.tokens
    z_R, u_R = (x.reshape(R, t, x.shape[-1]) for x in mine)
    v = target(u_R, kappa, proj, table.table)
    rule = Sum(lr=LR, decay=decay, clip=clip)
    v = None if v is None else written(rule, z_R, v, table.table, None, weight)
    out = scan_slice(z_R, v, table, dist.group.WORLD, rule=rule, width=D, weight=weight).view(2, -1, D)
    leaves = [*mine, weight, kappa, proj]
    grads = torch.autograd.grad((out * slices.cut(g)).sum(), leaves, allow_unused=True)
    grads = [torch.zeros_like(x) if grad is None else grad for grad, x in zip(grads, leaves, strict=True)]
    for grad in grads[2:]:
        dist.all_reduce(grad)
    return [out.detach(), *grads]


def compare(cases: list[tuple[bool, str, float, float | None]]) -> dict[Any, list[float]]:
    """Largest differences of outputs and gradients, by case."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    worst = {}
    for case in cases:
        head_tail, name, decay, clip = case
        slices, T = Slices(ranks, rank, head_tail), 16 * C
        docs = documents(name, T)
        expected = whole(T, docs, decay, clip)
        got = sliced(slices, T, docs, decay, clip)
        expected[:3] = [slices.cut(x) for x in expected[:3]]
        assert expected[4].abs().max() > 1e-3, "the updates of this case do nothing"
        worst[case] = [float((a - b).abs().max()) for a, b in zip(got, expected, strict=True)]
    return worst


def refusals(head_tail: bool) -> list[str]:
    """Messages for boundaries inside chunks."""
    slices, messages = Slices(dist.get_world_size(), dist.get_rank(), head_tail), []
    T = 16 * C
    packed = torch.zeros(1, T, dtype=torch.int64)
    packed[:, C // 2 :] = 1  # every chunk of the second document crosses the boundaries
    for tokens, docs in ((slices.pieces * (C + 1), None), (T, packed), (T + 1, None)):
        try:
            SliceTable.build(slices, 1, tokens, C, documents=docs, keep=1.0)
            messages.append("")
        except ValueError as error:
            messages.append(str(error))
    return messages


def traffic(rows: int, D: int, F: int, head_tail: bool) -> dict[str, int]:
    """Bytes that this rank sends to others in one forward and in its backward, by collective."""
    sent: dict[str, int] = {}
    rank, ranks = dist.get_rank(), dist.get_world_size()

    def count(name: str) -> Any:
        original = getattr(dist, name)

        def counted(out: Tensor, x: Tensor, received: Any = None, given: Any = None, **rest: Any) -> Any:
            own = given[rank] if given else x.numel() // ranks
            sent[name] = sent.get(name, 0) + (x.numel() - own) * x.element_size()
            return original(out, x, received, given, **rest) if given else original(out, x, **rest)

        return counted

    names = [n for n in ("all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor") if hasattr(dist, n)]
    originals = {name: getattr(dist, name) for name in names}
    for name in names:
        setattr(dist, name, count(name))
    for name in ("all_reduce", "broadcast", "all_gather", "send", "isend", "all_to_all", "batch_isend_irecv"):
        originals[name] = getattr(dist, name)

        def forbidden(*_: Any, name: str = name, **__: Any) -> None:
            raise AssertionError(f"unexpected {name}")

        setattr(dist, name, forbidden)
    try:
        slices = Slices(ranks, rank, head_tail)
        table = SliceTable.build(slices, rows, slices.pieces * C, C, documents=None, keep=1.0)
        totals = torch.randn(rows * slices.own, D, F).requires_grad_()
        states = exclusive_scan(totals, table, dist.group.WORLD)
        forward = dict(sent)
        states.sum().backward()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return {"forward": sum(forward.values()), "both": sum(sent.values())}


def everything(cases: list[tuple[bool, str, float, float | None]]) -> dict[str, Any]:
    both = (True, False)
    return {
        "worst": compare(cases),
        "refusals": {head_tail: refusals(head_tail) for head_tail in both},
        "traffic": {head_tail: traffic(2, 16, 32, head_tail) for head_tail in both},
    }
