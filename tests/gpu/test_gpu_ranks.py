"""Context parallelism over NCCL on two GPUs, with the attention kernels that a CPU does not have."""

import pytest
import torch
from spawn import run_ranks


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["gather", "torch"])
def test_slices_on_two_gpus_equal_one_process(attention: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for found in run_ranks("device_ranks", "everything", 2, "cuda", [attention], backend="nccl"):
        exact, half = found[f"{attention} None"], found[f"{attention} torch.bfloat16"]
        assert exact["loss"] < 1e-4
        assert exact["gradients"] < 1e-3
        assert half["loss"] < 3e-2
        assert half["gradients"] < 8e-2
