"""Results of each run of a table, as a table and a picture.

    python benchmarks/summarise_runs.py benchmarks/results/smollm2 [--plot docs/images/smollm2.png]
    python benchmarks/summarise_runs.py benchmarks/results/replica --control window [--plot-contexts FILE.png] \\
        [--only 'window*' full in-place-ttt]

Reads DIRECTORY/NAME/run.json as runs.py writes them. By domain: *on* and *off*, losses with and without updates;
*gain*, off - on; *own*, the part of it that is the text's own: after another text was read, learning over learning
stopped; *below control*, the loss of the control of the same base, budget, seed and trained weights less this one's
with updates (``--control``: its name, without the seed; left out: whatever is named ``control-...``). An adapter on a
frozen base is its own control: with updates off it is the base. Intervals: 95%, paired, over documents. *sizes*:
||eta S z|| / ||W0 z|| at the end of a text, the largest of all layers; *cosine*: of v and -dL/do, when last logged;
*tokens/s*: of training, where a run had its GPU to itself. Where runs have seeds a second table has their means, and
the lowest and highest. Where perplexity was measured by context, another table has the loss of books' last 256 tokens
after so many before them, means over seeds.
"""

import argparse
import json
import math
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from summarise_reading import markdown

from inplace_ttt.eval.paired import Mean, bootstrap_mean
from inplace_ttt.eval.plots import panels

ROOT = Path(__file__).resolve().parents[1]
DOMAINS = ("books", "code")
CONTROL = "control"
Record = dict[str, Any]


def read(folder: Path, control: str = CONTROL) -> list[Record]:
    """All records of a directory, controls first."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*/run.json")]
    return sorted(found, key=lambda r: (not is_control(r, control), r["name"]))


def family(record: Record) -> str:
    """The name without the seed."""
    return re.sub(r"-seed\d+$", "", record["name"])


def by_family(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The runs that did not fail, all seeds of a variant together."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        if not record["failed"]:
            groups.setdefault(family(record), []).append(record)
    return groups


def is_control(record: Record, control: str) -> bool:
    return family(record) == control or (control == CONTROL and record["name"].startswith(f"{CONTROL}-"))


def control_of(record: Record, records: Sequence[Record], control: str) -> Record | None:
    """The control on the same rows: of the same base, budget, seed and trained weights."""

    def same(r: Record) -> tuple[Any, ...]:
        recipe = r["recipe_as_run"]
        trained = recipe.get("trainable", "all")
        return recipe["model"].get("base"), r["tokens_seen"], recipe.get("seed"), trained, r["data"]["train"]

    fitting = [r for r in records if is_control(r, control) and not r["failed"] and same(r) == same(record)]
    return fitting[0] if fitting else None


def gap(upper: Sequence[float], lower: Sequence[float]) -> Mean:
    """The mean difference of documents' losses, with its interval."""
    values = np.array(upper) - np.array(lower)
    return bootstrap_mean(values, np.ones(len(values)))


def cell(mean: Mean | None) -> str:
    return "" if mean is None else f"{mean.value:+.3f} ({mean.low:+.3f} to {mean.high:+.3f})"


def gain(record: Record, domain: str) -> Mean | None:
    row = record["evaluation"]["losses"][domain]
    return gap(row["off_by_document"], row["on_by_document"]) if "off" in row else None


def below(record: Record, control: Record | None, domain: str) -> Mean | None:
    if control is None or control is record or domain not in record["evaluation"]["losses"]:
        return None
    upper, lower = (r["evaluation"]["losses"][domain]["on_by_document"] for r in (control, record))
    return gap(upper, lower) if len(upper) == len(lower) else None


def size(record: Record) -> float | None:
    rows = [layer for row in record["evaluation"]["losses"].values() for layer in row.get("sizes", [])]
    values = [layer["output_change"] for layer in rows if layer["output_change"] is not None]
    return max(values, default=None)


def cosines(record: Record) -> list[tuple[float, float]]:
    return [(entry["tokens"], entry["ttt_cosine"]) for entry in record["curve"] if "ttt_cosine" in entry]


