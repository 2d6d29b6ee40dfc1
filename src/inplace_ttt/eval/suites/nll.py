"""Loss on documents: by position, by whether a token occurred before, and as the context before a block grows.

Losses are in nats. A token is scored by the logits of the tokens before it, so before any update that saw it. Every
unit starts from an empty cache.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ...errors import UserError
from ...hf.attach import unwrap
from ...hf.window import native_window
from ..nll import position_edges, token_losses
from . import Record, Unit
from .texts import Document

CLASSES = ("in window", "before the window", "never")
PIECE = 2048
MOST_LOGITS = 1 << 26
"""Logits that exist at once, at most."""


class NllSuite:
    """Windows of documents, and one final block of each document after more and more context.

    *Windows*: each document is cut into windows of ``length`` tokens from its beginning on, at most ``windows`` of
    them; one unit each. The first token of a window is not scored. Records, all with "document" and "domain":

    * "kind": "document": totals "loss_sum" [nats] and "tokens" of the window;
    * "kind": "position": those of the tokens at positions "start" to "end" - 1 of the window, between neighbouring
      ``edges`` (None: 0, 256, 512, 1024, ... ``length``); buckets without scored tokens are left out;
    * "kind": "class": those of the tokens that occurred before among the last ``window`` tokens ("in window"), only
      further back in the window of text ("before the window"), or not ("never").

    *Sliding-window perplexity*: the last ``block`` tokens of a document, always the same ones, read after the last k
    tokens before them, for every k of ``contexts`` that the document has (None: 256, 512, 1024, ... up to ``length``);
    one unit each. Records: "kind": "sliding", "context": k, "loss_sum", "tokens". Documents of unequal length have
    unequal contexts: compare contexts within the documents that have them all.

    A call reads ``piece`` tokens, fewer where their logits would exceed ``MOST_LOGITS``. Documents are told apart by
    their names. Raises UserError when nothing is long enough to measure and for sizes out of range.
    """

    name = "nll"

    def __init__(
        self,
        documents: Sequence[Document],
        length: int,
        windows: int | None = None,
        edges: Sequence[int] | None = None,
        contexts: Sequence[int] | None = None,
        block: int = 256,
        window: int = 256,
        piece: int = PIECE,
    ) -> None:
        self.length, self.block, self.window, self.piece = length, block, window, piece
        if length < 2 or min(block, window, piece) < 1 or (windows is not None and windows < 0):
            raise UserError("length must be at least 2; block, window and piece at least 1; windows not negative")
        self.edges = position_edges(length) if edges is None else list(edges)
        if any(start >= end for start, end in pairwise(self.edges)) or min(self.edges, default=0) < 0:
            raise UserError(f"edges {self.edges}: positions must increase from 0 or more")
        contexts = doubling(length) if contexts is None else sorted(set(contexts))
        if min(contexts, default=1) < 1:
            raise UserError(f"contexts {list(contexts)}: at least 1 token each")
        if len({document.name for document in documents}) < len(documents):
            raise UserError("two documents have the same name")
        self._work: dict[str, tuple[Document, int, int, int | None]] = {}
        """By key: document, first and last token (exclusive) to read, and the context's tokens of a sliding unit."""
        for document in documents:
            n = len(document.ids)
            for i in range(n // length if windows is None else min(n // length, windows)):
                self._work[f"window/{document.name}/{i}"] = (document, i * length, (i + 1) * length, None)
            for k in contexts:
                if k + block <= n:
                    self._work[f"sliding/{document.name}/{k}"] = (document, n - block - k, n, k)
        if not self._work:
            raise UserError(
                f"no document has the {length:,} tokens of a window, nor any context and a block of {block}"
            )

    def units(self) -> Sequence[Unit]:
        """Windows and sliding contexts, document by document; ``tokens`` counts those read."""
        return [Unit(key, end - start) for key, (_, start, end, _) in self._work.items()]

    def measure(self, model: nn.Module, unit: Unit) -> list[Record]:
        """Records of one unit, by the model as it is set. Raises KeyError for a unit of another suite."""
        document, start, end, context = self._work[unit.key]
        ids = document.ids[start:end].astype(np.int64)
        losses = window_losses(model, ids, self.piece, None if context is None else self.block)
        about: Record = {"document": document.name, "domain": document.domain}
        if context is not None:
            return [about | {"kind": "sliding", "context": context} | _total(losses)]
        records = [about | {"kind": "document"} | _total(losses)]
        for a, b in pairwise(self.edges):
            if len(part := losses[max(a - 1, 0) : max(b - 1, 0)]):
                records.append(about | {"kind": "position", "start": a, "end": b} | _total(part))
        classes = token_classes(ids, self.window)[1:]
        for number, label in enumerate(CLASSES):
            if len(part := losses[classes == number]):
                records.append(about | {"kind": "class", "class": label} | _total(part))
        return records


def window_losses(model: nn.Module, ids: np.ndarray, piece: int = PIECE, last: int | None = None) -> np.ndarray:
    """-log p of every token but the first, read from an empty cache: ids int64 [T] -> float64 [T - 1].

    ``last``: of the last ``last`` tokens only.
    """
    root = unwrap(model)
    vocabulary = int(root.config.get_text_config().vocab_size)
    rows = torch.from_numpy(ids)[None].to(input_device(root))
    with evaluating(model):
        size = max(1, min(piece_size(model, piece), MOST_LOGITS // vocabulary))
        losses = token_losses(model, rows, size, last=last)
    return losses[0].double().cpu().numpy()


def piece_size(model: nn.Module, piece: int) -> int:
    """``piece``, or less where all layers slide: the attention mask of a long piece is mostly outside the window."""
    try:
        window = native_window(model)
    except NotImplementedError:  # unusual kinds of attention
        window = None
    return piece if window is None else min(piece, max(512, window))


def token_classes(ids: np.ndarray, window: int) -> np.ndarray:
    """Ids [T] -> [T]: 0 if the id occurs among the ``window`` tokens before, 1 if only further back, 2 if not before.

    The numbers are indices into ``CLASSES``. With sliding attention over ``window`` tokens (the one that predicts
    included), class 0 is what the prediction can see.
    """
    order = np.argsort(ids, kind="stable")  # equal ids side by side, each in the order of the text
    same = ids[order[1:]] == ids[order[:-1]]
    distance = np.zeros(len(ids), np.int64)
    distance[order[1:]] = np.where(same, order[1:] - order[:-1], 0)
    return np.select([distance == 0, distance <= window], [2, 0], 1)


def doubling(largest: int, smallest: int = 256) -> list[int]:
    """256, 512, 1024, ... up to ``largest``."""
    sizes = []
    while smallest <= largest:
        sizes.append(smallest)
        smallest *= 2
    return sizes


def input_device(root: PreTrainedModel) -> torch.device:
    """Where token ids must be."""
    device: torch.device = root.get_input_embeddings().weight.device  # type: ignore[assignment]
    return device


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, no dropout and no gradients."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _total(losses: np.ndarray) -> Record:
    return {"loss_sum": float(losses.sum()), "tokens": len(losses)}
