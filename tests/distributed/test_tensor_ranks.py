"""Tensor parallelism by transformers: the same logits, text, gradients and files as one process."""

from typing import Any

import pytest
from spawn import run_ranks

pytestmark = pytest.mark.xdist_group("processes")  # one launcher serves them all

FAMILIES = ["llama", "starcoder2"]


@pytest.fixture
def results(once: Any) -> Any:
    return once("tensor", lambda folder: run_ranks("tensor_ranks", "everything", 2, str(folder), FAMILIES))


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_one_process(family: str, results: Any) -> None:
    for result in results:
        found = result[family]
        assert found["identity"] == 0.0
        assert found["initial"], "the added parameters differ between processes"
        assert found["updates"] > 1e-2
        assert found["logits"] < 1e-6  # norms are taken in float32
        assert found["loaded"] < 1e-6
        assert found["generated"]
        assert found["beams"]
        assert max(found["gradients"].values()) < 1e-4
        assert found["saved"] == 0.0
        assert found["detached"] == 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_each_process_holds_its_share_of_the_state(family: str, results: Any) -> None:
    for result in results:
        (B, D, F), whole = result[family]["state"]
        assert whole == [B, D, 2 * F]


@pytest.mark.parametrize("family", FAMILIES)
def test_clipping_and_sessions_are_refused(family: str, results: Any) -> None:
    for result in results:
        assert "without tensor parallelism" in result[family]["session"]
        assert "tensor parallelism" in result[family]["clip"]
        assert "tensor parallelism" in result[family]["clip at attach"]