def scores(record: Record, what: str, label: str) -> float | None:
    """Right answers of needles, associative recall or RULER, all kinds and lengths together."""
    found = record["evaluation"]
    rows = {
        "needle": lambda: found.get("recall", {}).get("needle", []),
        "recall": lambda: found.get("recall", {}).get("recall", []),
        "ruler": lambda: [row for row in found.get("ruler", []) if row["task"] == "all"],
    }[what]()
    values = [row["value"] for row in rows if row["variant"] == label]
    return float(np.mean(values)) if values else None


def table(records: Sequence[Record], control: str = CONTROL) -> str:
    """Markdown: a row for each run, and a line for each that failed."""
    names = ["variant", *(f"{d} {n}" for d in DOMAINS for n in ("on", "off", "gain", "own", "below control"))]
    names += ["sizes", "cosine", "needle on / off", "recall on / off", "RULER on / off", "tokens/s"]
    rows: list[list[str]] = []
    number = lambda x, form: "" if x is None else format(x, form)  # noqa: E731
    for record in records:
        if record["failed"]:
            continue
        beside, row = control_of(record, records, control), [record["name"]]
        for domain in DOMAINS:
            found = record["evaluation"]["losses"].get(domain)
            if found is None:
                row += [""] * 5
                continue
            off = f"{found['off']:.4f}" if "off" in found else ""
            row += [f"{found['on']:.4f}", off, cell(gain(record, domain)), number(found.get("own_gain"), "+.3f")]
            row.append(cell(below(record, beside, domain)))
        cosine = cosines(record)
        row += [number(size(record), ".3f"), number(cosine[-1][1] if cosine else None, ".3f")]
        for what in ("needle", "recall", "ruler"):
            row.append(" / ".join(number(scores(record, what, label), ".0%") for label in ("on", "off")).strip(" /"))
        row.append("" if record.get("beside", 1) > 1 else f"{record['tokens_per_second']:,.0f}")
        rows.append(row)
    failures = [f"* {record['name']} failed: {record['failed']}" for record in records if record["failed"]]
    return "\n".join([markdown(names, rows), *([""] if failures else []), *failures])


def over_seeds(records: Sequence[Record], control: str) -> str:
    """Markdown: means over seeds with the lowest and highest; empty where no run has two."""
    groups = by_family(records)
    names = ["variant", "seeds", *(f"{d} {n}" for d in DOMAINS for n in ("on", "gain", "below control"))]
    rows: list[list[str]] = []
    for name, members in groups.items():
        row = [name, str(len(members))]
        for domain in DOMAINS:
            measured = [r["evaluation"]["losses"].get(domain) for r in members]
            gaps = [below(r, control_of(r, records, control), domain) for r in members]
            row.append(spread([found["on"] for found in measured if found], ".4f"))
            row.append(spread([found["gain"] for found in measured if found and "gain" in found], "+.3f"))
            row.append(spread([gap.value for gap in gaps if gap is not None], "+.3f"))
        rows.append(row)
    return markdown(names, rows) if any(len(members) > 1 for members in groups.values()) else ""


def spread(values: Sequence[float], form: str) -> str:
    if len(values) < 2:
        return "".join(format(value, form) for value in values)
    return f"{np.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def by_context(records: Sequence[Record]) -> dict[str, dict[int, list[float]]]:
    """Losses of books' last tokens by variant, context and seed; of a model with fast weights, as it reads."""
    found: dict[str, dict[int, list[float]]] = {}
    for record in records:
        for row in [] if record["failed"] else record["evaluation"].get("recall", {}).get("nll by sliding", []):
            if row["variant"] == "on" and row["domain"] == "prose":
                found.setdefault(family(record), {}).setdefault(row["context"], []).append(row["value"])
    return found


def context_table(records: Sequence[Record]) -> str:
    """Markdown: the loss by context; empty where it was not measured."""
    found = by_context(records)
    contexts = sorted({context for values in found.values() for context in values})
    rows = [
        [name, *(f"{np.mean(values[n]):.3f}" if n in values else "" for n in contexts)]
        for name, values in found.items()
    ]
    return markdown(["variant", *(f"{n:,}" for n in contexts)], rows) if found else ""


