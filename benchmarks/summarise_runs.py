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
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from summarise_reading import markdown

from inplace_ttt.eval.paired import Mean, bootstrap_mean
from inplace_ttt.plots import OFF, ON, OTHERS, TEXTS, add_heading, add_legend, add_title, save, styled

ROOT = Path(__file__).resolve().parents[1]
DOMAINS = ("books", "code")
CONTROL = "control"
BOLD = {"window": OFF, "in-place-ttt": ON}
"""Variants that stand out, and their colours."""
Record = dict[str, Any]


def read(folder: Path, control: str = CONTROL) -> list[Record]:
    """All records of a directory, controls first."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*/run.json")]
    numbers = lambda name: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", name)]  # noqa: E731
    return sorted(found, key=lambda r: (not is_control(r, control), numbers(r["name"])))


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


def chosen(records: Sequence[Record], patterns: Sequence[str], control: str) -> list[Record]:
    """Controls, then what fits a pattern, in the order of the patterns."""
    others = [r for pattern in patterns for r in records if fnmatch(family(r), pattern)]
    ordered = {r["name"]: r for r in [*(r for r in records if is_control(r, control)), *others]}
    return list(ordered.values())


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
    row = record["evaluation"]["losses"].get(domain, {})
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


def cosine(record: Record, quarter: int) -> Mean | None:
    """The mean of a quarter of training."""
    if len(found := cosines(record)) < 4:
        return None
    value = float(np.mean([x for _, x in np.array_split(found, 4)[quarter]]))
    return Mean(value, value, value)


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
        last = cosines(record)[-1:]
        row += [number(size(record), ".3f"), f"{last[0][1]:.3f}" if last else ""]
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


def sliding(records: Sequence[Record]) -> Iterator[tuple[str, Any]]:
    """Variant and row of books' last tokens; of a model with fast weights, as it reads."""
    for record in records:
        for row in [] if record["failed"] else record["evaluation"].get("recall", {}).get("nll by sliding", []):
            if row["variant"] == "on" and row["domain"] == "prose":
                yield family(record), row


def by_context(records: Sequence[Record]) -> dict[str, dict[int, list[float]]]:
    """Losses of books' last tokens by variant, context and seed."""
    found: dict[str, dict[int, list[float]]] = {}
    for name, row in sliding(records):
        found.setdefault(name, {}).setdefault(row["context"], []).append(row["value"])
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


def over_runs(means: Sequence[Mean | None]) -> Mean | None:
    """Of one run its own interval, of several the lowest and highest."""
    found = [mean for mean in means if mean is not None]
    values = [mean.value for mean in found]
    return Mean(float(np.mean(values)), min(values), max(values)) if len(found) > 1 else next(iter(found), None)


def draw_contexts(records: Sequence[Record], path: Path) -> None:
    """The loss by context, a line for each variant, the lowest and highest seed as its band.

    One colour for each kind of layer, dashed where all are of it. What breaks at the longest context leaves the picture
    at the top: the table has it.
    """
    found = by_context(records)
    contexts = sorted({context for values in found.values() for context in values})
    losses = {name: [values.get(n, [math.nan]) for n in contexts] for name, values in found.items()}
    trained = {
        name: [np.mean(x) for n, x in values.items() if n < contexts[-1]] or [np.mean(x) for x in values.values()]
        for name, values in found.items()
    }
    kinds = sorted({name.removeprefix("window-") for name in found} - BOLD.keys())
    colours = BOLD | dict(zip(kinds, (*OTHERS[:5], "#0c4a6e", "#f87171", "black") * len(kinds), strict=False))
    figure, ((axis,),) = styled(8.0, 4.2)
    for name in sorted(found, key=lambda name: -float(np.mean(trained[name]))):
        kind, bold = name.removeprefix("window-"), name in BOLD
        style = {"color": colours[kind], "ls": "--" if kind == name and not bold else "-", "lw": 1.4 + bold}
        axis.plot(contexts, [np.mean(x) for x in losses[name]], marker="o", ms=3, label=name, **style)
        low, high = ([of(x) for x in losses[name]] for of in (min, max))
        axis.fill_between(contexts, low, high, color=colours[kind], alpha=0.12, lw=0)
    levels = [level for values in trained.values() for level in values]
    axis.set_ylim(min(levels) - 0.03, max(levels) + 0.06)
    axis.set_xscale("log", base=2)
    axis.set_xticks(contexts, [f"{n // 1024}k" for n in contexts])
    axis.set(xlabel="tokens of a book before its last 256", ylabel="loss of these (nats per token)")
    books = max(row["documents"] for _, row in sliding(records))
    add_title(axis, f"Loss of the last 256 tokens by context, n = {books} books")
    add_legend(figure, 1, "right center")
    save(figure, path)


