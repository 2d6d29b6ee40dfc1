"""The scan over ranks equals the reference on whole rows (float64), and what it sends does not grow with the ranks."""

from typing import Any

import pytest
from spawn import run_ranks

CASES: list[tuple[bool, str, float, float | None]] = [
    (True, "one", 0.0, None),
    (False, "one", 0.0, None),
    (True, "one", 0.1, None),
    (False, "one", 0.1, 2.0),
    (True, "packed", 0.0, None),
    (False, "packed", 0.1, 2.0),
    (True, "short", 0.1, None),
    (False, "short", 0.0, None),
    (True, "padded", 0.0, 2.0),
]
RANKS = (2, 4)


@pytest.fixture
def results(once: Any) -> Any:
    def get(ranks: int) -> Any:
        cases = CASES if ranks < 8 else []
        return once(f"scan{ranks}", lambda _: run_ranks("scan_ranks", "everything", ranks, cases))

    return get


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{'headtail' if c[0] else 'contiguous'}-{c[1]}-{c[2]}-{c[3]}")
def test_equals_the_reference(ranks: int, case: Any, results: Any) -> None:
    for result in results(ranks):
        assert max(result["worst"][case]) < 1e-10


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("head_tail", [True, False])
def test_boundaries_inside_a_chunk_are_refused_with_the_fix(ranks: int, head_tail: bool, results: Any) -> None:
    pieces = ranks * (2 if head_tail else 1)
    for result in results(ranks):  # on every rank: none waits for the others
        length, document, uneven = result["refusals"][head_tail]
        assert f"multiple of {pieces * 4:,} tokens" in length
        assert "begin documents" in document
        assert "chunk_size 4" in document
        assert "cannot be cut" in uneven


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("head_tail", [True, False])
def test_bytes_sent_do_not_grow_with_the_ranks(ranks: int, head_tail: bool, results: Any) -> None:
    """2 * D * F numbers per piece and row, forward and again backward, less the share that stays on the rank."""
    rows, D, F = 2, 16, 32
    numbers = 2 * rows * (2 if head_tail else 1) * D * F
    for result in results(ranks):
        sent = result["traffic"][head_tail]
        assert sent["forward"] == 4 * numbers * (ranks - 1) // ranks
        assert sent["both"] == 2 * sent["forward"]