def draw_contexts(records: Sequence[Record], path: Path) -> None:
    """The loss by context, a line for each variant, the lowest and highest seed as its band.

    What breaks at the longest context leaves the picture at the top: the table has it.
    """
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    found = by_context(records)
    contexts = sorted({context for values in found.values() for context in values})
    lines = {}
    for name, values in sorted(found.items()):
        given = [values.get(n) or [math.nan] for n in contexts]
        lines[name] = [Mean(float(np.mean(x)), min(x), max(x)) for x in given]
    colours = {name: to_hex(colormaps["tab20"](2 * i % 20 + i // 10)) for i, name in enumerate(lines)}
    where, what = "tokens before the last 256 of a book", "loss of these, nats per token"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = panels({"": (contexts, lines)}, where, what, palette=colours, width=4.5)
    trained = [mean.value for line in lines.values() for mean in line[:-1] or line]
    figure.axes[0].set_ylim(min(trained) - 0.03, max(trained) + 0.06)
    figure.set_figheight(4.5)
    figure.savefig(path, dpi=120)


def draw(records: Sequence[Record], path: Path, control: str = CONTROL) -> None:
    """Gain by variant, by reading and against the control, and the cosine over training (of the first seed).

    Whiskers: of one run its interval over documents, of several seeds the lowest and highest.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    shown = by_family(record for record in records if not is_control(record, control))
    figure = Figure(figsize=(12, max(3.2, 0.5 + 0.36 * len(shown))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3)
    for axis, title, of in (
        (axes[0], "gain: off - on", lambda r, d: gain(r, d)),
        (axes[1], "below the control: control - on", lambda r, d: below(r, control_of(r, records, control), d)),
    ):
        for i, domain in enumerate(DOMAINS):
            for at, members in enumerate(shown.values()):
                found = [of(r, domain) for r in members if domain in r["evaluation"]["losses"]]
                means = [mean for mean in found if mean is not None]
                if not means:
                    continue
                value = float(np.mean([mean.value for mean in means]))
                low, high = (means[0].low, means[0].high) if len(means) == 1 else (
                    min(mean.value for mean in means), max(mean.value for mean in means))  # fmt: skip
                error = [[value - low], [high - value]]
                axis.barh(at + 0.38 * i, value, 0.36, xerr=error, color=f"C{i}", error_kw={"lw": 0.8})
                axis.annotate(f"{value:+.3f}", (max(high, value, 0), at + 0.38 * i), (3, 0), fontsize=7, va="center",
                              textcoords="offset points")  # fmt: skip
        axis.axvline(0, color="0.4", lw=0.8)
        axis.margins(x=0.2)
        axis.set(title=title, xlabel="nats per token", yticks=[i + 0.19 for i in range(len(shown))])
        labels = [name + (f", {len(members)} seeds" if len(members) > 1 else "") for name, members in shown.items()]
        axis.set_yticklabels(labels if axis is axes[0] else [])
        axis.set_ylim(len(shown) - 0.2, -0.4)  # every row, also where nothing is drawn
    named = [axes[0].barh(0, 0, color=f"C{i}", label=d) for i, d in enumerate(DOMAINS)]
    figure.legend(handles=named, loc="outside lower left", ncols=2)
    for name, (record, *_) in shown.items():
        if points := cosines(record):
            axes[2].plot(*zip(*points, strict=True), lw=1.2, label=name)
    axes[2].set(title="cosine of v and -dL/do", xlabel="tokens of training")
    axes[2].xaxis.set_major_formatter(EngFormatter(sep=""))
    if axes[2].lines:
        axes[2].legend(fontsize=7, ncols=1 + len(axes[2].lines) // 12)
    for axis in axes:
        axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "benchmarks" / "results" / "smollm2")
    parser.add_argument("--control", default=CONTROL)
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="PATTERN", help="variants, as in a shell; and controls"
    )
    parser.add_argument("--plot", type=Path, default=None)
    parser.add_argument("--plot-contexts", type=Path, default=None)
    given = parser.parse_args()
    records = read(given.folder, given.control)
    if given.only:
        records = [r for r in records if is_control(r, given.control) or any(fnmatch(family(r), x) for x in given.only)]
    print(table(records, given.control))
    if by_seed := over_seeds(records, given.control):
        print(f"\n{by_seed}")
    if contexts := context_table(records):
        print(f"\n{contexts}")
    if given.plot_contexts and contexts:
        draw_contexts(records, given.plot_contexts)
    if given.plot:
        draw(records, given.plot, given.control)


if __name__ == "__main__":
    main()
