"""Backward keeps z, v and W0, not one weight per chunk."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from inplace_ttt.core import ChunkTable
from inplace_ttt.fast import scan

D, F, C = 128, 512, 64


def peak_bytes(run):
    """Largest number of bytes that ``run`` held at once beyond what was there before, from the allocator's own log."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as log:
        run()
    held = peak = 0
    events = [e for e in log.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def measure(chunks):
    """Peaks of forward and backward, plain and ours; the last chunk's targets are not needed."""
    T = chunks * C
    z = torch.randn(1, T, F, requires_grad=True)
    v = torch.randn(1, T - C, D, requires_grad=True)
    weight = torch.randn(D, F, requires_grad=True)
    g = torch.randn(1, T, D)

    def plain():
        torch.autograd.grad(torch.nn.functional.linear(z, weight), (z, weight), g)

    def ours():
        table = ChunkTable.build(1, T, C)
        out, _ = scan(z, v, weight, table, lr=0.1)
        torch.autograd.grad(out, (z, v, weight), g)

    return peak_bytes(plain), peak_bytes(ours)


def test_peak_memory_of_64_chunks_is_near_the_plain_layer():
    plain, ours = measure(64)
    assert plain > 64 * C * F * 4, "the profiler did not see the plain layer's gradient"
    assert ours <= 1.3 * plain, f"{ours / plain:.2f} times the plain layer"


@pytest.mark.parametrize("chunks", [16, 64])
def test_extra_memory_does_not_grow_by_a_weight_per_chunk(chunks):
    plain, ours = measure(chunks)
    targets = chunks * C * D * 4
    assert ours - plain <= 1.1 * targets + 6 * D * F * 4
