"""Tables and pictures from the records of rl_running_sums.py.

python benchmarks/plot_rl.py            prints the tables of docs/rl.md
python benchmarks/plot_rl.py --plot     also writes docs/images/rl-noise.png, rl-proxy.png and rl-learning.png
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from inplace_ttt.plots import add_heading, add_legend, add_title, running_mean, save, styled

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "benchmarks" / "results" / "rl"
COLOURS = {
    "otb": "#c2410c",
    "instant": "#d97706",
    "optimal_trajectory": "#7c3aed",
    "length": "#0d9488",
    "mean": "#2563eb",
    "none": "#64748b",
}
LINES = {"rloo": "mean", "otb": "otb", "otb-loo": "otb", "rloo-scaled": "mean", "mean": "mean", "none": "none"}
STYLES = {"rloo": "-", "otb": "-", "otb-loo": "--", "rloo-scaled": ":", "mean": "--", "none": "-", "instant": "-"}


def read(folder: Path, part: str) -> dict[str, Any] | None:
    """Return a record, or None."""
    path = folder / f"{part}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def excess(result: dict[str, Any], mean: dict[str, Any]) -> float | None:
    """Return the noise at equal signal, over that of leave-one-out means (``mean``) in groups of the same size.

    Gradients without bias have one expectation, so their noise is compared as it is; the others' is divided by the
    square of the shrinkage. That leaves out the signal of each baseline, which is measured far less well.
    """
    unbiased = result["leave_one_out"] or result["baseline"] == "none"
    scale = 1.0 if unbiased else result["shrinkage"]
    return result["noise"] / scale**2 / mean["noise"] if scale and mean["noise"] else None


def leave_one_out_means(job: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Return the results of leave-one-out means by group size."""
    return {r["n"]: r for r in job["results"] if (r["baseline"], r["leave_one_out"]) == ("mean", True)}


def draw_noise(record: dict[str, Any], path: Path) -> None:
    """Noise over signal against group size, by model and level; nothing where a record is missing."""
    kinds = sorted({job["kind"] for job in record["jobs"]}, reverse=True)
    levels = sorted({job["level"] for job in record["jobs"]})
    figure, axes = styled(3.4 * len(levels), 2.7 * len(kinds) + 1, len(kinds), len(levels))
    for job in record["jobs"]:
        plot, means = axes[kinds.index(job["kind"])][levels.index(job["level"])], leave_one_out_means(job)
        for name, colour in COLOURS.items():
            for loo, style in ((False, "o-"), (True, "o:")):
                rows = [r for r in job["results"] if (r["baseline"], r["leave_one_out"]) == (name, loo)]
                found = [(r["n"], excess(r, means[r["n"]]), means[r["n"]]["noise_to_signal"]) for r in rows]
                points = [(n, ours * theirs) for n, ours, theirs in found if ours is not None and theirs is not None]
                if points:
                    label = name.replace("_", " ") + (", leave-one-out" if loo else "")
                    plot.plot(*zip(*points, strict=True), style, color=colour, ms=3, lw=1.2, label=label)
        plot.set(xscale="log", yscale="log", xlabel="completions of a group")
        sizes = sorted({r["n"] for r in job["results"]})
        plot.set_xticks(sizes, labels=[str(n) for n in sizes])
        plot.set_xticks([], minor=True)
        plot.yaxis.set_major_formatter("{x:g}")
        plot.yaxis.set_minor_formatter("{x:g}")
        add_title(plot, f"{job['kind']}, {job['success']:.0%} success, n = {job['prompts']}")
    drawn = [plot for plot in axes.flat if plot.has_data()]
    for plot in axes.flat:
        if plot not in drawn:
            plot.set_axis_off()
    for row in axes:
        row[0].set_ylabel("noise / signal of one group")
    add_heading(figure, "Noise of the policy gradient by group size and baseline, n prompts")
    add_legend(figure)
    save(figure, path)


