"""Files that an evaluation writes: ``report.html`` with everything in it, JSON, CSV, and the pictures."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..plots import add_heading
from ..records import about, write_json
from .paired import ENOUGH
from .runner import read_seconds
from .suites import SUITES, Record, Tables, module_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = Path(__file__).with_name("report.html")


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
    return {name: rows for suite in SUITES for name, rows in module_of(suite).tables(records).items() if rows}


def verdicts(found: Tables) -> list[str]:
    """Return sentences: do the updates help, where, and if not, what to try."""
    return [line for suite in _with("verdicts") for line in suite.verdicts(found)]


def pictures(found: Tables, plan: Mapping[str, Any]) -> dict[str, "Figure"]:
    """Return figures by file name, those that the tables allow; their titles begin with the model."""
    drawn = {name: figure for suite in _with("figures") for name, figure in suite.figures(found, plan).items()}
    for figure in drawn.values():
        add_heading(figure, f"{plan['model']}: {figure.get_suptitle()}")
    return drawn


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
    template = Environment(autoescape=True).from_string(PAGE.read_text(encoding="utf-8"))
    return template.render(
        title=f"Does adapting help? {plan['model']}",
        said=said,
        pictures=map(_svg, figures.values()),
        tables=[(name, columns[name], rows) for name, rows in found.items()],
        cell=_cell,
        plan=json.dumps(plan, indent=1),
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
