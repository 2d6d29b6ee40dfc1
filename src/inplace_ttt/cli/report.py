"""The demo's result for a person: tables, a chart, and sentences."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..demo.names import LIKELY, Names
from ..demo.result import DemoResult
from ..plots import ON, save_picture, smooth, smoothing, terminal_chart
from ..shipped import DEFAULT_MODEL
from .usage import size

NARROW = 64
"""Terminals of fewer columns have tables without lines."""
VERDICTS = {
    "better": "Updates helped: after the first one the loss is {gain:.3f} nats per token lower with them{error}.",
    "worse": "Updates HURT here: after the first one the loss is {gain:.3f} nats per token HIGHER with them{error}.",
    "no clear difference": "Updates made no clear difference here: {signed:+.3f} nats per token{error}.",
}


def show(result: DemoResult, console: Console) -> None:
    """Prints everything but the picture."""
    c, source = result.comparison, result.source
    whole = source.whole and result.tokens.total <= len(result.tokens.ids)
    what = f"{source.path} ({source.size / 1000:,.0f} kB" + (")" if whole else f", its first {c.tokens:,} tokens)")
    console.print(f"{result.model} reads {what}\n", highlight=False, soft_wrap=not console.is_terminal, markup=False)
    console.print(_positions(result, console))
    console.print(_sentence(result))
    width = smoothing(c.tokens, c.chunk_size)
    console.print(f"\nLoss by position, smoothed over {width:,} tokens: [bold {ON}]solid = updates on[/], dotted = off")
    on, off = (smooth(values, c.chunk_size, width) for values in (c.on, c.off))
    columns = min(max(console.width - 14, 20), 90)
    console.print(terminal_chart(on, off, columns=columns, ascii_only=console.options.ascii_only), highlight=False)
    console.print()
    _show_names(result.names, console)
    _show_cost(result, console)


def picture(result: DemoResult, path: Path) -> None:
    c = result.comparison
    width = smoothing(c.tokens, c.chunk_size)
    shipped, name = result.model == DEFAULT_MODEL.name, Path(result.model.removesuffix(".gguf")).name
    losses = f"{c.on.mean():.2f} with updates, {c.off.mean():.2f} without"
    save_picture(
        path,
        c.on,
        c.off,
        c.chunk_size,
        title=f"{result.source.path.name}: what updates gain",
        subtitle=f"{'the shipped model' if shipped else name}: {losses}, smoothed over {width:,} tokens",
        width=width,
    )


def _table(console: Console, title: str, show_footer: bool = True) -> Table:
    """Make a table; in a narrow terminal without lines, which would take the room of its numbers."""
    lines: dict[str, Any] = {"box": None, "padding": (0, 1, 0, 0)} if console.width < NARROW else {}
    return Table(title=title, title_justify="left", title_style="bold", show_footer=show_footer, **lines)


def _positions(result: DemoResult, console: Console) -> Table:
    c = result.comparison
    table = _table(console, "Loss in nats per token (on - off below 0: updates help)")
    table.add_column("tokens", "all", justify="right")
    table.add_column("updates so far", justify="right")
    table.add_column("updates on", f"{c.on.mean():.3f}", justify="right")
    table.add_column("updates off", f"{c.off.mean():.3f}", justify="right")
    table.add_column("on - off", f"{c.on.mean() - c.off.mean():+.3f}", justify="right")
    for on, off in c.buckets():
        first, last = (on.start - 1) // c.chunk_size, (on.end - 2) // c.chunk_size
        table.add_row(
            f"{on.start:,} - {on.end - 1:,}",
            f"{first}" if first == last else f"{first} - {last}",
            f"{on.loss:.3f}",
            f"{off.loss:.3f}",
            f"{on.loss - off.loss:+.3f}",
        )
    return table


def _sentence(result: DemoResult) -> Text:
    gain, error = result.comparison.gain()
    said = "" if error is None else f" (standard error {error:.3f})"
    style = {"better": "bold green", "worse": "bold red"}.get(result.verdict, "bold yellow")
    return Text(VERDICTS[result.verdict].format(gain=abs(gain), signed=-gain, error=said), style)


def _show_names(names: Names | None, console: Console) -> None:
    if names is None:
        console.print("This model attends to the whole text, so no name in it is out of sight.\n")
        return
    if not names.count:
        console.print(f"No name returns whose last mention lies outside the window of {names.window:,} tokens.\n")
        return
    console.print(
        f"In {names.count:,} places a name returns whose last mention lies outside the window of {names.window:,} "
        f"tokens. Updates change its log-probability by {names.mean_gain:+.2f} nats on average. "
        f"p is {LIKELY:.0%} or more only with updates on {names.found:,} times, only with updates off {names.lost:,}.",
        highlight=False,
    )
    if not names.places:
        console.print()
        return
    console.print()
    table = _table(console, f"Names with p of {LIKELY:.0%} or more only with updates on", show_footer=False)
    table.add_column("what came before, and the name", ratio=1, overflow="fold")
    for name in ("token", "last seen", "p on", "p off"):
        table.add_column(name, justify="right", no_wrap=True)
    room = max(console.width - 52, 20)
    for p in names.places:
        keep = max(room - len(p.name) - 1, 0)
        left = p.context if len(p.context) + len(p.name) <= room else "…" + p.context[len(p.context) - keep :]
        text = Text(left, "dim").append(p.name, f"bold {ON}")
        table.add_row(text, f"{p.position:,}", f"{p.ago:,} ago", _percent(p.on), _percent(p.off))
    console.print(table)
    console.print(f"(Through its stacked layers, attention reaches {names.reach:,} tokens back.)\n", style="dim")


def _percent(p: float) -> str:
    """Two digits that count; tiny ones as a bound."""
    return f"{p:.0%}" if p >= 0.1 else f"{p:.1%}" if p >= 0.01 else f"{p:.2%}" if p >= 0.0001 else "<0.01%"


def _show_cost(result: DemoResult, console: Console) -> None:
    c = result.comparison
    table = _table(console, "What the fast weights did")
    table.add_column("layer", "all")
    table.add_column("updates", f"{sum(layer.updates for layer in c.layers):,}", justify="right")
    table.add_column("state", size(sum(layer.state_bytes for layer in c.layers)), justify="right")
    table.add_column("change / weight", justify="right")
    for layer in c.layers:
        change = "unknown" if layer.relative_norm is None else f"{layer.relative_norm:.3g}"
        table.add_row(f"{layer.index}", f"{layer.updates:,}", size(layer.state_bytes), change)
    console.print(table)
    console.print(
        f"{c.updates:,} updates in each of {len(c.layers)} layers, one every {c.chunk_size:,} tokens. "
        f"{c.tokens:,} tokens read in {c.seconds_on:.1f} s with updates on ({c.tokens / c.seconds_on:,.0f} tokens/s), "
        f"in {c.seconds_off:.1f} s off ({c.tokens / c.seconds_off:,.0f} tokens/s).",
        highlight=False,
    )
