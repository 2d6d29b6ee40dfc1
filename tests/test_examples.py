"""The notebooks in examples/ run, and print what is stored in them."""

import contextlib
import io
import json
import re
import sys

import pytest
import torch
from locations import ROOT

from inplace_ttt.core.rules import RULES

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
NUMBER = re.compile(r"[-+]?\d+\.\d+")


@pytest.fixture(autouse=True)
def _as_it_was():
    threads, known = torch.get_num_threads(), set(RULES)
    yield
    torch.set_num_threads(threads)
    for name in set(RULES) - known:
        del RULES[name]


def test_there_are_notebooks():
    assert len(NOTEBOOKS) == 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_prints_what_is_stored(path):
    namespace = {"__name__": "__main__"}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        stored = "".join(text for output in cell["outputs"] for text in output["text"])
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec("".join(cell["source"]), namespace)
        assert NUMBER.sub("#", printed.getvalue()) == NUMBER.sub("#", stored)
        if sys.version_info[:2] == (3, 11):  # a text that is read is a module of the running Python
            numbers = [[float(x) for x in NUMBER.findall(text)] for text in (printed.getvalue(), stored)]
            assert numbers[0] == pytest.approx(numbers[1], abs=0.03)
