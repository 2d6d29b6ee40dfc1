"""The demo's figures against independent computations."""

import importlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from tiny_models import CHUNK, LAYERS, WINDOW

import inplace_ttt as ittt
from inplace_ttt import text_files
from inplace_ttt.cli.report import show
from inplace_ttt.demo import text
from inplace_ttt.demo.names import Names, NameUse
from inplace_ttt.demo.result import Comparison, DemoResult, LayerUpdates
from inplace_ttt.records import write_json
from inplace_ttt.shipped import DEFAULT_MODEL


def one_pass(model, ids: list[int]) -> np.ndarray:
    """Losses of tokens 1 to N from a single forward without a cache."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none").double().numpy()


@pytest.fixture(scope="module")
def references(folder, tokenizer):
    """(ids, losses on, losses off): off is a model that never had fast weights."""
    ids = tokenizer(folder.text.read_text())["input_ids"]
    model = ittt.from_pretrained(folder.model).eval()
    on = one_pass(model, ids)
    return ids, on, one_pass(ittt.detach(model), ids)


@pytest.mark.parametrize("most", [CHUNK + 1, 4 * CHUNK, 4 * CHUNK - 1, 1030])
def test_figures(demo, references, monkeypatch, most):
    monkeypatch.setattr("inplace_ttt.demo.result.compare.__defaults__", (None, 5 * CHUNK + 3))  # pieces off the grid
    ids, on, off = references
    assert len(ids) > most + 1
    on, off = on[:most], off[:most]  # what follows changes nothing earlier
    figures = demo("--max-tokens", most)
    assert figures["tokens"] == most
    assert figures["loss"] == pytest.approx({"on": on.mean(), "off": off.mean()}, abs=1e-4)
    assert abs(figures["loss"]["on"] - figures["loss"]["off"]) > 1e-3 or most == CHUNK + 1
    assert figures["updates"] == most // CHUNK
    assert [layer["index"] for layer in figures["layers"]] == [0, 2]
    assert [layer["updates"] for layer in figures["layers"]] == [most // CHUNK] * 2
    assert figures["state_bytes"] == 2 * 4 * 32 * 48

    buckets = figures["by_position"]
    assert buckets[0]["start"] == 1
    assert buckets[0]["end"] == CHUNK
    assert buckets[0]["on"] == pytest.approx(buckets[0]["off"], abs=1e-5)
    assert buckets[-1]["end"] == most
    assert [b["start"] for b in buckets[1:]] == [b["end"] + 1 for b in buckets[:-1]]
    assert all((b["start"] - 1) % CHUNK == 0 for b in buckets)
    for part in (*buckets, *figures["by_chunk"]):
        inside = slice(part["start"] - 1, part["end"])
        assert part["on"] == pytest.approx(on[inside].mean(), abs=1e-4)
        assert part["off"] == pytest.approx(off[inside].mean(), abs=1e-4)

    gain = figures["gain_after_first_update"]
    assert gain["mean"] == pytest.approx((off - on)[CHUNK:].mean(), abs=1e-4)
    for label in ("on", "off"):
        assert figures["tokens_per_second"][label] == pytest.approx(most / figures["seconds"][label])


def test_a_whole_file(demo, references):
    figures = demo()
    assert figures["tokens"] == len(references[0]) - 1
    assert "its first" not in figures["printed"]
    assert figures["names"]["window"] == WINDOW
    assert figures["names"]["reach"] == LAYERS * (WINDOW - 1) + 1


def test_printed_figures_are_those_of_the_json(demo):
    figures = demo("--max-tokens", 500)
    printed = figures["printed"]
    for row in (*figures["by_position"], {**figures["loss"], "start": None}):
        wanted = [f"{row['on']:.3f}", f"{row['off']:.3f}", f"{row['on'] - row['off']:+.3f}"]
        lines = [line.replace("│", " ").split() for line in printed.splitlines()]
        assert any(line[-3:] == wanted for line in lines), wanted
    assert "its first 500 tokens" in printed
    assert f"{500 // CHUNK} updates in each of 2 layers, one every {CHUNK} tokens" in printed
    assert f"In {figures['names']['count']:,} places a name returns" in printed
    gain = figures["gain_after_first_update"]["mean"]
    assert {"better": "helped", "worse": "HURT", "no clear difference": f"{-gain:+.3f}"}[figures["verdict"]] in printed


def test_change_of_the_weights(demo, folder, tokenizer):
    """||eta S|| / ||W0||, eta = 1, from a reading of its own."""
    ids = tokenizer(folder.text.read_text())["input_ids"][: 3 * CHUNK]
    model = ittt.from_pretrained(folder.model).eval()
    with torch.no_grad():
        cache = model(input_ids=torch.tensor([ids]), use_cache=True).past_key_values
    figures = demo("--max-tokens", 3 * CHUNK)
    for layer in figures["layers"]:
        S = ittt.fast_weights(cache)[layer["index"]].S[0]
        W0 = model.model.layers[layer["index"]].mlp.down_proj.weight.detach()
        assert layer["relative_norm"] == pytest.approx(float(S.norm() / W0.norm()), rel=1e-4)


def test_model_without_a_window(demo):
    figures = demo("--max-tokens", 200, model="full")
    assert figures["names"] is None
    assert "attends to the whole text" in figures["printed"]


def comparison(gaps: np.ndarray) -> Comparison:
    """Losses around 3 with ``off - on = gaps``."""
    off = 3 + np.sin(np.arange(len(gaps)))
    return Comparison(off - gaps, off, 1.0, 1.0, CHUNK, [LayerUpdates(0, len(gaps) // CHUNK, 1024, 0.1)])


@pytest.mark.parametrize(
    ("gap", "noise", "verdict", "says"),
    [
        (0.5, 0.1, "better", "lower with them"),
        (-0.5, 0.1, "worse", "Updates HURT here: after the first one the loss is 0.5"),
        (0.001, 1.0, "no clear difference", "no clear difference here"),
        (0.0, 0.0, "no clear difference", "no clear difference here: -0.000"),
    ],
)
def test_verdict_is_honest(capsys, gap, noise, verdict, says):
    gaps = np.full(40 * CHUNK, gap) + noise * np.random.default_rng(0).normal(size=40 * CHUNK)
    gaps[:CHUNK] = 0
    source = text_files.Source(Path("file.py"), "", 1000, True)
    result = DemoResult("model", source, text.Tokens("", list(range(641)), [], 641), comparison(gaps), None)
    assert result.verdict == verdict
    mean, error = result.comparison.gain()
    assert mean == pytest.approx(gaps[CHUNK:].mean())
    assert error == pytest.approx(gaps[CHUNK:].reshape(39, CHUNK).mean(1).std(ddof=1) / np.sqrt(39))
    show(result, Console(width=100, no_color=True))
    assert says in capsys.readouterr().out


@pytest.mark.parametrize("width", [40, 50, 60])
def test_a_narrow_terminal_cuts_nothing_off(capsys, width):
    gaps = np.full(9000 * CHUNK, 0.5)
    source = text_files.Source(Path("file.py"), "", 1000, True)
    long = "Moonfleet_of_a_name_that_fills_a_whole_line"
    places = [
        NameUse("Queequeg", 98_765, 3, 12_345, " the captain of the ship, whose name was called ", 0.93, 1e-5, 9.0),
        NameUse(long, 143_210, 9, 102_345, "by ", 0.51, 0.0123, 3.0),
    ]
    found = Names(512, 3067, 1234, 1.5, 12, 3, places)
    tokens = text.Tokens("", list(range(len(gaps) + 1)), [], len(gaps) + 1)
    show(DemoResult("model", source, tokens, comparison(gaps), found), Console(width=width, no_color=True))
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= width
    assert not re.search(r"\S…", printed)  # the mark of what was cut off
    assert printed.count("-0.500") > 10
    for word in ("98,765", "12,345 ago", "93%", "<0.01%", "143,210", "102,345 ago", "51%", "1.2%", "1.0 KiB", "0.1"):
        assert f" {word}" in printed
    assert long in "".join(re.sub(" 143,210 .*", "", printed).split())
    quarters = ["0", "36,000", "72,000", "108,000", "144,000"]
    assert printed.split("└")[1].splitlines()[1].split() == (quarters[::2] if width == 40 else quarters)


def test_default_file_is_a_long_module_of_the_library(monkeypatch, tmp_path):
    path = text.library_file()
    assert path.parent == Path(importlib.import_module("os").__file__).parent
    assert path.stat().st_size > 60_000
    assert path.name == next(name for name in text.LIBRARY_FILES if (path.parent / name).is_file())
    monkeypatch.setattr(text.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(ittt.UserError, match="give a file of your own"):
        text.library_file()


def test_reading_stops_where_no_more_is_needed(tmp_path):
    """A long file's beginning, cut between characters; line ends become newlines and a byte order mark goes."""
    path = tmp_path / "long.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "a\r\n€".encode() * 400_000)
    source = text_files.read_text(path, 100)
    assert (source.whole, source.size) == (False, 3 + 6 * 400_000)
    assert source.text.startswith("a\n€a\n€")
    assert len(source.text) == pytest.approx((1 << 20) / 2, rel=0.01)


