"""Advice: what is said about layers, settings and correlations is what the records show."""

import numpy as np
import pytest

from inplace_ttt.eval.report import tables, verdicts
from inplace_ttt.eval.suites import diagnostics
from inplace_ttt.eval.suites.diagnostics import interval_of_r


def records(levels: dict[str, float], documents: str = "abcdefgh") -> list[dict]:
    """Loss by variant, eight documents, each with three windows whose overlap and rank go with the gain."""
    found = []
    for number, document in enumerate(documents):
        for window in range(3):
            unit = f"window/{document}/{window}"
            about = {"unit": unit, "document": document, "domain": "code"}
            gain = 0.01 * (3 * number + window)
            for variant, level in levels.items():
                loss = 3 + 0.1 * number + level - (gain if variant != "off" else 0)
                row = {"suite": "nll", "kind": "document", "loss_sum": 100 * loss, "tokens": 100}
                found.append({**about, **row, "variant": variant})
            for layer, wobble in ((0, 0.0), (2, 0.3)):
                noise = wobble * (-1) ** (number + window)
                state = {"key_overlap": 0.5 - gain + noise, "effective_rank": 20 + 100 * gain + 90 * noise}
                rest = dict.fromkeys(("relative_norm", "output_change", "update_norm"))
                found.append({**about, **state, **rest, "suite": "diagnostics", "variant": "on", "layer": layer})
    return found


def said(**levels: float) -> list[str]:
    return verdicts(tables(records({"on": 0.0, "off": 0.3, **{k.replace("_", " "): v for k, v in levels.items()}})))


def test_layers_that_help_and_that_hurt() -> None:
    lines = said(without_layer_0=0.2, without_layer_2=-0.1)
    expected = (
        "code, loss when one layer's updates are switched off: updates help in layer 0 "
        "(+0.200, 95% interval +0.200 to +0.200, n = 8); "
        "hurt in layer 2 (-0.100, 95% interval -0.100 to -0.100, n = 8)."
    )
    assert expected in lines
    few = records({"on": 0.0, "off": 0.3, "without layer 0": 0.2, "without layer 2": -0.1}, "ab")
    line = next(line for line in verdicts(tables(few)) if "switched off" in line)
    assert "layer 0 +0.200, 95% interval +0.200 to +0.200, n = 2; layer 2 -0.100" in line
    assert line.endswith("2 are too few documents for a verdict.")
    assert not any(word in " ".join(verdicts(tables(few))) for word in ("help", "hurt", "harm"))
    assert any("layer 2 does the most harm" in line for line in lines)
    assert not any("does the most harm" in line for line in said(without_layer_0=0.2))


def test_the_best_setting_has_an_interval() -> None:
    found = records({"on": 0.0, "off": 0.3, "lr=0.2": 0.1, "decay=0.02": -0.05, "decay=0.05": 0.02})
    for row in found:
        if row["variant"] == "decay=0.02" and row["document"] == "a":
            row["loss_sum"] -= 100 * 0.04
    (line,) = [line for line in verdicts(tables(found)) if "settings" in line]
    assert line.startswith("code: of 3 other settings, decay=0.02 read best: ")
    assert "-0.055 against the model's own, 95% interval -0.065 to -0.050, n = 8." in line
    assert "confirm it on other text" in line
    worse = verdicts(tables(records({"on": 0.0, "off": 0.3, "lr=0.2": 0.1})))
    assert any("of 1 other setting, lr=0.2 read best, but no better than the model's own" in line for line in worse)


def test_correlations_in_words() -> None:
    lines = said()
    overlap = next(line for line in lines if "overlap of new keys" in line)
    assert overlap.startswith("Over 24 windows, updates gained more with a lower overlap")
    assert "layer 0 (r = -1.00" in overlap
    assert "layer 2" not in overlap
    assert "4 correlations were looked at; one in twenty looks clear by chance." in lines
    assert any("a higher effective rank of the fast weights in layer 0 (r = +1.00" in line for line in lines)
    rows = [{"layer": 0, "figure": "key_overlap", "windows": 12, "r": 0.3}]
    (line,) = diagnostics.verdicts({"which measurements correlate with the gain": rows})
    assert "no layer's overlap of new keys with what was learned correlates clearly" in line


def test_what_to_try_when_updates_hurt() -> None:
    without = [r for r in records({"on": 0.3, "off": 0.0}) if r["suite"] == "nll"]
    lines = verdicts(tables(without))
    assert "updates hurt" in lines[0]
    assert [line.split()[1] for line in lines[1:]] == ["other", "--layers", "--suite"]
    helped = [{**r, "variant": {"on": "off", "off": "on"}[r["variant"]]} for r in without]
    assert len(verdicts(tables(helped))) == 1


@pytest.mark.parametrize(("r", "n"), [(0.5, 30), (-0.73, 13)])
def test_interval_of_a_correlation(r: float, n: int) -> None:
    """Against the distribution of correlations of normal points."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=(4000, n))
    y = r * x + np.sqrt(1 - r * r) * draw.normal(size=(4000, n))
    inside = [
        low <= r <= high for low, high in (interval_of_r(np.corrcoef(a, b)[0, 1], n) for a, b in zip(x, y, strict=True))
    ]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.015)
    assert interval_of_r(0.9, 3) == (-1.0, 1.0)
