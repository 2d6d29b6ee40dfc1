"""The documents say what the code does."""

import re

import pytest
from locations import ROOT

SOURCE = ROOT / "src" / "inplace_ttt"
METHOD = "".join((ROOT / "docs" / page).read_text(encoding="utf-8") for page in ("method.md", "parallel.md"))
QUOTED = re.findall(r"\| `([^`]+)` \| `((?:core|hf)/\w+\.py)` \|", METHOD)


def test_method_quotes_lines():
    assert len(QUOTED) >= 15


@pytest.mark.parametrize(("line", "file"), QUOTED)
def test_quoted_line_is_in_its_file(line, file):
    code = (SOURCE / file).read_text(encoding="utf-8")
    assert line in code, f"docs/method.md or parallel.md quotes a line that {file} no longer has"
