"""Sentences of advice: which layers help, which setting read best, what goes with a gain or a harm."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .paired import Record, by_group

LAYER = "without layer "
"""How readings with one layer switched off are labelled."""
ENOUGH = 8
"""Documents from which on a bootstrap interval is trusted for a verdict in words."""
WORDS = {
    "key_overlap": "overlap of new keys with what was learned",
    "effective_rank": "effective rank of the fast weights",
    "output_change": "change of the layer's output",
}
_Rows = Sequence[dict[str, Any]]


def advice(found: Mapping[str, _Rows], hurt: bool) -> list[str]:
    """From the tables ``nll against updates on`` and ``what goes with a gain``. ``hurt``: whether updates do harm."""
    compared = found.get("nll against updates on", [])
    layers = [row for row in compared if row["variant"].startswith(LAYER)]
    settings = [row for row in compared if not row["variant"].startswith(LAYER)]
    lines = []
    for domain in dict.fromkeys(row["domain"] for row in compared):
        lines += _layers(domain, [row for row in layers if row["domain"] == domain])
        lines += _settings(domain, [row for row in settings if row["domain"] == domain])
    lines += _correlations(found.get("what goes with a gain", []))
    if hurt and not settings:
        lines.append("Try other settings: --sweep decay=0.01,0.05 --sweep lr=... with smaller values.")
    if hurt and not layers:
        lines.append("Try --layers to find the layer that does it.")
    if hurt and "what goes with a gain" not in found:
        lines.append("Try --suite nll,diagnostics to see whether new keys overlap with old ones.")
    return lines


def _layers(domain: str, rows: _Rows) -> list[str]:
    """One sentence of what each layer's updates do: the loss without them against that with all."""
    if not rows:
        return []
    about, documents = f"{domain}, loss when one layer's updates are switched off", rows[0]["documents"]
    if documents < ENOUGH:
        found = (f"layer {row['variant'].removeprefix(LAYER)} {row['difference']:+.3f}{span(row)}" for row in rows)
        return [f"{about}: {'; '.join(found)}. {documents} are too few documents for a verdict."]
    parts: dict[str, list[str]] = {"help": [], "hurt": [], "make no clear difference": []}
    for row in rows:
        low, high = row["difference_low"], row["difference_high"]
        verdict = "help" if low > 0 else "hurt" if high < 0 else "make no clear difference"
        number = row["variant"].removeprefix(LAYER)
        parts[verdict].append(f"{number} ({row['difference']:+.3f}{span(row)})")
    said = [f"{verdict} in {_count(layers)} {', '.join(layers)}" for verdict, layers in parts.items() if layers]
    line = f"{about}: updates {'; '.join(said)}."
    if not parts["hurt"]:
        return [line]
    worst = min(rows, key=lambda row: row["difference"])["variant"].removeprefix(LAYER)
    remedy = f"read inside layers_off(model, [{worst}]), or leave it out of the layers when you train again"
    return [line, f"{domain}: layer {worst} does the most harm: {remedy}."]


def _settings(domain: str, rows: _Rows) -> list[str]:
    """The best of the other settings against the model's own."""
    if not rows:
        return []
    best = min(rows, key=lambda row: row["value"])
    tried = f"{domain}: of {len(rows)} other setting{'s' * (len(rows) > 1)}, {best['variant']} read best"
    result = f"{best['value']:.3f} nats per token, {best['difference']:+.3f} against the model's own{span(best)}"
    if best["difference_high"] < 0 and best["documents"] >= ENOUGH:
        return [f"{tried}: {result}. It was chosen on this text: confirm it on other text before you keep it."]
    if best["difference"] < 0:
        return [f"{tried}: {result}, not a clear difference."]
    return [f"{tried}, but no better than the model's own: {result}."]


def _correlations(rows: _Rows) -> list[str]:
    """For each figure of the fast weights: in which layers more of it went with more or with less gain."""
    lines, any_clear = [], False
    for (figure,), members in by_group(rows, ["figure"]).items():
        clear: dict[str, list[str]] = {}
        for row in members:
            low, high = interval_of_r(row["r"], row["windows"])
            if low > 0 or high < 0:
                where = f"layer {row['layer']} (r = {row['r']:+.2f}, 95% interval {low:+.2f} to {high:+.2f})"
                clear.setdefault("higher" if low > 0 else "lower", []).append(where)
        name, windows = WORDS.get(figure, figure), members[0]["windows"]
        any_clear |= bool(clear)
        for side, places in clear.items():
            lines.append(f"Over {windows} windows, updates gained more with a {side} {name} in {', '.join(places)}.")
        if not clear:
            most = max((row["r"] for row in members), key=abs)
            unclear = f"no layer's {name} went clearly with the gain or harm (largest r = {most:+.2f})"
            lines.append(f"Over {windows} windows, {unclear}.")
    if any_clear and len(rows) > 1:
        lines.append(f"{len(rows)} correlations were looked at; one in twenty looks clear by chance.")
    return lines


def interval_of_r(r: float, n: int) -> tuple[float, float]:
    """95% interval of a correlation of n points (Fisher's transform, points taken as independent)."""
    if n < 4:
        return -1.0, 1.0
    middle, half = np.arctanh(np.clip(r, -0.999999, 0.999999)), 1.959964 / np.sqrt(n - 3)
    return float(np.tanh(middle - half)), float(np.tanh(middle + half))


def span(row: Record) -> str:
    """The interval of a row's difference, to be put after it; empty where one document gives none."""
    if np.isnan(row["difference_low"]):
        return ""
    return f", 95% interval {row['difference_low']:+.3f} to {row['difference_high']:+.3f}, n = {row['documents']}"


def _count(layers: Sequence[str]) -> str:
    return "layer" if len(layers) == 1 else "layers"
