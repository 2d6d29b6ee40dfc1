"""Loss of a causal language model on documents: token by token, by position, with its updates on and off.

Losses are in nats. A token is scored by the logits of the tokens before it, so before any update that saw it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from ..core.algebra import cross_entropies
from ..errors import UserError
from ..hf.attach import is_attached, unwrap, updates_off
from ..hf.cache import cache_name, cache_of
from ..session.stream import evaluating as eval_mode
from .paired import Mean, bootstrap_mean


@torch.no_grad()
def token_losses(
    model: nn.Module,
    input_ids: Tensor,
    piece: int | None = None,
    *,
    last: int | None = None,
    cache: Cache | None = None,
    advance: Callable[[int], Any] | None = None,
) -> Tensor:
    """Return -log p of every token but the first: ids [B, T] -> float32 [B, T - 1] on the same device.

    With ``piece`` the rows are read through a cache, that many tokens at a time: only one piece's logits exist at once
    and attention needs no [T, T] mask. All rows must be one document without padding. ``last``: only those of the last
    ``last`` tokens, [B, last]; for pieces before them no logits are computed. ``cache``: an empty one to read through;
    ``advance`` is called with the tokens of each piece. Raises ValueError when T < 2.
    """
    T = input_ids.shape[1]
    if T < 2:
        raise ValueError(f"nothing to score: {T} token")
    first = 0 if last is None else max(T - 1 - last, 0)
    if piece is None:
        logits = model(input_ids=input_ids, use_cache=False).logits
        return cross_entropies(logits[:, first:-1], input_ids[:, first + 1 :])
    losses = []
    for start in range(0, T - 1, piece):
        end = min(start + piece, T - 1)
        keep: dict[str, Any] = {"logits_to_keep": 1} if end <= first else {}
        part = input_ids[:, start:end]
        out = model(input_ids=part, use_cache=True, **{cache_name(model): cache}, **keep)
        cache = cache_of(out)
        if advance is not None:
            advance(end - start)
        if end > first:
            at = max(first - start, 0)
            losses.append(cross_entropies(out.logits[:, at:], input_ids[:, start + at + 1 : end + 1]))
    return torch.cat(losses, 1)


@dataclass(frozen=True)
class Bucket:
    """Mean loss of the tokens at positions ``start`` to ``end - 1`` of their document (the first token is 0)."""

    start: int
    end: int
    loss: float
    tokens: int


def loss_by_position(losses: Tensor | np.ndarray, edges: Sequence[int]) -> list[Bucket]:
    """Average losses [N, T - 1] of `token_losses` in buckets between neighbouring ``edges``; empty ones are left out.

    Column t holds the loss of the token at position t + 1.
    """
    values = np.asarray(losses.cpu() if isinstance(losses, Tensor) else losses, np.float64)
    buckets = []
    for start, end in pairwise(edges):
        part = values[:, max(start - 1, 0) : max(end - 1, 0)]
        if part.size:
            buckets.append(Bucket(start, end, float(part.mean()), int(part.size)))
    return buckets


def doubling(largest: int, smallest: int = 256) -> list[int]:
    """Return 256, 512, 1024, ... up to ``largest``."""
    sizes = []
    while smallest <= largest:
        sizes.append(smallest)
        smallest *= 2
    return sizes


def position_edges(length: int) -> list[int]:
    """Return 0, 256, 512, 1024, ... up to ``length``."""
    return [0, *doubling(length - 1), length]


def input_device(root: PreTrainedModel) -> torch.device:
    """Return the device on which the model takes token ids."""
    return root.get_input_embeddings().weight.device  # type: ignore[return-value]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch off dropout and gradients inside ``with``."""
    with eval_mode(model), torch.no_grad():
        yield


def new_cache(model: nn.Module) -> DynamicCache:
    return DynamicCache(config=unwrap(model).config)


