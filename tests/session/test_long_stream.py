"""33,600 tokens of source code through the shipped model: flat memory, flat time, and never worse than without."""

import os
import statistics
import sysconfig
import time
from pathlib import Path

import pytest
import torch
from session.models import shipped, tokenizer

from inplace_ttt import Session

TOKENS, BLOCK = 33_600, 1_200


def resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def library() -> list[int]:
    ids: list[int] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        ids += tokenizer()(path.read_text(encoding="utf-8"), split_special_tokens=True, verbose=False)["input_ids"]
        if len(ids) >= TOKENS:
            break
    return ids[:TOKENS]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the process's memory from /proc")
def test_a_long_stream_is_flat_in_memory_and_time():
    ids = library()
    session = Session(shipped(torch.float32), tokenizer(), probe_every=1_680)
    seconds, memory, held = [], [], []
    for at in range(0, len(ids), BLOCK):
        start = time.process_time()
        session.read(ids[at : at + BLOCK])
        seconds.append(time.process_time() - start)
        memory.append(resident())
        held.append(session.stats().bytes_context + session.stats().bytes_fast_weights)
    assert session.stats().tokens == TOKENS
    quarter = len(seconds) // 4
    assert statistics.median(seconds[-quarter:]) < 1.4 * statistics.median(seconds[quarter : 2 * quarter])
    assert max(memory[quarter:]) - memory[quarter] < 60 << 20
    assert max(held[quarter:]) < 1.2 * max(held[:quarter])
    gains = session.timeline.gain
    assert len(gains) >= 18
    assert gains.mean() > 0.1
    assert gains[len(gains) // 2 :].mean() > 0.1  # twice the training length and no worse than at its beginning
    assert session.warning is None