def draw(records: Sequence[Record], path: Path, control: str = CONTROL) -> None:
    """Gain by variant, by reading and against the control, and the cosine early and late in training.

    Whiskers: of one run its interval over documents, of several seeds the lowest and highest. A panel needs two
    variants.
    """
    shown = by_family(record for record in records if not is_control(record, control))
    found = [record["evaluation"]["losses"] for members in shown.values() for record in members]
    n = {d: max((len(row[d]["on_by_document"]) for row in found if d in row), default=0) for d in DOMAINS}
    versus = lambda record, domain: below(record, control_of(record, records, control), domain)  # noqa: E731
    measures: dict[str, list[tuple[str, str, Any]]] = {
        title: [(f"{d}, n = {n[d]}", TEXTS[d], partial(of, domain=d)) for d in DOMAINS if n[d]]
        for title, of in (("updates off - on", gain), (f"{control} - variant", versus))
    }
    measures["cosine of v and -dL/do"] = [
        ("in the second quarter of training", "0.65", partial(cosine, quarter=1)),
        ("in the last quarter", ON, partial(cosine, quarter=3)),
    ]
    drawn = {
        title: [(label, colour, [over_runs(list(map(of, members))) for members in shown.values()])
                for label, colour, of in marks]
        for title, marks in measures.items()
    }  # fmt: skip
    drawn = {
        title: marks for title, marks in drawn.items() if any(len(rows) - rows.count(None) > 1 for *_, rows in marks)
    }
    figure, (axes,) = styled(8.5, 1.4 + 0.24 * len(shown), 1, max(len(drawn), 1), grid="both", sharey=True)
    for axis, (title, marks) in zip(axes, drawn.items(), strict=False):
        for shift, (label, colour, rows) in zip((-0.15, 0.15), marks, strict=False):
            points = [(at + shift, mean) for at, mean in enumerate(rows) if mean is not None]
            y, value = [at for at, _ in points], [mean.value for _, mean in points]
            whiskers = [[mean.value - mean.low for _, mean in points], [mean.high - mean.value for _, mean in points]]
            axis.errorbar(value, y, xerr=whiskers, fmt="o", color=colour, ms=4, lw=1.6, label=label)
            for where, mean in points:
                said = {"fontsize": 6, "color": colour, "va": "center", "textcoords": "offset points"}
                axis.annotate(f"{mean.value:+.3f}", (max(mean.value, mean.high), where), (5, 0), **said)
        axis.margins(x=0.18)
        axis.axvline(0, color="black", lw=0.8)
        axis.set_xlabel("nats per token, right is better" if "cosine" not in title else "")
        add_title(axis, title)
    names = [name + (f", {len(members)} seeds" if len(members) > 1 else "") for name, members in shown.items()]
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    seen = max((members[0]["tokens_seen"] for members in shown.values()), default=0)
    add_heading(figure, f"{path.stem}: test loss after {seen / 1e6:,.0f}M tokens of training")
    add_legend(figure)
    save(figure, path)


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
        records = chosen(records, given.only, given.control)
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
