"""Means over documents with 95% bootstrap intervals, and differences of readings of the same documents."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

Record = dict[str, Any]
RESAMPLES = 2000
DRAWN_AT_ONCE = 1 << 20
"""Maximum number of resampled documents in memory: a task can have ten thousand."""
ENOUGH = 8
"""Minimum number of documents for a verdict from a bootstrap interval."""
REFERENCE = "off"
"""The reference variant, if it was measured."""


@dataclass(frozen=True)
class Mean:
    """A mean (over tokens: in nats) and its 95% bootstrap interval over documents."""

    value: float
    low: float
    high: float


def bootstrap(sums_VN: np.ndarray, weights_VN: np.ndarray, seed: int = 0) -> Mean:
    """Return ``sum / sum of weights`` of one variant, or of the first minus the second, resampling N documents."""

    def combine(sums: np.ndarray, weights: np.ndarray) -> Any:
        with np.errstate(invalid="ignore", divide="ignore"):
            means_V = sums.sum(-1) / weights.sum(-1)
        return means_V[0] - means_V[1] if len(means_V) == 2 else means_V[0]

    count = sums_VN.shape[1]
    generator, resampled, done = np.random.default_rng(seed), [], 0
    while done < RESAMPLES:
        drawn_RN = generator.integers(0, count, (min(RESAMPLES - done, max(1, DRAWN_AT_ONCE // count)), count))
        resampled.append(combine(sums_VN[:, drawn_RN], weights_VN[:, drawn_RN]))
        done += len(drawn_RN)
    low, high = np.nanquantile(np.concatenate(resampled), [0.025, 0.975])
    return Mean(float(combine(sums_VN, weights_VN)), float(low), float(high))


def bootstrap_mean(values: np.ndarray, weights: np.ndarray, seed: int = 0) -> Mean:
    """Return the weighted mean of one value a document [N] and its 95% interval, resampling documents."""
    weights = np.asarray(weights, np.float64)
    return bootstrap((np.asarray(values, np.float64) * weights)[None], weights[None], seed)


def by_group(records: Sequence[Record], keys: Sequence[str]) -> dict[tuple[Any, ...], list[Record]]:
    """Group records that agree in ``keys``, in order of first appearance."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record[key] for key in keys), []).append(record)
    return groups


def estimate(records: Sequence[Record], value: str, weight: str | None) -> Mean:
    """Return ``sum(value) / sum(weight)`` (weight None: one each) and its 95% bootstrap interval over documents.

    A single document has no interval: both ends are nan.
    """
    return _over_documents([records], value, weight)


def difference(a: Sequence[Record], b: Sequence[Record], value: str, weight: str | None) -> Mean:
    """Return the mean of ``a`` minus the mean of ``b``, resampling the documents of both together.

    Raises ValueError when they are not about the same documents.
    """
    if {r["document"] for r in a} != {r["document"] for r in b}:
        raise ValueError("the two are about different documents")
    return _over_documents([a, b], value, weight)


def _over_documents(variants: Sequence[Sequence[Record]], value: str, weight: str | None) -> Mean:
    place = {name: i for i, name in enumerate(sorted({r["document"] for r in variants[0]}))}
    sums_VN, weights_VN = np.zeros((2, len(variants), len(place)))
    for sums, weights, records in zip(sums_VN, weights_VN, variants, strict=True):
        for record in records:
            sums[place[record["document"]]] += record[value]
            weights[place[record["document"]]] += 1 if weight is None else record[weight]
    found = bootstrap(sums_VN, weights_VN)
    return found if len(place) > 1 else Mean(found.value, float("nan"), float("nan"))


def means(
    records: Sequence[Record], keys: Sequence[str], value: str, weight: str | None = None, to: str = REFERENCE
) -> list[dict[str, Any]]:
    """Return a row per group and variant: the group, the mean, its interval, its difference to the variant ``to``."""
    rows = []
    for group, members in by_group(records, keys).items():
        variants = by_group(members, ["variant"])
        reference = variants.get((to,))
        for (label,), found in variants.items():
            row = {**dict(zip(keys, group, strict=True)), "variant": label, **asdict(estimate(found, value, weight))}
            row["documents"] = len({r["document"] for r in found})
            if reference is not None and label != to:
                gap = difference(found, reference, value, weight)
                row |= {"difference": gap.value, "difference_low": gap.low, "difference_high": gap.high}
            rows.append(row)
    return rows


def tables_of(
    suite: str, records: Sequence[Record], keys: Mapping[str, Sequence[str]], value: str, weight: str | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Return ``means`` of a suite's records by the name of each table, which ``keys`` maps to its groups."""
    mine = [r for r in records if r["suite"] == suite]
    return {name: means(mine, groups, value, weight) for name, groups in keys.items()} if mine else {}


def points(row: Record) -> str:
    """Say the share of right answers with updates, and what that is more than without, in percentage points."""
    gap, low, high = (100 * row[f"difference{end}"] for end in ("", "_low", "_high"))
    said = interval(low, high, "+.0f", row["documents"])
    return f"{row['value']:.0%} right with updates, {gap:+.0f} points ({said})"


def interval(low: float, high: float, form: str, documents: int) -> str:
    """Put an interval into words."""
    if np.isnan(low):
        return "from one document, so without an interval"
    return f"95% interval {low:{form}} to {high:{form}}, n = {documents}"


def against_off(rows: Sequence[Record]) -> list[Record]:
    """Return the rows of updates on that have a difference to updates off."""
    return [row for row in rows if row["variant"] == "on" and "difference" in row]
