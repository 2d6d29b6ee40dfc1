"""Pages of the site that lie beside ``docs/``, and links that lead out of it."""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

BESIDE = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""File in the repository -> page of the site."""
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files, config):
    """Add the pages."""
    root = Path(config.config_file_path).parent
    for name, page in BESIDE.items():
        files.append(File.generated(config, page, content=_links((root / name).read_text(encoding="utf-8"), ".")))
    return files


def on_page_markdown(markdown, page, **_):
    """Mend the links of the pages in ``docs/``."""
    return markdown if page.file.src_uri in BESIDE.values() else _links(markdown, "docs")


def _links(markdown: str, folder: str) -> str:
    """Return the text with links from ``folder`` as the site has them; their words alone where they lead out of it."""

    def mend(found: re.Match[str]) -> str:
        words, target, anchor = found[1], found[2], found[3] or ""
        path = posixpath.normpath(posixpath.join(folder, target))
        if path in BESIDE:
            return f"[{words}]({BESIDE[path]}{anchor})"
        if path.startswith("docs/"):
            return f"[{words}]({path.removeprefix('docs/')}{anchor})"
        return words

    return LINK.sub(mend, markdown)