def feed(model: nn.Module, cache: DynamicCache, ids: Sequence[int], piece: int) -> Tensor:
    """Read ids [n] into the cache, ``piece`` at a time; return the logits [V] of the token after them."""
    rows = torch.tensor([list(ids)], device=input_device(unwrap(model)))
    for part in torch.split(rows, piece, 1):
        out = model(input_ids=part, use_cache=True, logits_to_keep=1, **{cache_name(model): cache})
    logits: Tensor = out.logits[0, -1]
    return logits


@dataclass(frozen=True)
class DomainResult:
    """Losses of one domain. The three last fields are None for a model without fast weights.

    ``document_on`` and ``document_off`` are the mean losses of every document, ``document_tokens`` their weights.
    """

    domain: str
    windows: int
    tokens: int
    on: Mean
    position_on: list[Bucket]
    document_names: list[str]
    document_tokens: list[int]
    document_on: list[float]
    off: Mean | None = None
    gain: Mean | None = None
    position_off: list[Bucket] | None = None
    document_off: list[float] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Text:
    """A tokenised document: ``ids`` [n] of any integer type."""

    name: str
    ids: np.ndarray


def evaluate_documents(
    model: nn.Module,
    documents: Mapping[str, Sequence[Text]],
    length: int,
    windows: int | None = None,
    *,
    piece: int | None = 2048,
    edges: Sequence[int] | None = None,
    batch_size: int = 1,
    console: Console | None = None,
) -> dict[str, DomainResult]:
    """Return mean losses by domain, with updates on and (for a model with fast weights) off.

    Each document is cut into windows of ``length`` tokens from its beginning on, at most ``windows`` of them; a
    document shorter than a window is left out. ``batch_size`` windows form a batch. Raises UserError when a
    domain has no document that long.
    """
    edges = list(edges) if edges else position_edges(length)
    cut = {domain: list(_windows(texts, length, windows)) for domain, texts in documents.items()}
    for domain, found in cut.items():
        if not found:
            raise UserError(f"{domain}: no document has the {length} tokens of a window")
    settings = {"on": nullcontext, "off": lambda: updates_off(model)} if is_attached(model) else {"on": nullcontext}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    device = next(model.parameters()).device
    results = {}
    with evaluating(model), Progress(*columns, console=console or Console(stderr=True), transient=True) as progress:
        for domain, found in cut.items():
            names = [name for name, _ in found]
            losses = {}
            for label, context in settings.items():
                task = progress.add_task(f"{domain}, {label}", total=len(found))
                parts = []
                for at in range(0, len(found), batch_size):
                    rows = np.stack([ids for _, ids in found[at : at + batch_size]]).astype(np.int64)
                    with context():
                        parts.append(token_losses(model, torch.from_numpy(rows).to(device), piece).cpu())
                    progress.advance(task, len(rows))
                losses[label] = torch.cat(parts).numpy().astype(np.float64)
            results[domain] = _summarise(domain, names, losses, edges)
    return results


def _windows(texts: Sequence[Text], length: int, most: int | None) -> Iterator[tuple[str, np.ndarray]]:
    for text in texts:
        count = len(text.ids) // length
        for i in range(count if most is None else min(count, most)):
            yield text.name, text.ids[i * length : (i + 1) * length]


def _summarise(
    domain: str, names: Sequence[str], losses: Mapping[str, np.ndarray], edges: Sequence[int]
) -> DomainResult:
    """Summarise ``losses[label]`` [windows, T - 1] of the documents ``names`` [windows]."""
    documents = list(dict.fromkeys(names))
    member = np.array([[name == document for name in names] for document in documents])
    counts = member.sum(1) * losses["on"].shape[1]
    means = {label: member @ values.mean(1) / member.sum(1) for label, values in losses.items()}
    found: dict[str, Any] = {}
    for label, mean in means.items():
        found[label], found[f"document_{label}"] = bootstrap_mean(mean, counts), mean.tolist()
        found[f"position_{label}"] = loss_by_position(losses[label], edges)
    if "off" in means:
        found["gain"] = bootstrap_mean(means["off"] - means["on"], counts)
    return DomainResult(
        domain=domain,
        windows=len(names),
        tokens=int(losses["on"].size),
        document_names=documents,
        document_tokens=counts.tolist(),
        **found,
    )
