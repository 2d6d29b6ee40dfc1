"""Means over documents with intervals, and differences between variants that measured the same things."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .nll import RESAMPLES, Mean

Record = Mapping[str, Any]
DRAWN_AT_ONCE = 1 << 20
"""Resampled documents that are held at a time: a task can have ten thousand."""


def by_group(records: Sequence[Record], keys: Sequence[str]) -> dict[tuple[Any, ...], list[Record]]:
    """Records that agree in ``keys``, groups in order of first appearance."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record[key] for key in keys), []).append(record)
    return groups


def estimate(records: Sequence[Record], value: str, weight: str | None) -> Mean:
    """``sum(value) / sum(weight)`` (weight None: one each) and its 95% bootstrap interval over documents.

    One document alone has no interval: both ends are nan.
    """
    sums, weights = _sums(records, value, weight)
    return _interval(sums[None], weights[None])


def difference(a: Sequence[Record], b: Sequence[Record], value: str, weight: str | None) -> Mean:
    """Mean of ``a`` minus mean of ``b``, resampling the documents of both together.

    Raises ValueError when they are not about the same documents.
    """
    names_a, names_b = (sorted({r["document"] for r in records}) for records in (a, b))
    if names_a != names_b:
        raise ValueError("the two are about different documents")
    both = [_sums(records, value, weight, names_a) for records in (a, b)]
    sums, weights = (np.stack(parts) for parts in zip(*both, strict=True))
    return _interval(sums, weights)


def _sums(
    records: Sequence[Record], value: str, weight: str | None, names: Sequence[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Per document [N]: sum of values, sum of weights."""
    names = sorted({r["document"] for r in records}) if names is None else names
    place = {name: i for i, name in enumerate(names)}
    sums, weights = np.zeros(len(names)), np.zeros(len(names))
    for record in records:
        sums[place[record["document"]]] += record[value]
        weights[place[record["document"]]] += 1 if weight is None else record[weight]
    return sums, weights


def _interval(sums_VN: np.ndarray, weights_VN: np.ndarray, seed: int = 0) -> Mean:
    """Of the first variant's mean, or of the first minus the second."""

    def combine(means_V: np.ndarray) -> Any:
        return means_V[0] - means_V[1] if len(means_V) == 2 else means_V[0]

    count = sums_VN.shape[1]
    whole = combine(sums_VN.sum(1) / weights_VN.sum(1))
    if count < 2:
        return Mean(float(whole), float("nan"), float("nan"))
    generator, resampled, done = np.random.default_rng(seed), [], 0
    while done < RESAMPLES:
        some = min(RESAMPLES - done, max(1, DRAWN_AT_ONCE // count))
        drawn_RN = generator.integers(0, count, (some, count))
        with np.errstate(invalid="ignore", divide="ignore"):
            resampled.append(combine(sums_VN[:, drawn_RN].sum(-1) / weights_VN[:, drawn_RN].sum(-1)))
        done += some
    low, high = np.nanquantile(np.concatenate(resampled), [0.025, 0.975])
    return Mean(float(whole), float(low), float(high))
