"""Tables and the picture of what a pretrained model gains by the loss, from benchmarks/results/reading.

python benchmarks/summarise_reading.py [--plot docs/images/reading.png] [--plot-stream docs/images/reading-stream.png]
"""

import argparse
import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "reading"


def records() -> list[dict[str, Any]]:
    """All records, by model, window, length and gain."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.rglob("*.json"))]
    return sorted(found, key=lambda r: (r.get("window") or 0, r.get("tokens", 0), -gain(r)))


def gain(record: dict[str, Any]) -> float:
    """Mean gain over the domains."""
    domains = record.get("domains", {}).values()
    return sum(d["gain"] for d in domains) / len(domains) if domains else 0


def kind_of(record: dict[str, Any]) -> str:
    """Which table a record belongs to."""
    if "curve" in record or "prompts" in record:
        return "none"
    if "shape" in record:
        return "cost"
    if "method" in record["settings"]:
        return "rivals"
    if record["tokens"] > 100_000:
        return "streams"
    if "shuffled" in record["domains"]:
        return "foreign"
    return "gain" if record["model"] == "smollm2" else "models"


def reads(r: dict[str, Any]) -> list[str]:
    """Cells that say how a record was read: attention, tokens, layers, C, r, decay."""
    s = r["settings"]
    size = s.get("update_size") or f"{s.get('rule')}, lr {s.get('lr')}"
    cells = [f"window {r['window']}" if r["window"] else "full", f"{r['tokens']:,}", f"`{s['layers']}`"]
    return [*cells, str(s["chunk_size"]), f"{size:g}" if isinstance(size, float) else size, f"{s.get('decay', 0):g}"]


def gains(r: dict[str, Any], *, quarter: bool = True) -> list[str]:
    """Cells of both domains: gain, over the last quarter, own."""
    cells = []
    for name in ("books", "code"):
        d = r["domains"][name]
        own = f"{d['own_gain']:.3f}" if "own_gain" in d else ""
        cells += [f"{d['gain']:.3f}", *([f"{d['gain_last_quarter']:.3f}"] if quarter else []), own]
    return cells


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows))


HOW = ["attention", "tokens", "layers", "C", "r", "decay"]
BOTH = ["books", "last quarter", "own", "code", "last quarter", "own"]


def tables(found: list[dict[str, Any]]) -> dict[str, str]:
    """Markdown by name, of the kinds that have records."""
    by: dict[str, list[dict[str, Any]]] = {}
    for record in found:
        by.setdefault(kind_of(record), []).append(record)
    made: dict[str, str] = {}
    if rows := by.get("gain"):
        made["gain"] = markdown([*HOW, *BOTH], [[*reads(r), *gains(r)] for r in rows])
    if rows := sorted(by.get("models", []), key=lambda r: (r["model"], -gain(r))):
        made["other models"] = markdown(
            ["model", *HOW[1:], *BOTH], [[r["model"], *reads(r)[1:], *gains(r)] for r in rows]
        )
    if rows := sorted(by.get("rivals", []), key=lambda r: (r["settings"]["chunk_size"], -gain(r))):
        made["rivals"] = markdown(
            ["learns", "by", "lr", "C", "books", "own", "code", "own"],
            [[*rival(r), *gains(r, quarter=False)] for r in rows],
        )
    if rows := by.get("streams"):
        made["streams"] = markdown(
            ["text", "streams", *HOW[1:2], *HOW[3:], "gain", "last quarter", "worst stretch"],
            [[*stream, *reads(r)[1:2], *reads(r)[3:], *values] for r in rows for stream, values in stretches(r)],
        )
    if rows := by.get("foreign"):
        names = list(dict.fromkeys(name for r in rows for name in r["domains"]))
        worst = [{name: f"{d['worst_stretch']:+.3f}" for name, d in r["domains"].items()} for r in rows]
        made["foreign"] = markdown(
            ["model", "attention", "r", *names],
            [
                [r["model"], reads(r)[0], reads(r)[4], *(x.get(n, "") for n in names)]
                for r, x in zip(rows, worst, strict=True)
            ],
        )
    if other := [r for r in by.get("gain", []) if any("other_domains" in d for d in r["domains"].values())]:
        cells = [
            [*reads(r)[:1], *reads(r)[3:], domain, name, f"{x['before']:.3f}", f"{x['after']:.3f}",
             f"{x['after'] - x['before']:+.3f}"]
            for r in other for domain, d in r["domains"].items() for name, x in d.get("other_domains", {}).items()
        ]  # fmt: skip
        made["other domains"] = markdown(["attention", *HOW[3:], "read", "then", "before", "after", "change"], cells)
    if rows := by.get("cost"):
        made["cost"] = markdown(
            ["shape", "layers", "attention", "plain (s)", "by the loss (s)", "speed", "with all logits", "extra peak"],
            [cost(r) for r in rows],
        )
    return made


def rival(r: dict[str, Any]) -> list[str]:
    """Cells that say what learned how."""
    s = r["settings"]
    if s["method"] == "loss":
        return ["**this library**", "sized", f"{s['update_size']:g}", str(s["chunk_size"])]
    return [s["method"], s["optimizer"], f"{float(s['lr']):g}", str(s["chunk_size"])]


def streams_of(r: dict[str, Any]) -> dict[str, list[list[float]]]:
    """The gains of a stream's record by domain, document and stretch; domains read together are rows of one batch."""
    found: dict[str, list[list[float]]] = {}
    for names, d in r["domains"].items():
        rows, shared = d["gain_by_stretch"], names.split(" and ")
        each = len(rows) // len(shared)
        found |= {name: rows[i * each : (i + 1) * each] for i, name in enumerate(shared)}
    return found


