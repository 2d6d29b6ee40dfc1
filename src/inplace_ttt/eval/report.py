"""What an evaluation leaves behind: ``report.html`` with everything in it, JSON, CSV, and the pictures."""

import csv
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..records import about, write_json
from . import plots
from .advice import ENOUGH
from .nll import Mean
from .paired import Record
from .runner import read_seconds
from .summary import tables, verdicts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1e293b; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: 0.85rem; margin: 0.6rem 0; }
th, td { padding: 0.2rem 0.7rem; text-align: right; border-bottom: 1px solid #e2e8f0; }
th:first-child, td:first-child { text-align: left; } td.better { color: #c2410c; font-weight: 600; }
figure { margin: 1rem 0; } svg { max-width: 100%; height: auto; } .verdict { font-size: 1.05rem; }
details { margin: 0.8rem 0; } pre { background: #f8fafc; padding: 0.8rem; overflow-x: auto; font-size: 0.8rem; }
"""


def write(
    directory: Path, records: Sequence[Record], plan: Mapping[str, Any], useless: Sequence[str] = ()
) -> list[str]:
    """Writes all files into ``directory``; returns the verdicts. ``useless``: why there is nothing to compare."""
    origin = {**about(), "seconds": read_seconds(directory)}
    found = tables(records)
    said = list(useless) or verdicts(found)
    figures = pictures(found, plan)
    folder = directory / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=200)
    write_json(directory / "summary.json", {**origin, "plan": plan, "verdicts": said, "tables": _finite(found)})
    _write_csv(directory / "summary.csv", found)
    page = _page(found, said, figures, {**plan, **origin})
    (directory / "report.html").write_text(page, encoding="utf-8")
    return said


# -- pictures ----------------------------------------------------------------------------------------------------------


def pictures(found: Mapping[str, Rows], plan: Mapping[str, Any]) -> dict[str, "Figure"]:
    """Figures by file name, those that the tables allow."""
    figures: dict[str, Figure] = {}
    if rows := found.get("nll by position"):
        figures["loss-by-position"] = plots.loss_by_position(_curves(rows, "end"))
    if rows := found.get("nll by sliding"):
        figures["sliding-perplexity"] = plots.sliding(_curves(rows, "context"), plan["block"])
    if rows := found.get("nll by class"):
        figures["loss-by-class"] = plots.classes(_curves(rows, "class"))
    gaps = {
        f"{row['variant']}, {row['domain']}": _gap(row)
        for row in found.get("nll by document", [])
        if "difference" in row
    }
    if gaps:
        unit = "nats per token"
        figures["differences"] = plots.differences("Loss against updates off", gaps, unit, "updates off")
    figures |= _heat_maps(found.get("needle by length and depth", []))
    if rows := found.get("read, then ask"):
        figures["read-then-ask"] = _memory([row for row in rows if row["variant"] == "on"])
    if rows := [row for row in found.get("harness", []) if "difference" in row]:
        figures["harness"] = plots.scores({f"{r['task']}, {r['metric']}, {r['variant']}": _gap(r) for r in rows})
    if rows := found.get("ruler"):
        (lengths, curves) = _curves([{**row, "domain": ""} for row in rows], "length")[""]
        figures["ruler"] = plots.ruler(lengths, curves, len({row["task"] for row in found["ruler by task"]}))
    if rows := found.get("theory"):
        at = {(row["change"], row["target"]): _mean(row) for row in rows if row["variant"] == "on"}
        targets = list(dict.fromkeys(target for _, target in at))
        figures["theory"] = plots.theory(targets, *([at[x, t] for t in targets] for x in ("right", "others")))
    return figures


def _curves(rows: Rows, x: str) -> dict[str, tuple[list[Any], dict[str, list[Mean]]]]:
    """Domain -> (values of ``x``, variant -> means), each domain's variants at the same places."""
    found: dict[str, tuple[list[Any], dict[str, list[Mean]]]] = {}
    for domain in dict.fromkeys(row["domain"] for row in rows):
        mine = [row for row in rows if row["domain"] == domain]
        places = list(dict.fromkeys(row[x] for row in mine))
        curves: dict[str, list[Mean]] = {}
        for row in mine:
            curves.setdefault(row["variant"], []).append(_mean(row))
        found[domain] = places, curves
    return found


def _mean(row: Mapping[str, Any]) -> Mean:
    return Mean(row["value"], row["low"], row["high"])


def _gap(row: Mapping[str, Any]) -> Mean:
    return Mean(row["difference"], row["difference_low"], row["difference_high"])


def _heat_maps(rows: Rows) -> dict[str, "Figure"]:
    figures = {}
    for kind in dict.fromkeys(row["kind"] for row in rows):
        mine = [row for row in rows if row["kind"] == kind]
        lengths, depths = (sorted({row[key] for row in mine}) for key in ("length", "depth"))
        shares: dict[str, np.ndarray] = {}
        for row in mine:
            share = shares.setdefault(row["variant"], np.full((len(depths), len(lengths)), np.nan))
            share[depths.index(row["depth"]), lengths.index(row["length"])] = row["value"]
        chance = mine[0].get("chance", 0.1)
        figures[f"needle-{kind}"] = plots.heat_maps(f"Needle, {kind}", lengths, depths, shares, chance)
    return figures


def _memory(rows: Rows) -> "Figure":
    distances, mentions, conditions = (
        list(dict.fromkeys(row[key] for row in rows)) for key in ("distance", "mentions", "condition")
    )
    at = {(row["distance"], row["mentions"], row["condition"]): _mean(row) for row in rows}
    words = {"none": "not read", "memory": "read, then dropped", "context": "read, in context"}
    shares = {words.get(c, c): [[at[d, m, c] for m in mentions] for d in distances] for c in conditions}
    return plots.memory("read, then ask", distances, mentions, shares)


# -- files -------------------------------------------------------------------------------------------------------------


def _finite(value: Any) -> Any:
    """JSON has no nan: null instead."""
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _write_csv(path: Path, found: Mapping[str, Rows]) -> None:
    """All tables below each other in one: column ``table`` first, empty where a table has no such column."""
    names = list(dict.fromkeys(name for rows in found.values() for row in rows for name in row))
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["table", *names], restval="")
        writer.writeheader()
        for table, rows in found.items():
            for row in rows:
                writer.writerow({"table": table, **row})


def _page(
    found: Mapping[str, Rows], said: Sequence[str], figures: Mapping[str, "Figure"], plan: Mapping[str, Any]
) -> str:
    title = f"Does adapting help? {plan['model']}"
    parts = [f"<h1>{html.escape(title)}</h1>", "<div class=verdict>"]
    parts += [f"<p>{html.escape(line)}</p>" for line in said] or ["<p>Nothing was compared.</p>"]
    parts.append("</div>")
    for figure in figures.values():
        parts.append(f"<figure>{_svg(figure)}</figure>")
    for name, rows in found.items():
        parts.append(f"<h2>{html.escape(name)}</h2>{_table(rows)}")
    parts.append(
        "<p>Intervals are 95% bootstrap intervals over documents; differences are paired, against updates off.</p>"
        f"<details><summary>What was run</summary><pre>{html.escape(json.dumps(plan, indent=1))}</pre></details>"
    )
    head = f"<meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _svg(figure: "Figure") -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg")
    return text.getvalue().split("?>", 1)[-1].split('dtd">', 1)[-1]


def _table(rows: Rows) -> str:
    """Interval and difference in one cell each."""
    hidden = {"low", "high", "difference_low", "difference_high"}
    names = [name for name in dict.fromkeys(n for row in rows for n in row) if name not in hidden]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "".join(f"<tr>{''.join(_cell(row, name) for name in names)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None:
        return "<td></td>"
    if name in ("value", "difference"):
        low, high = (row["low"], row["high"]) if name == "value" else (row["difference_low"], row["difference_high"])
        if np.isnan(low):
            return f"<td>{value:.3f}</td>"
        is_clear = (high < 0 or low > 0) and row.get("documents", 0) >= ENOUGH
        better = " class=better" if name == "difference" and is_clear else ""
        sign = "+" if name == "difference" else ""
        return f"<td{better}>{value:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})</td>"
    return f"<td>{html.escape(f'{value:.3g}' if isinstance(value, float) else str(value))}</td>"