def draw_proxy(record: dict[str, Any], path: Path) -> None:
    """Squared gradient norms against w and W, by model, at the middle level: some tokens; r and n are of all."""
    levels = sorted({job["level"] for job in record["jobs"]})
    jobs = [job for job in record["jobs"] if job["level"] == levels[len(levels) // 2]]
    figure, axes = styled(7.4, 2.7 * len(jobs) + 0.4, len(jobs), 2)
    for row, job in zip(axes, jobs, strict=True):
        pairs = (("w", "own", "w_with_own_norm"), ("W", "cumulative", "W_with_cumulative_norm"))
        for plot, (x, y, name) in zip(row, pairs, strict=True):
            points = [(a, b) for a, b in zip(job["points"][x], job["points"][y], strict=True) if a > 0 and b > 0]
            plot.scatter(*zip(*points, strict=True), s=3, alpha=0.4, color=COLOURS["otb"], lw=0)
            shown = f"{x} ({len(points)} of the tokens)"
            plot.set(xscale="log", yscale="log", xlabel=shown, ylabel="squared norm")
            add_title(plot, f"{job['kind']}, r = {job[name]:.2f}, n = {job['tokens']:,}")
    add_heading(figure, f"Squared gradient norms by proxy, rank correlation r, {jobs[0]['level']:.0%} success")
    save(figure, path)


def draw_learning(record: dict[str, Any], path: Path) -> None:
    """Success against steps, mean over seeds, by model and group size."""
    panels = sorted({(job["kind"], job["n"]) for job in record["jobs"]}, key=lambda p: (p[0] != "plain", p[1]))
    figure, axes = styled(max(3.9 * len(panels), 5.0), 3.6, 1, len(panels), sharey=True)
    for plot, panel in zip(axes[0], panels, strict=True):
        jobs = [job for job in record["jobs"] if (job["kind"], job["n"]) == panel]
        for job in jobs:
            curves = np.array([running_mean(np.array(run["success"]), 9) for run in job["runs"]])
            variant, x = job["variant"], np.arange(1, curves.shape[1] + 1)
            colour = COLOURS[LINES.get(variant, variant)]
            plot.plot(x, curves.mean(0), STYLES[variant], color=colour, lw=1.4, label=variant)
            plot.fill_between(x, curves.min(0), curves.max(0), color=colour, alpha=0.08, lw=0)
        plot.set_xlabel("step")
        add_title(plot, f"{panel[0]}, groups of {panel[1]}, n = {len(jobs[0]['runs'])} seeds")
    axes[0][0].set_ylabel("success (mean of 9 steps)")
    add_heading(figure, "Success while training, by baseline")
    add_legend(figure)
    save(figure, path)


def draw(folder: Path, out: Path, prefix: str = "") -> list[Path]:
    """Draw what there are records of; return the pictures."""
    drawn = []
    for part, function in (("noise", draw_noise), ("proxy", draw_proxy), ("learning", draw_learning)):
        record = read(folder, part)
        if record is not None and record["jobs"]:
            drawn.append(out / f"{prefix}{part}.png")
            function(record, drawn[-1])
    return drawn


# -- tables ------------------------------------------------------------------------------------------------------------


def noise_table(record: dict[str, Any]) -> str:
    """Return noise over signal of leave-one-out means, and the noise of other baselines at equal signal over theirs."""
    names = [(b, loo) for b in COLOURS for loo in (False, True) if b not in ("length", "mean", "none")] + [
        ("none", False)
    ]
    titles = [b.replace("_", " ") + (", leave-one-out" if loo else "") for b, loo in names]
    lines = [f"| model | success | N | mean, leave-one-out: noise / signal | {' | '.join(titles)} |"]
    lines.append("| --- " * (4 + len(titles)) + "|")
    for job, n, mean, results in by_size(record):
        found = [excess(results[name], mean) for name in names]
        cells = [job["kind"], f"{job['success']:.0%}", str(n), with_error(mean, "noise_to_signal", ".3g")]
        lines.append(f"| {' | '.join(cells + ['' if x is None else f'{x:.2f}' for x in found])} |")
    return "\n".join(lines)


def shrinkage_table(record: dict[str, Any]) -> str:
    """Return what is left of the unbiased gradient under baselines that contain the completion itself."""
    names = [b for b in COLOURS if b not in ("length", "none")]
    lines = [f"| model | success | N | {' | '.join(b.replace('_', ' ') for b in names)} |"]
    lines.append("| --- " * (3 + len(names)) + "|")
    for job, n, _, results in by_size(record):
        cells = [job["kind"], f"{job['success']:.0%}", str(n)]
        lines.append(f"| {' | '.join(cells + [with_error(results[b, False], 'shrinkage', '.2f') for b in names])} |")
    return "\n".join(lines)


def by_size(record: dict[str, Any]) -> Iterator[tuple[dict[str, Any], int, dict[str, Any], dict[Any, dict[str, Any]]]]:
    """Yield jobs with a group size, its leave-one-out mean and its results by (baseline, leave-one-out)."""
    for job in sorted(record["jobs"], key=lambda j: (j["kind"] != "plain", j["level"])):
        for n, mean in leave_one_out_means(job).items():
            yield job, n, mean, {(r["baseline"], r["leave_one_out"]): r for r in job["results"] if r["n"] == n}


def with_error(result: dict[str, Any], name: str, form: str) -> str:
    """Return a value and its standard error; "lost in noise" where there is none."""
    value, error = result[name], result[f"{name}_se"]
    return "lost in noise" if value is None else f"{value:{form}}" + ("" if error is None else f" ({error:{form}})")


def proxy_table(record: dict[str, Any]) -> str:
    """Return the rank correlations."""
    names = {
        "w_with_own_norm": "w, all tokens",
        "w_with_own_norm_within_rows": "w, within rows",
        "W_with_cumulative_norm": "W, all tokens",
        "W_with_cumulative_norm_within_rows": "W, within rows",
        "W_with_cumulative_norm_at_ends": "W, ends of rows",
    }
    lines = [f"| model | level | tokens | {' | '.join(names.values())} |", "| --- " * (3 + len(names)) + "|"]
    for job in sorted(record["jobs"], key=lambda j: (j["kind"] != "plain", j["level"])):
        cells = [job["kind"], f"{job['level']:.0%}", f"{job['tokens']:,}", *(f"{job[n]:.2f}" for n in names)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def learning_table(record: dict[str, Any]) -> str:
    """Return the success of the last tenth of the steps and at the end, mean and range over seeds, and tokens."""
    lines = ["| model | N | baseline | learning rate | last tenth | at the end | tokens of a run |", "| --- " * 7 + "|"]
    for job in sorted(record["jobs"], key=lambda j: (j["kind"] != "plain", j["n"])):
        last = [sum(tail) / len(tail) for run in job["runs"] if (tail := run["success"][-max(job["steps"] // 10, 1) :])]
        ends = [run["final_success"] for run in job["runs"]]
        tokens = sum(sum(run["tokens"]) for run in job["runs"]) / len(job["runs"])
        spans = [f"{sum(x) / len(x):.1%} ({min(x):.1%} - {max(x):.1%})" for x in (last, ends)]
        cells = [job["kind"], job["n"], job["variant"], f"{job['learning_rate']:.1e}", *spans, f"{tokens:,.0f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


TABLES = (
    ("noise", noise_table),
    ("noise", shrinkage_table),
    ("proxy", proxy_table),
    ("learning", learning_table),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--plot", action="store_true")
    arguments = parser.parse_args()
    for part, table in TABLES:
        record = read(arguments.records, part)
        if record is not None:
            print(table(record) + "\n")
    if arguments.plot:
        draw(arguments.records, ROOT / "docs" / "images", "rl-")


if __name__ == "__main__":
    main()