def stretches(r: dict[str, Any]) -> list[tuple[list[str], list[str]]]:
    """Cells of each domain of a stream: means over its stretches, and the worst stretch that begins at any token."""
    worst = [x for d in r["domains"].values() for x in d["worst_stretch_by_document"]]
    cells = []
    for name, rows in streams_of(r).items():
        own, worst = worst[: len(rows)], worst[len(rows) :]
        mean = lambda part: sum(map(sum, part)) / sum(map(len, part))  # noqa: E731
        last = mean([row[3 * len(row) // 4 :] for row in rows])
        cells.append(([name, str(len(rows))], [f"{mean(rows):.3f}", f"{last:.3f}", f"{max(own):+.3f}"]))
    return cells


def cost(r: dict[str, Any]) -> list[str]:
    """Cells of a row of the cost."""
    speed, memory = r["speed"], r["memory"]
    extra = (
        f"{memory['extra_gib']:.2f} GiB"
        if "extra_gib" in memory
        else "out of memory"
        if "loss_failed" in memory
        else ""
    )
    return [
        r["shape"], str(r["adapting"]), r["attention"], f"{speed['seconds']['plain']:.2f}",
        f"{speed['seconds']['loss']:.2f}", f"{speed['loss over plain']:.2f}",
        f"{speed['loss over plain, all logits']:.2f}", extra,
    ]  # fmt: skip


def draw(path: Path) -> None:
    """Loss by position, updates on and off with a window, and with full attention."""
    from matplotlib.ticker import EngFormatter

    from inplace_ttt.plots import OFF, ON, add_heading, add_legend, add_title, save, styled

    window, full, long = (
        json.loads((RESULTS / f"smollm2-{name}.json").read_text())
        for name in ("window-c64-r2e-3", "full-c64-r1e-3", "window-long-c128-r2e-3")
    )
    figure, panels = styled(8.0, 5.6, 2, 2)
    for row, domain in enumerate(("books", "code")):
        for panel, curves, title in (
            (
                panels[row][0],
                (
                    (window, "off_by_position", "window 512, updates off", OFF, "-"),
                    (window, "on_by_position", "window 512, learning", ON, "-"),
                    (full, "off_by_position", "full attention, updates off", OFF, ":"),
                    (full, "on_by_position", "full attention, learning", ON, ":"),
                ),
                f"{domain}, 8,192 tokens",
            ),
            (
                panels[row][1],
                (
                    (long, "off_by_position", "window 512, updates off", OFF, "-"),
                    (long, "on_by_position", "window 512, learning", ON, "-"),
                ),
                f"{domain}, 32,768 tokens",
            ),
        ):
            for record, key, label, colour, style in curves:
                values = record["domains"][domain][key]
                step = max(len(values) // 16, 1)
                means = [sum(values[i : i + step]) / len(values[i : i + step]) for i in range(0, len(values), step)]
                places = [512 * step * (i + 0.5) for i in range(len(means))]
                panel.plot(places, means, style, color=colour, lw=1.5, label=label)
            count = len(curves[0][0]["domains"][domain]["gain_by_document"])
            add_title(panel, f"{title}, n = {count}")
            panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panels[row][0].set_ylabel("loss (nats per token)")
    for panel in panels[1]:
        panel.set_xlabel("position in the text (tokens)")
    add_heading(figure, "SmolLM2-135M: loss by position, learning by the loss itself")
    add_legend(figure)
    save(figure, path)


def draw_stream(path: Path) -> None:
    """The gain of the long stream by 5,000 tokens."""
    from matplotlib.ticker import EngFormatter

    from inplace_ttt.plots import TEXTS, add_legend, add_title, save, styled

    figure, ((axis,),) = styled(8.0, 2.9)
    record = json.loads((RESULTS / "smollm2-stream-auto.json").read_text())
    for colour, (name, rows) in zip(TEXTS.values(), streams_of(record).items(), strict=True):
        axis.plot([5000 * (i + 0.5) for i in range(len(rows[0]))], rows[0], color=colour, lw=1.4, label=name)
    axis.axhline(0, color="black", lw=0.8)
    add_title(axis, "SmolLM2-135M: gain in each 5,000 tokens, n = 1 stream each")
    axis.set(xlabel="position in the stream (tokens)", ylabel="updates off - on (nats per token)")
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    add_legend(figure)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, default=None)
    parser.add_argument("--plot-stream", type=Path, default=None)
    arguments = parser.parse_args()
    for name, table in tables(records()).items():
        print(f"{name}:\n\n{table}\n")
    if arguments.plot:
        draw(arguments.plot)
    if arguments.plot_stream:
        draw_stream(arguments.plot_stream)


if __name__ == "__main__":
    main()
