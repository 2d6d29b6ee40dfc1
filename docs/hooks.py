"""Pages of the site that lie beside ``docs/``, and links that lead out of it."""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

BESIDE = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/results/serve/load.png": "images/serve-load.png",
}
"""File in the repository -> page or picture of the site."""
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files, config):
    """Add the pages and pictures."""
    root = Path(config.config_file_path).parent
    for name, page in BESIDE.items():
        if page.endswith(".md"):
            text = (root / name).read_text(encoding="utf-8")
            files.append(File.generated(config, page, content=_links(text, ".", config.repo_url)))
        else:
            files.append(File.generated(config, page, abs_src_path=str(root / name)))
    return files


def on_page_markdown(markdown, page, config, **_):
    """Mend the links of the pages in ``docs/``."""
    return markdown if page.file.src_uri in BESIDE.values() else _links(markdown, "docs", config.repo_url)


def _links(markdown: str, folder: str, repository: str | None) -> str:
    """Return the text with links from ``folder`` as the site has them.

    Those that lead out of it go to the repository, or are their words alone where the site's settings name none.
    """

    def mend(found: re.Match[str]) -> str:
        mark, words, target, anchor = found[1], found[2], found[3], found[4] or ""
        path = posixpath.normpath(posixpath.join(folder, target))
        if path in BESIDE:
            return f"{mark}[{words}]({BESIDE[path]}{anchor})"
        if path.startswith("docs/"):
            return f"{mark}[{words}]({path.removeprefix('docs/')}{anchor})"
        if mark:
            return found[0]
        return f"[{words}]({repository.rstrip('/')}/blob/main/{path}{anchor})" if repository else words

    return LINK.sub(mend, markdown)
