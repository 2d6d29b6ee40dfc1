"""The Triton walk against the PyTorch one: on a CUDA device, or in Triton's interpreter (TRITON_INTERPRET=1)."""

import os

import pytest
import torch

from inplace_ttt.fast import has_triton
from inplace_ttt.fast.walk import walk as plain

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if not has_triton() or (DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"):
    pytest.skip("needs Triton and a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

from inplace_ttt.fast.triton_walk import walk  # noqa: E402

TILES = {"BM": 32, "BN": 32, "BK": 32, "num_warps": 4, "num_stages": 2}


def tensors(B, n, c, D, F, dtype, given=None):
    def make(*shape):
        return torch.randn(*shape, device=DEVICE, dtype=dtype)

    whole = given or n
    x, z = make(B, whole * c + 5, D)[:, 2 : 2 + whole * c], make(B, whole * c + 5, F)[:, 3 : 3 + whole * c]
    S = torch.randn(B, D, F, device=DEVICE)
    return x.unflatten(1, (whole, c)), z.unflatten(1, (whole, c)), S, make(D, F)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16] if DEVICE == "cuda" else [torch.float16])
@pytest.mark.parametrize(
    ("mode", "flags"), [(m, f) for m in ("forward", "reverse") for f in (False, True)] + [("unwind", False)]
)
@pytest.mark.parametrize(("B", "n", "c", "D", "F"), [(1, 3, 64, 64, 96), (2, 4, 40, 48, 72), (1, 1, 7, 32, 33)])
@pytest.mark.parametrize("begins", [True, False])
def test_equals_the_plain_walk(begins, dtype, mode, flags, B, n, c, D, F):
    torch.manual_seed(0)
    updates = n if mode == "forward" else max(n - 1, 0)
    x, z, S, W = tensors(B, n, c, D, F, dtype)
    update = torch.rand(B, n, device=DEVICE) < 0.6 if flags else None
    reset = torch.rand(B, n, device=DEVICE) < 0.3 if flags else None
    keep = 0.9 if flags else 1.0
    found, begin = [], S if begins else None
    for run, more in ((plain, {}), (walk, TILES)):
        state, folds = torch.full_like(S, torch.nan), torch.full((B, n, D, F), torch.nan, dtype=dtype, device=DEVICE)
        run(state, begin, folds, (x, z), W, update, reset, 0.3, keep, updates, mode=mode, **more)
        found.append((state, folds))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found[1][1].float(), found[0][1].float(), rtol=8e-3, atol=8e-3)


@pytest.mark.parametrize("updates", [0, 1])
def test_slots_that_only_look(updates):
    x, z, S, W = tensors(2, 3, 32, 32, 64, torch.float16, given=max(updates, 1))
    found = []
    for run, more in ((plain, {}), (walk, TILES)):
        state, folds = S.clone(), torch.full((2, 3, 32, 64), torch.nan, dtype=torch.float16, device=DEVICE)
        run(state, state, folds, (x, z) if updates else None, W, None, None, 0.3, 1.0, updates, **more)
        found.append((state, folds))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=8e-3, atol=8e-3)
