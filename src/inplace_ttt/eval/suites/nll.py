"""Suite ``nll``: loss by position, by whether a token occurred before, and as the context before a block grows.

Losses are in nats. A token is scored by the logits of the tokens before it, so before any update that saw it. Every
unit starts from an empty cache.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from ...errors import UserError
from ...hf.attach import unwrap
from ...hf.window import native_window
from .. import plots
from ..nll import doubling, evaluating, input_device, position_edges, token_losses
from ..paired import ENOUGH, REFERENCE, against_off, by_group, interval, means
from . import Record, Tables, Unit
from .texts import EvalText

CLASSES = ("in window", "before the window", "never")
PIECE = 2048
MOST_LOGITS = 1 << 26
"""Maximum number of logits in memory."""


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
        documents: Sequence[EvalText],
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
        self.work: dict[str, tuple[EvalText, int, int, int | None]] = {}
        """By key: document, first and last token (exclusive) to read, and the context's tokens of a sliding unit."""
        for document in documents:
            n = len(document.ids)
            for i in range(n // length if windows is None else min(n // length, windows)):
                self.work[f"window/{document.name}/{i}"] = (document, i * length, (i + 1) * length, None)
            for k in contexts:
                if k + block <= n:
                    self.work[f"sliding/{document.name}/{k}"] = (document, n - block - k, n, k)
        if not self.work:
            raise UserError(
                f"no document has the {length:,} tokens of a window, nor any context and a block of {block}"
            )

    def units(self) -> Sequence[Unit]:
        """Return windows and sliding contexts, document by document; ``tokens`` counts those read."""
        return [Unit(key, end - start) for key, (_, start, end, _) in self.work.items()]

    def measure(self, model: nn.Module, unit: Unit) -> list[Record]:
        """Return records of one unit, by the model as it is set. Raises KeyError for a unit of another suite."""
        document, start, end, context = self.work[unit.key]
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
    """Return -log p of every token but the first, from an empty cache: ids int64 [T] -> float64 [T - 1].

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
    """Return ``piece``, or less where all layers slide: a long piece's mask is mostly outside the window."""
    try:
        window = native_window(model)
    except NotImplementedError:  # unusual kinds of attention
        window = None
    return piece if window is None else min(piece, max(512, window))


def token_classes(ids: np.ndarray, window: int) -> np.ndarray:
    """Map ids [T] -> [T]: 0 if the id is among the ``window`` tokens before, 1 if only further back, 2 if new.

    The numbers are indices into ``CLASSES``. With sliding attention over ``window`` tokens (the one that predicts
    included), class 0 is what the prediction can see.
    """
    order = np.argsort(ids, kind="stable")  # equal ids side by side, each in the order of the text
    same = ids[order[1:]] == ids[order[:-1]]
    distance = np.zeros(len(ids), np.int64)
    distance[order[1:]] = np.where(same, order[1:] - order[:-1], 0)
    return np.select([distance == 0, distance <= window], [2, 0], 1)


def _total(losses: np.ndarray) -> Record:
    return {"loss_sum": float(losses.sum()), "tokens": len(losses)}


# -- what people read --------------------------------------------------------------------------------------------------

LAYER = "without layer "
"""Prefix of labels for readings with one layer switched off."""


def from_options(options: Any, texts: Sequence[EvalText], tokenizer: Any, model: nn.Module) -> NllSuite:
    """Build the suite of the command line. UserError when no document has a whole window."""
    suite = NllSuite(texts, options.length, options.windows, window=native_window(model) or 256)
    if options.windows and not any(unit.key.startswith("window/") for unit in suite.units()):
        longest = max(len(text.ids) for text in texts)
        raise UserError(
            f"no document has the {options.length:,} tokens of a window, the longest has {longest:,}: --length"
        )
    return suite


def tables(records: Sequence[Record]) -> Tables:
    """Return mean losses by domain and position, class, context; and every other reading against updates on."""
    mine = [r for r in records if r["suite"] == "nll"]
    found = {}
    for kind, keys in (
        ("document", []),
        ("position", ["start", "end"]),
        ("class", ["class"]),
        ("sliding", ["context"]),
    ):
        part = [r for r in mine if r["kind"] == kind]
        part = _in_all_contexts(part) if kind == "sliding" else part
        found[f"nll by {kind}"] = means(part, ["domain", *keys], "loss_sum", "tokens")
    changed = [r for r in mine if r["kind"] == "document" and r["variant"] not in (REFERENCE, "baseline")]
    if len({r["variant"] for r in changed}) > 1:
        rows = means(changed, ["domain"], "loss_sum", "tokens", to="on")
        found["nll against updates on"] = [row for row in rows if "difference" in row]
    return found


def _in_all_contexts(records: list[Record]) -> list[Record]:
    """Keep only documents that have the longest context: else the curve would compare different texts."""
    kept = []
    for members in by_group(records, ["domain"]).values():
        longest = max(r["context"] for r in members)
        names = {r["document"] for r in members if r["context"] == longest}
        kept += [r for r in members if r["document"] in names]
    return kept


def figures(found: Tables, plan: Mapping[str, Any]) -> dict[str, Any]:
    """Draw paired differences to updates off by position and context, loss by class, all readings side by side."""
    drawn, gap = {}, "loss less updates off (nats per token)"
    zero = (0.0, "updates off")
    if drawable := plots.gaps(found.get("nll by position", []), "end"):
        where = "position in the document, up to (tokens)"
        drawn["loss-by-position"] = plots.panels(drawable, "loss by position", where, gap, line=zero)
    if drawable := plots.gaps(found.get("nll by sliding", []), "context"):
        where, what = "tokens of context before these", f"loss of the last {plan['block']} tokens"
        drawn["sliding-perplexity"] = plots.panels(drawable, what, where, gap, line=zero)
    if rows := found.get("nll by class"):
        by_class, where = plots.curves(rows, "class"), "where the token occurred before"
        drawn["loss-by-class"] = plots.panels(by_class, "loss by class", where, "loss (nats per token)", bars=True)
    names, unit = ("variant", "domain"), "nats per token"
    by_document = [row for row in found.get("nll by document", []) if "difference" in row]
    if others := found.get("nll against updates on"):
        rows = [_turned(row) for row in by_document if row["variant"] == "on"] + others
        title = f"loss against updates on, n = {rows[0]['documents']}"
        drawn["differences"] = plots.differences(title, rows, names, unit, "left", "updates on")
    elif by_document:
        title = f"loss against updates off, n = {by_document[0]['documents']}"
        drawn["differences"] = plots.differences(title, by_document, names, unit, "left")
    return drawn


def _turned(row: Record) -> Record:
    """Return the difference of updates on to off as that of off to on."""
    ends = {"difference_low": -row["difference_high"], "difference_high": -row["difference_low"]}
    return {**row, "variant": REFERENCE, "difference": -row["difference"], **ends}


def verdicts(found: Tables) -> list[str]:
    """Say whether updates help, which layers and which other settings; and if they hurt, what to try."""
    lines = [_verdict(row) for row in against_off(found.get("nll by document", []))]
    hurt = any(": updates hurt" in line for line in lines)
    compared = found.get("nll against updates on", [])
    settings = [row for row in compared if not row["variant"].startswith(LAYER)]
    layers = [row for row in compared if row["variant"].startswith(LAYER)]
    for (domain,), rows in by_group(compared, ["domain"]).items():
        lines += _layers(str(domain), [row for row in rows if row["variant"].startswith(LAYER)])
        lines += _settings(str(domain), [row for row in rows if not row["variant"].startswith(LAYER)])
    if hurt and not settings:
        lines.append("Try other settings: --sweep decay=0.01,0.05 --sweep lr=... with smaller values.")
    if hurt and not layers:
        lines.append("Try --layers to find the layer that does it.")
    if hurt and "which measurements correlate with the gain" not in found:
        lines.append("Try --suite nll,diagnostics to see whether new keys overlap with old ones.")
    return lines


def _verdict(row: Record) -> str:
    """Say whether updates help, where there are enough documents and the interval excludes zero."""
    domain, gap, low, high, n = (
        row[key] for key in ("domain", "difference", "difference_low", "difference_high", "documents")
    )
    said = interval(low, high, "+.3f", n)
    if n < ENOUGH:
        few = f"too few documents for a verdict, read at least {ENOUGH}"
        return f"{domain}: {gap:+.3f} nats per token with updates on ({said}): {few}."
    if high < 0:
        return f"{domain}: updates help, by {-gap:.3f} nats per token ({interval(-high, -low, '.3f', n)})."
    if low > 0:
        return f"{domain}: updates hurt, by {gap:.3f} nats per token ({interval(low, high, '.3f', n)})."
    return f"{domain}: no clear difference between updates on and off ({gap:+.3f} nats per token, {said})."


def _layers(domain: str, rows: Sequence[Record]) -> list[str]:
    """Describe in a sentence each layer's updates: the loss without them against that with all."""
    if not rows:
        return []
    about, documents = f"{domain}, loss when one layer's updates are switched off", rows[0]["documents"]
    if documents < ENOUGH:
        listed = (f"layer {row['variant'].removeprefix(LAYER)} {row['difference']:+.3f}{_span(row)}" for row in rows)
        return [f"{about}: {'; '.join(listed)}. {documents} are too few documents for a verdict."]
    parts: dict[str, list[str]] = {"help": [], "hurt": [], "make no clear difference": []}
    for row in rows:
        low, high = row["difference_low"], row["difference_high"]
        verdict = "help" if low > 0 else "hurt" if high < 0 else "make no clear difference"
        parts[verdict].append(f"{row['variant'].removeprefix(LAYER)} ({row['difference']:+.3f}{_span(row)})")
    said = [f"{how} in layer{'s' * (len(where) > 1)} {', '.join(where)}" for how, where in parts.items() if where]
    line = f"{about}: updates {'; '.join(said)}."
    if not parts["hurt"]:
        return [line]
    worst = min(rows, key=lambda row: row["difference"])["variant"].removeprefix(LAYER)
    remedy = f"read inside layers_off(model, [{worst}]), or leave it out of the layers when you train again"
    return [line, f"{domain}: layer {worst} does the most harm: {remedy}."]


def _settings(domain: str, rows: Sequence[Record]) -> list[str]:
    """Compare the best of the other settings with the model's own."""
    if not rows:
        return []
    best = min(rows, key=lambda row: row["value"])
    tried = f"{domain}: of {len(rows)} other setting{'s' * (len(rows) > 1)}, {best['variant']} read best"
    result = f"{best['value']:.3f} nats per token, {best['difference']:+.3f} against the model's own{_span(best)}"
    if best["difference_high"] < 0 and best["documents"] >= ENOUGH:
        return [f"{tried}: {result}. It was chosen on this text: confirm it on other text before you keep it."]
    if best["difference"] < 0:
        return [f"{tried}: {result}, not a clear difference."]
    return [f"{tried}, but no better than the model's own: {result}."]


def _span(row: Record) -> str:
    """Format the interval of a row's difference; empty where one document gives none."""
    low, high = row["difference_low"], row["difference_high"]
    return "" if np.isnan(low) else f", {interval(low, high, '+.3f', row['documents'])}"
