"""The pictures of an evaluation, one function each: figures of one style, legible at a column's width."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .nll import Mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIXED = {"on": "#c2410c", "off": "#64748b", "baseline": "#0c4a6e"}
OTHERS = ("#d9a441", "#4d7c0f", "#7c3aed", "#0891b2", "#be185d", "#57534e")


def colours(labels: Sequence[str]) -> dict[str, str]:
    """One per variant, the same in every picture."""
    others = [label for label in labels if label not in FIXED]
    return {**FIXED, **{label: OTHERS[i % len(OTHERS)] for i, label in enumerate(others)}}


def _figure(width: float, height: float, columns: int = 1) -> tuple["Figure", Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False, sharey=True)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="0.9", lw=0.7)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8)
    return figure, axes


def _lines(axis: Any, x: Sequence[Any], curves: Mapping[str, Sequence[Mean]]) -> None:
    palette = colours(list(curves))
    for label, means in curves.items():
        style = "--" if label == "off" else "-"
        axis.plot(x, [m.value for m in means], style, marker="o", ms=3.5, lw=1.5, color=palette[label], label=label)
        low, high = [m.low for m in means], [m.high for m in means]
        axis.fill_between(x, low, high, color=palette[label], alpha=0.12, lw=0)


def _legend_below(figure: "Figure", axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), frameon=False, fontsize=8)


def loss_by_position(domains: Mapping[str, tuple[Sequence[int], Mapping[str, Sequence[Mean]]]]) -> "Figure":
    """Domain -> (ends of the position buckets, variant -> means in nats per token)."""
    figure, axes = _figure(3.4 * max(len(domains), 1.5), 3.0, len(domains))
    for axis, (domain, (ends, curves)) in zip(axes, domains.items(), strict=True):
        _lines(axis, [str(_short(end)) for end in ends], curves)
        axis.set_title(domain, loc="left", fontsize=10, fontweight="bold")
        axis.set_xlabel("position in the document, up to (tokens)", fontsize=8.5)
    axes[0].set_ylabel("loss (nats per token)", fontsize=8.5)
    _legend_below(figure, axes[0])
    return figure


def sliding(domains: Mapping[str, tuple[Sequence[int], Mapping[str, Sequence[Mean]]]], block: int) -> "Figure":
    """Domain -> (contexts, variant -> mean loss of a fixed final block, in nats per token); drawn as perplexity."""
    figure, axes = _figure(3.4 * max(len(domains), 1.5), 3.0, len(domains))
    for axis, (domain, (contexts, curves)) in zip(axes, domains.items(), strict=True):
        powers = {k: [Mean(*np.exp([m.value, m.low, m.high])) for m in means] for k, means in curves.items()}
        _lines(axis, [_short(c) for c in contexts], powers)
        axis.set_title(domain, loc="left", fontsize=10, fontweight="bold")
        axis.set_xlabel("tokens of context", fontsize=8.5)
    axes[0].set_ylabel(f"perplexity of the last {block} tokens", fontsize=8.5)
    _legend_below(figure, axes[0])
    return figure


def classes(domains: Mapping[str, tuple[Sequence[str], Mapping[str, Sequence[Mean]]]]) -> "Figure":
    """Domain -> (classes of tokens, variant -> means): did the token occur before, and how far back?"""
    figure, axes = _figure(3.4 * max(len(domains), 1.5), 3.0, len(domains))
    for axis, (domain, (names, curves)) in zip(axes, domains.items(), strict=True):
        _bars(axis, names, curves)
        axis.set_title(domain, loc="left", fontsize=10, fontweight="bold")
        axis.set_xlabel("where the token occurred before", fontsize=8.5)
    axes[0].set_ylabel("loss (nats per token)", fontsize=8.5)
    _legend_below(figure, axes[0])
    return figure


def _bars(
    axis: Any, names: Sequence[str], curves: Mapping[str, Sequence[Mean]], palette: Mapping[str, str] | None = None
) -> None:
    palette, width = palette or colours(list(curves)), 0.8 / len(curves)
    for i, (label, means) in enumerate(curves.items()):
        x = np.arange(len(names)) + (i - (len(curves) - 1) / 2) * width
        values = np.array([m.value for m in means])
        error = np.abs(np.array([[m.low, m.high] for m in means]).T - values)
        axis.bar(x, values, width * 0.92, yerr=error, color=palette[label], label=label, error_kw={"lw": 0.8})
    axis.set_xticks(np.arange(len(names)), names)


def heat_maps(
    title: str, lengths: Sequence[int], depths: Sequence[float], shares: Mapping[str, np.ndarray], chance: float
) -> "Figure":
    """Variant -> share of right answers [depths, lengths], NaN where not measured."""
    figure, axes = _figure(2.9 * max(len(shares), 1.6) + 0.6, 3.0, len(shares))
    for axis, (label, share) in zip(axes, shares.items(), strict=True):
        picture = axis.imshow(share, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        axis.grid(False)
        axis.set_xticks(range(len(lengths)), [_short(n) for n in lengths])
        axis.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths])
        axis.set_title(label, loc="left", fontsize=10, fontweight="bold")
        axis.set_xlabel("length (tokens)", fontsize=8.5)
        for (i, j), value in np.ndenumerate(share):
            if np.isfinite(value):
                shade = "white" if value > 0.6 else "black"
                axis.text(j, i, f"{value:.0%}", ha="center", va="center", fontsize=7, color=shade)
    axes[0].set_ylabel("depth of the needle", fontsize=8.5)
    figure.colorbar(picture, ax=list(axes), shrink=0.85, label=f"right (chance {chance:.0%})")
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure


def ruler(lengths: Sequence[int], curves: Mapping[str, Sequence[Mean]], tasks: int) -> "Figure":
    """Variant -> mean score at each of ``lengths`` tokens, over ``tasks`` tasks."""
    figure, axes = _figure(4.2, 3.0)
    _lines(axes[0], [_short(n) for n in lengths], curves)
    axes[0].set_ylim(0, 1.02)
    axes[0].set_title(
        f"RULER, {tasks} tasks" if tasks > 1 else "RULER, 1 task", loc="left", fontsize=10, fontweight="bold"
    )
    axes[0].set_xlabel("length (tokens)", fontsize=8.5)
    axes[0].set_ylabel("share of right answers", fontsize=8.5)
    _legend_below(figure, axes[0])
    return figure


def scores(rows: Mapping[str, Mean]) -> "Figure":
    """Task, metric and variant -> difference of the metric to updates off. Which side is better depends on it."""
    return differences("Tasks: metric against updates off", rows, "metric", "updates off", better="")


def differences(title: str, rows: Mapping[str, Mean], unit: str, reference: str, better: str = "left") -> "Figure":
    """Label -> difference to ``reference`` with its interval, one row each; ``better`` is a side, or empty."""
    figure, axes = _figure(6.2, 0.9 + 0.32 * len(rows))
    axis = axes[0]
    y = np.arange(len(rows))[::-1]
    for at, mean in zip(y, rows.values(), strict=True):
        colour = FIXED["on"] if mean.high < 0 else FIXED["baseline"] if mean.low > 0 else "0.5"
        axis.plot([mean.low, mean.high], [at, at], color=colour, lw=2)
        axis.plot(mean.value, at, "o", color=colour, ms=5)
    axis.axvline(0, color="black", lw=0.8)
    axis.set_yticks(y, list(rows))
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.grid(axis="x", color="0.9", lw=0.7)
    side = f", {better} is better" if better else ""
    axis.set_xlabel(f"difference to {reference} ({unit}){side}", fontsize=8.5)
    axis.set_title(title, loc="left", fontsize=10, fontweight="bold")
    return figure


def memory(
    text: str, distances: Sequence[int], mentions: Sequence[int], shares: Mapping[str, Sequence[Sequence[Mean]]]
) -> "Figure":
    """Condition -> [distances][mentions] share of right answers."""
    figure, axes = _figure(2.6 * max(len(distances), 2), 3.0, len(distances))
    for i, (axis, distance) in enumerate(zip(axes, distances, strict=True)):
        for (condition, rows), colour in zip(shares.items(), ("#94a3b8", "#c2410c", "#0c4a6e"), strict=False):
            means = rows[i]
            x = [str(m) for m in mentions]
            axis.plot(x, [m.value for m in means], "o-", ms=3.5, lw=1.5, color=colour, label=condition)
            axis.fill_between(x, [m.low for m in means], [m.high for m in means], color=colour, alpha=0.12, lw=0)
        axis.set_ylim(0, 1.02)
        axis.set_title(f"{distance:,} tokens since", loc="left", fontsize=9)
        axis.set_xlabel("mentions", fontsize=8.5)
    axes[0].set_ylabel(f"right answers, {text}", fontsize=8.5)
    _legend_below(figure, axes[0])
    return figure


def theory(targets: Sequence[str], right: Sequence[Mean], others: Sequence[Mean]) -> "Figure":
    """Changes of logits by one update [targets]: of the word that followed the key before, and of other words."""
    figure, axes = _figure(5.0, 3.0)
    words = {"own": "the model's own", "next_token": "next token", "reconstruction": "same token\n(reconstruction)"}
    names = [words.get(target, target) for target in targets]
    curves = {"the word that followed before": right, "other words": others}
    _bars(axes[0], names, curves, dict(zip(curves, (FIXED["on"], FIXED["off"]), strict=True)))
    axes[0].axhline(0, color="black", lw=0.7)
    axes[0].set_xlabel("what the update learns to predict from a token", fontsize=8.5)
    axes[0].set_ylabel("change of the logit (updates on - off)", fontsize=8.5)
    axes[0].set_title("One update, and the key comes again", loc="left", fontsize=10, fontweight="bold")
    _legend_below(figure, axes[0])
    return figure


def _short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else f"{tokens}"
