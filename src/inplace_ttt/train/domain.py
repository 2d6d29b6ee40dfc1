"""A domain's documents, read anew at every pass: one document's text is in memory at a time."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property

from inplace_ttt.errors import UserError
from inplace_ttt.train.document import Document
from inplace_ttt.train.sources import read_source
from inplace_ttt.train.specs import DomainSpec


class DomainDocuments:
    """Iterates over the documents of a domain that hold text, in the order of its sources.

    With ``max_bytes``: those whose identifiers hash lowest, up to that many bytes (the last one is cut), which takes
    one more pass. ``packages`` gives the installed distributions' documents of a split; unlike the other sources they
    are in memory as a whole. Raises UserError where there is no text.
    """

    def __init__(self, spec: DomainSpec, packages: Callable[[str], list[Document]]) -> None:
        self.spec, self.packages = spec, packages

    def __iter__(self) -> Iterator[Document]:
        nothing = True
        for i, document in enumerate(self._all()):
            nothing = False
            if self._taken is None:
                yield document
            elif i in self._taken:
                text = document.text
                if self._taken[i] is not None:
                    text = text.encode()[: self._taken[i]].decode(errors="ignore")
                yield replace(document, text=text)
        if nothing:
            raise UserError(f"{', '.join(self.spec.sources)}: no text in there")

    def _all(self) -> Iterator[Document]:
        for source in self.spec.sources:
            yield from (document for document in read_source(source, self.packages) if document.text)

    @cached_property
    def _taken(self) -> dict[int, int | None] | None:
        """By position: bytes to keep of a document, None for all of it. None itself: take every document."""
        if self.spec.max_bytes is None:
            return None
        sizes = sorted((hash_of(d), i, len(d.text.encode())) for i, d in enumerate(self._all()))
        taken: dict[int, int | None] = {}
        left = self.spec.max_bytes
        for _, i, size in sizes:
            if left == 0:
                break
            taken[i] = None if size <= left else left
            left -= min(size, left)
        return taken


def hash_of(document: Document) -> bytes:
    """Orders documents in a way that has nothing to do with where they come from."""
    return hashlib.sha256(document.id.encode()).digest()
