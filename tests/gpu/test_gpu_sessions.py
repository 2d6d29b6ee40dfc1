"""Sessions on a GPU: the CPU's numbers, any split, files that move between the two, and a pool."""

import pytest
import torch
from contract.families import adapted
from session.models import TEXT, ids_of, tokenizer

from inplace_ttt import Session, SessionPool

pytestmark = pytest.mark.gpu

SMALL = {"window": 40, "sinks": 2, "decay": 0.01}


def model(family: str, device: str, dtype: torch.dtype = torch.float64):
    return adapted(family, dtype, {"vocab_size": len(tokenizer())}).to(device)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "glm"])
def test_equals_the_cpu_with_a_window_that_moves_on(family):
    sessions = [Session(model(family, device), tokenizer(), **SMALL) for device in ("cpu", "cuda")]
    for s in sessions:
        s.read(TEXT)
    torch.testing.assert_close(sessions[1].next_logits.cpu(), sessions[0].next_logits, rtol=1e-6, atol=1e-6)
    wrote = [s.generate(" the", max_new_tokens=20) for s in sessions]
    assert wrote[0] == wrote[1]


@pytest.mark.parametrize("state", ["dense", "auto", 8], ids=str)
def test_bfloat16_in_pieces(state):
    m, ids = model("llama", "cuda", torch.bfloat16), ids_of(TEXT)
    whole, pieces = (Session(m, state=state, **SMALL) for _ in range(2))
    losses = whole.read(ids, scored=True).losses
    parts = [loss for i in range(0, len(ids), 7) for loss in pieces.read(ids[i : i + 7], scored=True).losses]
    tolerance = 0.05 if state != 8 else 0.5  # a rank sees a call's own chunks in full
    assert abs(sum(losses) / len(losses) - sum(parts) / len(parts)) < tolerance
    assert whole.fast_weights[0].dense().dtype == torch.float32


def test_files_move_between_devices(tmp_path):
    there, here = (Session(model("llama", device), tokenizer(), **SMALL) for device in ("cuda", "cpu"))
    there.read(TEXT)
    there.save(tmp_path / "a.session")
    moved = Session.load(tmp_path / "a.session", here._reader.model, tokenizer())
    for s in (there, moved):
        s.read(TEXT)
    torch.testing.assert_close(moved.next_logits, there.next_logits.cpu(), rtol=1e-6, atol=1e-6)


def test_a_pool_writes_what_each_writes_alone():
    m = model("gemma3_text", "cuda")
    pool = SessionPool(m, tokenizer(), **SMALL)
    texts = [TEXT[:5], TEXT[:90], TEXT]
    expected = []
    for i, text in enumerate(texts):
        pool.open(f"{i}").read(text)
        alone = Session(m, tokenizer(), **SMALL)
        alone.read(text)
        expected.append(alone.generate(max_new_tokens=16))
    wrote = pool.generate([f"{i}" for i in range(3)], max_new_tokens=16)
    assert [wrote[f"{i}"] for i in range(3)] == expected
