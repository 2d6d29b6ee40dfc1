"""Draw the method: for the first page in one picture; for docs/method.md a document in chunks, and a forward call.

python benchmarks/draw_method.py [--out docs/images]
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

BLUE, ORANGE, GREEN, GREY = "#3465a4", "#c4641a", "#3d8b37", "#777777"
CAPTION = (
    "All tokens of a chunk are read with one weight, which the chunks before it left. A target may look at all tokens\n"
    "of its own chunk: the chunk's update counts from the next chunk on, so nothing is read with what comes later."
)
FILL = {BLUE: "#e4ecf7", ORANGE: "#fbeadb", GREEN: "#e3f2e1", GREY: "#f1f1f1"}


def canvas(width: float, height: float) -> tuple[plt.Figure, Axes]:
    """Return a figure whose axes count in inches, without any ticks."""
    figure = plt.figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def box(
    axes: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    text: str,
    colour: str,
    size: float = 9,
    **style: object,
) -> None:
    """Draw a box with its lower left corner at x, y."""
    rounded = FancyBboxPatch(
        (x, y), width, height, "round,pad=0,rounding_size=0.05", ec=colour, fc=FILL[colour], lw=1.2, **style
    )
    axes.add_patch(rounded)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", size=size, linespacing=1.35)


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = GREY, bend: float = 0.0
) -> None:
    """Draw an arrow."""
    style = {
        "arrowstyle": "-|>",
        "color": colour,
        "lw": 1.3,
        "connectionstyle": f"arc3,rad={bend}",
        "shrinkA": 0,
        "shrinkB": 1,
    }
    axes.annotate("", end, start, arrowprops=style)


def overview() -> plt.Figure:
    """Draw how three chunks of a text are read and learned, one after another."""
    figure, axes = canvas(10.0, 4.35)
    texts = (
        "It was the best of times,\nit was the worst of times,",
        "it was the age of wisdom,\nit was the age of ...",
        "it was the epoch of belief,\nit was the epoch of ...",
    )
    width, gap, left, layer, text, state = 2.42, 0.62, 0.5, 1.68, 3.32, 0.5
    for i, words in enumerate(texts):
        x = left + i * (width + gap)
        middle = x + width / 2
        box(axes, x, text, width, 0.62, words, BLUE, 9)
        axes.text(middle, text + 0.76, f"chunk {i + 1}", ha="center", size=9.5, color=BLUE)
        box(axes, x, layer, width, 1.32, "", GREY)
        axes.text(middle, layer + 1.11, "the model, as it is", ha="center", va="center", size=9, color="0.3")
        box(axes, x + 0.28, layer + 0.14, width - 0.56, 0.74, f"last MLP projection\n$W_0 + \\eta\\,S_{i}$", ORANGE, 10)
        arrow(axes, (middle, text), (middle, layer + 1.34), BLUE)
        box(axes, x + 0.28, state, 0.92, 0.52, "$S_0 = 0$" if i == 0 else f"$S_{i}$", GREEN, 11)
        arrow(axes, (x + 0.74, state + 0.52), (x + 0.74, layer + 0.12), GREEN)
        end = (x + width + gap + 0.26, state + 0.26)
        axes.plot([x + width - 0.62, x + width - 0.62], [layer + 0.14, state + 0.26], color=ORANGE, lw=1.3)
        arrow(axes, (x + width - 0.62, state + 0.26), (end[0] - (0.25 if i == 2 else 0), end[1]), ORANGE)
        axes.text(x + width - 0.52, layer - 0.3, "one gradient\nstep", size=8.5, color=ORANGE, va="center")
        axes.plot([x + 1.2, x + width - 0.62], [state + 0.26] * 2, color=GREEN, lw=1.3)
    axes.text(left + 3 * (width + gap) + 0.02, state + 0.26, "...", size=13, color=GREEN, va="center")
    axes.text(left, 0.14, "Each chunk is read with what the chunks before it wrote; then it writes its own.", size=9.5)
    return figure


def chunk() -> plt.Figure:
    """Draw three chunks of four tokens and one that is not complete."""
    figure, axes = canvas(10.6, 5.0)
    C, side, left, gap = 4, 0.48, 1.05, 0.36
    width = C * side

    def begin(i: int) -> float:
        return left + i * (width + gap)

    top, values, states = 3.35, 2.1, 0.5
    axes.text(0.15, top + 0.24, "tokens", size=9, va="center", color=GREY)
    axes.text(0.15, values + 0.24, "targets", size=9, va="center", color=GREY)
    axes.text(0.15, states + 0.28, "state", size=9, va="center", color=GREY)
    for i in range(4):
        x, full = begin(i), i < 3
        n = C if full else 2
        for t in range(C):
            colour = BLUE if t < n else GREY
            number = i * C + t
            if t < n:
                box(axes, x + t * side + 0.03, top, side - 0.06, 0.48, f"$z_{{{number}}}, u_{{{number}}}$", BLUE, 6.5)
            else:
                box(axes, x + t * side + 0.03, top, side - 0.06, 0.48, "", colour, ls=":")
            if full:
                box(axes, x + t * side + 0.03, values, side - 0.06, 0.48, f"$v_{{{number}}}$", ORANGE, 8.5)
        label = rf"chunk {i}: $o_t = (W_0 + \eta S_{i})\,z_t$"
        axes.plot([x + 0.03, x + width - 0.03], [top + 0.6] * 2, color=BLUE, lw=1.3)
        axes.text(x + width / 2, top + 0.8, label, ha="center", size=9, color=BLUE)
        box(axes, x - 0.34, states, 0.62, 0.56, "$S_0 = 0$" if i == 0 else f"$S_{i}$", GREEN, 9)
        axes.plot([x - 0.03, x - 0.03], [states + 0.56, top + 0.24], color=GREEN, lw=1.3)
        arrow(axes, (x - 0.03, top + 0.2), (x - 0.03, top + 0.64), GREEN)
        if full:
            middle = x + width / 2
            for source, end in ((0, 1), (1, 1), (2, 1), (3, 1)):
                arrow(axes, (x + (source + 0.5) * side, top), (x + (end + 0.5) * side, values + 0.5), ORANGE)
            axes.plot([x + 0.03, x + width - 0.03], [values - 0.12] * 2, color=ORANGE, lw=1.3)
            arrow(axes, (middle, values - 0.12), (middle, states + 1.08), ORANGE)
            box(axes, middle - 0.6, states + 0.66, 1.2, 0.42, rf"$\Delta_{i} = \sum_t v_t z_t^{{\top}}$", ORANGE, 8.5)
            arrow(axes, (middle, states + 0.66), (middle, states + 0.3), ORANGE)
            arrow(axes, (x + 0.28, states + 0.28), (begin(i + 1) - 0.34, states + 0.28), GREEN)
    x = begin(3)
    axes.text(
        x + width / 2 + 0.12,
        values + 0.24,
        "not complete:\nno update yet,\nits tokens wait",
        ha="center",
        va="center",
        size=8.5,
        color=GREY,
    )
    axes.text(left, 0.17, r"$S_{i+1} = (1 - decay)\,S_i + \Delta_i$", size=10, color=GREEN)
    axes.text(left + 3.0, 0.17, "the next document begins with $S = 0$ and a new grid of chunks", size=9, color=GREY)
    axes.text(0.15, 4.5, CAPTION, linespacing=1.4, size=9)
    return figure


def call() -> plt.Figure:
    """Draw one forward call: transformers' modules, the hooks beside them, the fast weights at the right."""
    figure, axes = canvas(11.4, 8.0)
    a, b, c = 0.25, 3.35, 7.95  # columns
    wa, wb, wc = 2.45, 3.75, 3.25
    axes.text(a + wa / 2, 7.75, "transformers", ha="center", size=11, color=BLUE)
    axes.text(b + wb / 2, 7.75, "hooks: hf/context.py, hf/sites.py", ha="center", size=11, color=ORANGE)
    axes.text(c + wc / 2, 7.75, "hf/calls.py and core/", ha="center", size=11, color=GREEN)

    layer = FancyBboxPatch((0.1, 1.25), 7.2, 4.3, "round,pad=0,rounding_size=0.1", ec=GREY, fc="none", lw=1, ls="--")
    axes.add_patch(layer)
    axes.text(b, 1.36, "in every adapting layer", size=9, color=GREY)

    before = "Runtime.before_model (pre-hook)\nmakes a CallContext with the call, and passes it\non as the keyword {}"
    attention = "LayerSite.before_attention (pre-hook) takes the\ncontext; Runtime.before_attention removes the\n{}"
    rows = [
        (6.85, "base model begins", before.format("inplace_ttt_context")),
        (5.8, "token embeddings", "Runtime.after_embedding (hook)\nnotes them: u of input_embed"),
        (4.7, "attention", attention.format("keyword before attention sees it")),
        (3.7, "MLP begins", "LayerSite.before_mlp (pre-hook)\nnotes its input: u of hidden_states"),
        (
            2.6,
            "last projection, given z:\na FastWeight (hf/linear.py)\nwith the same parameters",
            "LayerSite.project\nfinds u, the target and W0,\nand asks the call",
        ),
        (1.65, "MLP ends", "LayerSite.after_mlp (hook)\nraises if the projection was not called"),
        (0.3, "base model ends", "Runtime.after_model (hook)\ncall.end(): a step counts its token"),
    ]
    heights = [0.75, 0.62, 0.75, 0.62, 0.78, 0.62, 0.62]
    for (y, module, hook), height in zip(rows, heights, strict=True):
        box(axes, a, y, wa, height, module, BLUE)
        box(axes, b, y, wb, height, hook, ORANGE, 8.5)
        arrow(axes, (a + wa, y + height / 2), (b, y + height / 2))
    for (y, *_), (below, *_), height in zip(rows, rows[1:], heights[1:], strict=False):
        arrow(axes, (a + wa / 2, y), (a + wa / 2, below + height), BLUE)

    kinds = (
        "the call, and its ChunkTable (core/chunks.py)\nWholeCall: whole rows, or pieces behind a cache\n"
        "Step: one token a row    SliceCall: part of a row"
    )
    box(
        axes,
        c,
        6.72,
        wc,
        0.88,
        kinds,
        GREEN,
        8.5,
    )
    arrow(axes, (b + wb, 7.2), (c, 7.2))
    arrow(axes, (b + wb, 3.12), (c, 3.92), GREEN)
    box(axes, c, 3.6, wc, 0.62, "call.project(site, module, z, u, plain)", GREEN)
    steps = [
        "past: pending tokens, from the cache",
        "target: v of complete chunks",
        "scan: read and update, a fast path\nor the generic loop (core/scan.py)",
        "recall: what pairs and rank-r forms add",
        "absorb: state and pending tokens,\nback into the cache",
    ]
    frame = FancyBboxPatch((c, 0.3), wc, 3.0, "round,pad=0,rounding_size=0.08", ec=GREEN, fc="none", lw=1.2)
    axes.add_patch(frame)
    axes.text(c + wc / 2, 3.14, "core.read (core/layer.py)", ha="center", va="center", size=9)
    arrow(axes, (c + wc / 2, 3.6), (c + wc / 2, 3.3), GREEN)
    y = 3.0
    for text in steps:
        height = 0.46 if "\n" in text else 0.34
        y -= height + 0.1
        box(axes, c + 0.15, y, wc - 0.3, height, text, GREEN, 8)
    arrow(axes, (c, 2.75), (b + wb, 2.75), GREEN)
    axes.text(7.62, 2.58, "output", ha="center", size=8, color=GREEN)
    box(
        axes,
        c,
        4.95,
        wc,
        0.62,
        "DynamicCache, StaticCache: FastCacheLayer.fast\nholds a FastWeights per layer (core/state.py)",
        GREY,
        8.5,
    )
    arrow(axes, (c + wc / 2, 6.72), (c + wc / 2, 5.57))
    arrow(axes, (c + wc / 2, 4.95), (c + wc / 2, 4.22))
    return figure


def main() -> None:
    """Draw the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "images")
    out = parser.parse_args().out
    for name, draw in (("overview", overview), ("chunk", chunk), ("call", call)):
        draw().savefig(out / f"{name}.png", dpi=130)


if __name__ == "__main__":
    main()
