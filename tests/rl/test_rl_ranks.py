"""Two processes train like one: groups lie across them, and completions have other lengths on each."""

import pytest
import torch
from rl.rl_ranks import train
from spawn import run_ranks


@pytest.mark.parametrize("attached", [False, True])
def test_two_processes_equal_one(tmp_path, attached):
    parameters, log, advantages = train(str(tmp_path / "one"), 1, attached)
    for other, other_log, other_advantages in run_ranks("rl.rl_ranks", "run", 2, str(tmp_path), attached):
        assert other_advantages == pytest.approx(advantages, rel=1e-5)
        for a, b in zip(log, other_log, strict=True):
            for name in ("reward", "grad_norm", *(n for n in a if n.startswith("otb/"))):
                assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-6), name
        for name, parameter in parameters.items():
            torch.testing.assert_close(other[name], parameter, rtol=1e-4, atol=1e-6, msg=name)
