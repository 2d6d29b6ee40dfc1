"""Links from CONTRIBUTING.md to lines of code: each must open where its name is defined.

python tests/line_links.py    writes the numbers anew
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
LINK = re.compile(r"\[`(\w+)`\]\(([^)#]+\.py)#L(\d+)\)")


def line_of(name: str, path: Path) -> int:
    """Return the number of the first line that defines ``name``; ValueError where none does."""
    defined = re.compile(rf"\s*(?:(?:async )?def|class) {name}\b|{name}\b\s*[:=]")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if defined.match(line):
            return number
    raise ValueError(f"{path.relative_to(ROOT)} does not define {name}")


def mended(page: str) -> str:
    """Return the page with the right numbers."""
    return LINK.sub(lambda m: f"[`{m[1]}`]({m[2]}#L{line_of(m[1], ROOT / m[2])})", page)


if __name__ == "__main__":
    PAGE.write_text(mended(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