@pytest.mark.skipif(not DEFAULT_MODEL.is_dir(), reason="the shipped model is not in this checkout")
def test_shipped_model_learns_from_the_default_file(cli, tmp_path):
    result = cli("demo", "--max-tokens", 4096, "--json", tmp_path / "f.json", "--plot", tmp_path / "p.png")
    assert result.exit_code == 0, result.output
    assert "Updates helped" in result.stdout


def test_a_record_goes_where_a_link_points(tmp_path):
    link, target = tmp_path / "link.json", tmp_path / "disk" / "f.json"
    link.symlink_to(target)
    for value in (1, 2):  # the target is missing, then there
        write_json(link, value)
        assert link.is_symlink()
        assert json.loads(target.read_text(encoding="utf-8")) == value
    assert [p.name for p in target.parent.iterdir()] == [target.name]


def test_a_record_that_several_threads_write_is_whole(tmp_path):
    values = [[i] * 20_000 for i in range(8)]
    with ThreadPoolExecutor(len(values)) as pool:
        list(pool.map(lambda value: write_json(tmp_path / "f.json", value), values))
    assert json.loads((tmp_path / "f.json").read_text(encoding="utf-8")) in values
    assert [p.name for p in tmp_path.iterdir()] == ["f.json"]
    plain = tmp_path / "plain"
    plain.touch()
    assert (tmp_path / "f.json").stat().st_mode == plain.stat().st_mode


def test_a_record_goes_into_a_pipe_and_replaces_none(tmp_path):
    os.mkfifo(pipe := tmp_path / "pipe")
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_json(pipe, {"a": 1})
    assert pipe.is_fifo()
    assert json.loads(os.read(reading, 1000)) == {"a": 1}
    os.close(reading)
