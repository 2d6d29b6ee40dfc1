"""Files that an evaluation writes: ``report.html`` with everything in it, JSON, CSV, and the pictures."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..records import about, write_json
from .paired import ENOUGH
from .runner import read_seconds
from .suites import SUITES, Record, Tables, module_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = """\
<!doctype html><html lang=en><head><meta charset=utf-8><title>{{ title }}</title><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1e293b; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: 0.85rem; margin: 0.6rem 0; }
th, td { padding: 0.2rem 0.7rem; text-align: right; border-bottom: 1px solid #e2e8f0; }
th:first-child, td:first-child { text-align: left; } td.better { color: #c2410c; font-weight: 600; }
figure { margin: 1rem 0; } svg { max-width: 100%; height: auto; } .verdict { font-size: 1.05rem; }
details { margin: 0.8rem 0; } pre { background: #f8fafc; padding: 0.8rem; overflow-x: auto; font-size: 0.8rem; }
</style></head><body><h1>{{ title }}</h1><div class=verdict>
{%- for line in said %}<p>{{ line }}</p>{% else %}<p>Nothing was compared.</p>{% endfor %}</div>
{%- for svg in pictures %}<figure>{{ svg | safe }}</figure>{% endfor %}
{%- for name, names, rows in tables %}<h2>{{ name }}</h2>
<table><tr>{% for n in names %}<th>{{ n }}</th>{% endfor %}</tr>
{%- for row in rows %}<tr>{% for n in names %}{% set text, better = cell(row, n) -%}
<td{% if better %} class=better{% endif %}>{{ text }}</td>{% endfor %}</tr>{% endfor %}</table>{% endfor %}
<p>Intervals are 95% bootstrap intervals over documents; differences are paired, against updates off.</p>
<details><summary>What was run</summary><pre>{{ plan }}</pre></details></body></html>
"""


def write(
    directory: Path, records: Sequence[Record], plan: Mapping[str, Any], useless: Sequence[str] = ()
) -> list[str]:
    """Write all files into ``directory``; return the verdicts. ``useless``: why there is nothing to compare."""
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


def tables(records: Sequence[Record]) -> Tables:
    """Return all tables that the records allow, by name."""
    return {name: rows for suite in SUITES for name, rows in module_of(suite).tables(records).items() if rows}


def verdicts(found: Tables) -> list[str]:
    """Return sentences: do the updates help, where, and if not, what to try."""
    return [line for suite in _with("verdicts") for line in suite.verdicts(found)]


def pictures(found: Tables, plan: Mapping[str, Any]) -> dict[str, "Figure"]:
    """Return figures by file name, those that the tables allow."""
    return {name: figure for suite in _with("figures") for name, figure in suite.figures(found, plan).items()}


def _with(function: str) -> list[Any]:
    """Return the modules of the suites that have this function."""
    return [module for module in map(module_of, SUITES) if hasattr(module, function)]


def _finite(value: Any) -> Any:
    """Replace nan and infinities by None, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _write_csv(path: Path, found: Tables) -> None:
    """Write all tables below each other in one: column ``table`` first, empty where a table has no such column."""
    names = list(dict.fromkeys(name for rows in found.values() for row in rows for name in row))
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["table", *names], restval="")
        writer.writeheader()
        for table, rows in found.items():
            for row in rows:
                writer.writerow({"table": table, **row})


def _page(found: Tables, said: Sequence[str], figures: Mapping[str, "Figure"], plan: Mapping[str, Any]) -> str:
    from jinja2 import Environment

    hidden = {"low", "high", "difference_low", "difference_high"}
    columns = {
        name: [n for n in dict.fromkeys(n for r in rows for n in r) if n not in hidden] for name, rows in found.items()
    }
    return (
        Environment(autoescape=True)
        .from_string(PAGE)
        .render(
            title=f"Does adapting help? {plan['model']}",
            said=said,
            pictures=map(_svg, figures.values()),
            tables=[(name, columns[name], rows) for name, rows in found.items()],
            cell=_cell,
            plan=json.dumps(plan, indent=1),
        )
    )


def _svg(figure: "Figure") -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg")
    return text.getvalue().split("?>", 1)[-1].split('dtd">', 1)[-1]


def _cell(row: Record, name: str) -> tuple[str, bool]:
    """Return the text of a table's cell, with its interval, and whether it is a clear difference."""
    value = row.get(name)
    if name not in ("value", "difference") or value is None:
        return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value), False
    low, high = (row["low"], row["high"]) if name == "value" else (row["difference_low"], row["difference_high"])
    if np.isnan(low):
        return f"{value:.3f}", False
    is_clear = name == "difference" and (high < 0 or low > 0) and row.get("documents", 0) >= ENOUGH
    sign = "+" if name == "difference" else ""
    return f"{value:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})", is_clear
