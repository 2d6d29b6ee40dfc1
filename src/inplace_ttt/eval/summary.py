"""From records to what people read: means with intervals, differences to updates off, a verdict in words."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from .advice import ENOUGH, advice
from .nll import Mean
from .paired import Record, by_group, difference, estimate

REFERENCE = "off"
"""The variant that others are compared with, where it was measured."""


def means(
    records: Sequence[Record], keys: Sequence[str], value: str, weight: str | None, to: str = REFERENCE
) -> list[dict[str, Any]]:
    """A row per group and variant: the group, the mean, its interval, its difference to the variant ``to``."""
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


def tables(records: Sequence[Record]) -> dict[str, list[dict[str, Any]]]:
    """All tables that the records allow, by name."""
    nll = [r for r in records if r["suite"] == "nll"]
    found: dict[str, list[dict[str, Any]]] = {}
    for kind, keys in (
        ("document", ["domain"]),
        ("position", ["domain", "start", "end"]),
        ("class", ["domain", "class"]),
        ("sliding", ["domain", "context"]),
    ):
        part = [r for r in nll if r["kind"] == kind]
        if kind == "sliding":
            part = _in_all_contexts(part)
        if part:
            found[f"nll by {kind}"] = means(part, keys, "loss_sum", "tokens")
    changed = [r for r in nll if r["kind"] == "document" and r["variant"] not in (REFERENCE, "baseline")]
    if len({r["variant"] for r in changed}) > 1:
        rows = means(changed, ["domain"], "loss_sum", "tokens", to="on")
        found["nll against updates on"] = [row for row in rows if "difference" in row]
    needle = [r for r in records if r["suite"] == "needle"]
    if needle:
        found["needle"] = means(needle, ["kind"], "correct", None)
        found["needle by length"] = means(needle, ["kind", "length"], "correct", None)
        found["needle by length and depth"] = means(needle, ["kind", "length", "depth"], "correct", None)
    memory = [r for r in records if r["suite"] == "read-then-ask"]
    if memory:
        found["read, then ask"] = means(memory, ["distance", "mentions", "condition"], "correct", None)
    theory = [r for r in records if r["suite"] == "theory"]
    if theory:
        found["theory"] = [
            {"change": name, **row}
            for name in ("right", "others", "margin", "won")
            for row in means(theory, ["target"], name, None)
        ]
    if harness := [r for r in records if r["suite"] == "harness"]:
        found["harness"] = means(harness, ["task", "metric"], "value", "weight")
    if ruler := [r for r in records if r["suite"] == "ruler"]:
        found["ruler"] = means(ruler, ["length"], "value", "weight")
        found["ruler by task"] = means(ruler, ["task", "length"], "value", "weight")
    state = [r for r in records if r["suite"] == "diagnostics"]
    if state:
        found["fast weights"] = _state(state)
        if correlations := _correlations(state, nll):
            found["what goes with a gain"] = correlations
    return found


def _in_all_contexts(records: list[Record]) -> list[Record]:
    """Only documents that have the longest context: else the curve would compare different texts."""
    kept = []
    for _, members in by_group(records, ["domain"]).items():
        longest = max(r["context"] for r in members)
        names = {r["document"] for r in members if r["context"] == longest}
        kept += [r for r in members if r["document"] in names]
    return kept


def _state(records: list[Record]) -> list[dict[str, Any]]:
    rows = []
    names = ("relative_norm", "output_change", "effective_rank", "key_overlap", "update_norm")
    for (variant, layer), members in by_group(records, ["variant", "layer"]).items():
        row: dict[str, Any] = {"variant": variant, "layer": layer, "windows": len(members)}
        for name in names:
            values = [r[name] for r in members if r[name] is not None]
            row[name] = float(np.mean(values)) if values else None
        rows.append(row)
    return rows


def _correlations(state: list[Record], nll: list[Record]) -> list[dict[str, Any]]:
    """Over windows: correlation of the gain (off - on) with each layer's overlap of keys and effective rank."""
    losses = {
        (r["variant"], r["unit"]): r["loss_sum"] / r["tokens"] for r in nll if r["kind"] == "document" and r["tokens"]
    }
    rows = []
    for (layer,), members in by_group([r for r in state if r["variant"] == "on"], ["layer"]).items():
        for name in ("key_overlap", "effective_rank", "output_change"):
            points = [
                (r[name], losses["off", r["unit"]] - losses["on", r["unit"]])
                for r in members
                if r[name] is not None and {("on", r["unit"]), ("off", r["unit"])} <= losses.keys()
            ]
            x, gain = np.array(points).T if len(points) >= 4 else (np.zeros(0), np.zeros(0))
            if len(x) and x.std() > 0 and gain.std() > 0:
                rows.append({"layer": layer, "figure": name, "windows": len(x), "r": float(np.corrcoef(x, gain)[0, 1])})
    return rows


