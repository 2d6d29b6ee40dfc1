"""The picture and the chart show the figures."""

import numpy as np
import pytest
from matplotlib.image import imread

from inplace_ttt.plots import running_mean, save_picture, smooth, terminal_chart

ON, OFF = (0xC2, 0x41, 0x0C), (0x64, 0x74, 0x8B)


def losses(gap: float, n: int = 600, cut: int = 100) -> tuple[np.ndarray, np.ndarray]:
    off = np.full(n, 4.0)
    on = off - gap * (np.arange(n) >= cut)
    return on, off


def height(image: np.ndarray, colour: tuple[int, int, int], column: int) -> float:
    """Mean row of a curve's colour in the lower panel at a column."""
    pixels = (image[:, :, :3] * 255).round().astype(int)
    rows = np.flatnonzero((np.abs(pixels[len(image) * 58 // 100 :, column] - colour).max(1)) < 8)
    assert len(rows), f"no {colour} at column {column}"
    return float(rows.mean())


@pytest.mark.parametrize("gap", [0.5, -0.5])
def test_picture(tmp_path, gap):
    path = tmp_path / "new" / "p.png"
    save_picture(path, *losses(gap), 100, "title", "subtitle")
    image = imread(path)
    assert image.shape[:2] == (840, 1200)
    on, off = height(image, ON, 900), height(image, OFF, 900)
    assert (on > off) == (gap > 0)  # a lower loss is lower in the picture
    assert abs(on - off) > 50


@pytest.mark.parametrize("suffix", [".pdf", ".svg"])
def test_other_formats(tmp_path, suffix):
    save_picture(tmp_path / f"p{suffix}", *losses(0.1), 100, "title", "subtitle")
    assert (tmp_path / f"p{suffix}").stat().st_size > 5000


def test_running_mean():
    values = np.random.default_rng(0).normal(size=50)
    for width in (1, 4, 9, 200):
        wanted = [values[max(i - width // 2, 0) : i + width // 2 + 1].mean() for i in range(50)]
        np.testing.assert_allclose(running_mean(values, width), wanted)
    assert len(running_mean(values[:0], 5)) == 0


def test_smoothing_does_not_leak_over_the_first_update():
    on, off = losses(1.0)
    gap = smooth(off, 100, 50) - smooth(on, 100, 50)
    np.testing.assert_allclose(gap, np.arange(600) >= 100, atol=1e-12)


@pytest.mark.parametrize("ascii_only", [False, True])
def test_chart(ascii_only):
    on, off = losses(0.5)
    lines = terminal_chart(on, off, columns=60, ascii_only=ascii_only).plain.splitlines()
    assert all(line.isascii() for line in lines) == ascii_only
    labels = [float(line[:7]) for line in lines[:13:3]]
    assert labels[0] >= 4
    assert labels[-1] <= 3.5
    assert np.allclose(np.diff(labels), labels[1] - labels[0])
    body = [line[8:] for line in lines[:13]]
    top = next(r for r, line in enumerate(body) if line[-1].strip())
    bottom = next(r for r in reversed(range(13)) if body[r][-1].strip())
    scale = (labels[0] - labels[-1]) / 12
    assert labels[0] - scale * top == pytest.approx(4.0, abs=scale)
    assert labels[0] - scale * bottom == pytest.approx(3.5, abs=scale)
    assert [int(x.replace(",", "")) for x in lines[-1].split()] == [0, 150, 300, 450, 600]


def test_chart_of_equal_curves():
    assert len(terminal_chart(np.full(50, 2.0), np.full(50, 2.0)).plain.splitlines()) == 15
