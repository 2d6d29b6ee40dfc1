"""The fused convolution against the PyTorch one, values and gradients, on a CUDA device."""

import pytest
import torch
from method import target

from inplace_ttt.core import ChunkTable
from inplace_ttt.core.targets import convolve as plain

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("B", "M", "C", "D"), [(2, 2, 37, 50), (1, 2, 2100, 65)])
@pytest.mark.parametrize(("K", "lookahead"), [(5, 2), (4, 3)])
def test_equals_the_plain_convolution(dtype, B, M, C, D, K, lookahead):
    from inplace_ttt.fast.convolution import convolve

    torch.manual_seed(0)
    u = torch.randn(B, M * C + 4, D, device="cuda", dtype=dtype)[:, 3:-1].requires_grad_()
    kappa = torch.randn(D, K, device="cuda", dtype=dtype, requires_grad=True)
    exact = [x.detach().double().requires_grad_() for x in (u, kappa)]
    got = convolve(u, kappa, C, lookahead, dtype)
    want = plain(exact[0].reshape(B * M, C, D), exact[1], lookahead).view(B, M * C, D)
    g = torch.randn_like(want).to(dtype)
    grads = torch.autograd.grad(got, (u, kappa), g), torch.autograd.grad(want, exact, g.double())
    eps = 4 * torch.finfo(dtype).eps
    for a, b in zip((got, *grads[0]), (want, *grads[1]), strict=True):
        assert (a.double() - b).norm() <= eps * b.norm()


def test_target_takes_it_where_it_can():
    u, kappa, P = torch.randn(2, 70, 16), torch.randn(16, 5), torch.randn(16, 16)
    documents = torch.zeros(2, 70, dtype=torch.int64)
    documents[0, :9] = -1
    for docs in (None, documents):
        table = ChunkTable.build(2, 70, 8, documents=docs, keep_state=True)
        want = target(u, kappa, P, table)
        got = target(u.cuda(), kappa.cuda(), P.cuda(), table.to(torch.device("cuda", 0)))
        torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-4)


def test_same_from_run_to_run():
    u, kappa, P = (
        torch.randn(*s, device="cuda").bfloat16().requires_grad_() for s in ((1, 8192, 64), (64, 5), (64, 64))
    )
    table = ChunkTable.build(1, 8192, 64, keep_state=True)
    runs = []
    for _ in range(3):
        v = target(u, kappa, P, table)
        runs.append((v, *torch.autograd.grad(v.float().square().sum(), (u, kappa, P))))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