def verdicts(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Sentences: do the updates help, where, and if not, what to try."""
    lines = []
    for row in found.get("nll by document", []):
        if row["variant"] == "on" and "difference" in row:
            gap = Mean(*(row[f"difference{x}"] for x in ("", "_low", "_high")))
            lines.append(_verdict(row["domain"], gap, row["documents"]))
    lines += advice(found, any(": updates hurt" in line for line in lines))
    for row in found.get("needle", []):
        if row["variant"] == "on" and "difference" in row:
            gap = 100 * row["difference"]
            interval = _interval(100 * row["difference_low"], 100 * row["difference_high"], "+.0f", row["documents"])
            lines.append(
                f"Needle, {row['kind']}: {row['value']:.0%} right with updates, {gap:+.0f} points ({interval})."
            )
    for table in ("harness", "ruler"):
        for row in found.get(table, []):
            if row["variant"] == "on" and "difference" in row:
                name = f"RULER, {row['length']:,} tokens" if table == "ruler" else f"{row['task']}, {row['metric']}"
                interval = _interval(row["difference_low"], row["difference_high"], "+.3f", row["documents"])
                lines.append(f"{name}: {row['value']:.3f} with updates, {row['difference']:+.3f} ({interval}).")
    return [*lines, *_theory(found.get("theory", []))]


def _theory(rows: Sequence[Record]) -> list[str]:
    """What one update did to the logits, a sentence per target."""
    at = {(row["target"], row["change"]): row for row in rows if row["variant"] == "on"}
    words = {"own": "the model's own target", "next_token": "next-token target", "reconstruction": "reconstruction"}
    lines = []
    for target in dict.fromkeys(row["target"] for row in rows):
        right, others, margin, won = (at[target, name] for name in ("right", "others", "margin", "won"))
        interval = _interval(margin["low"], margin["high"], "+.3f", margin["documents"])
        lines.append(
            f"Theorem 1, {words[target]}: one update moved the logit of the word that followed by "
            f"{right['value']:+.3f}, of others by {others['value']:+.3f}: margin {margin['value']:+.3f} ({interval}); "
            f"it rose the most in {won['value']:.0%} of the trials."
        )
    return lines


def _verdict(domain: str, gap: Mean, documents: int) -> str:
    """Whether updates help, where there are enough documents and the interval leaves zero out."""
    interval = _interval(gap.low, gap.high, "+.3f", documents)
    if documents < ENOUGH:
        return (
            f"{domain}: {gap.value:+.3f} nats per token with updates on ({interval}): too few documents for a verdict, "
            f"read at least {ENOUGH}."
        )
    if gap.high < 0:
        return (
            f"{domain}: updates help, by {-gap.value:.3f} nats per token "
            f"({_interval(-gap.high, -gap.low, '.3f', documents)})."
        )
    if gap.low > 0:
        return (
            f"{domain}: updates hurt, by {gap.value:.3f} nats per token "
            f"({_interval(gap.low, gap.high, '.3f', documents)})."
        )
    return f"{domain}: no clear difference between updates on and off ({gap.value:+.3f} nats per token, {interval})."


def _interval(low: float, high: float, form: str, documents: int) -> str:
    if np.isnan(low):
        return "from one document, so without an interval"
    return f"95% interval {low:{form}} to {high:{form}}, n = {documents}"
