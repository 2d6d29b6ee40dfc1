"""From a recipe's sources to token stores on disk, made once for all runs that share data and tokenizer."""

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from inplace_ttt.records import write_json
from inplace_ttt.train.packing import TokenStore
from inplace_ttt.train.sources import SPLITS, Document, DomainDocuments, source_files, split_source
from inplace_ttt.train.specs import DataSpec, DomainSpec, Recipe, TokenizerSpec
from inplace_ttt.train.tokenizer import encode_documents, load_tokenizer, train_tokenizer

_FORMAT = 3  # part of the cache key: raise it when the same recipe would give other tokens or files


@dataclass(frozen=True)
class Prepared:
    """A directory of tokens: ``tokenizer/``, and a store per split and domain."""

    directory: Path

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.directory / "tokenizer")

    @cached_property
    def summary(self) -> dict[str, dict[str, dict[str, int]]]:
        """Documents, bytes and tokens by split and domain."""
        return dict(json.loads((self.directory / "summary.json").read_text(encoding="utf-8")))

    def stores(self, split: str) -> dict[str, TokenStore]:
        return {domain: TokenStore.load(self.directory / f"{split}.{domain}") for domain in self.summary[split]}


def prepare(recipe: Recipe, say: Callable[[str], None] = lambda line: None) -> Prepared:
    """Make the tokens of a recipe's data, or take them from the cache. ``say`` gets a line at each step."""
    data, path = recipe.data, recipe.tokenizer.path or recipe.model.base or ""
    directory = Path(data.cache) / _key(data, recipe.tokenizer, path)
    if not (directory / "summary.json").exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent) as place:
            unfinished = Path(place, "tokens")  # renamed at the end: never half a cache
            unfinished.mkdir()
            _write(data, recipe.tokenizer, path, unfinished, say)
            shutil.rmtree(directory, ignore_errors=True)
            unfinished.rename(directory)
    say(f"tokens: {directory}")
    return Prepared(directory)


def documents_of(domains: dict[str, DomainSpec]) -> dict[str, DomainDocuments]:
    return {name: DomainDocuments(domain.sources, domain.max_bytes) for name, domain in domains.items()}


def _write(data: DataSpec, spec: TokenizerSpec, path: str, directory: Path, say: Callable[[str], None]) -> None:
    tokenizer: PreTrainedTokenizerBase
    if spec.train is None:
        tokenizer = load_tokenizer(path)
    else:
        say(f"training a tokenizer of {spec.train.vocab_size} tokens")
        training = list(documents_of(data.train).values())
        tokenizer = train_tokenizer(training, spec.train.vocab_size, spec.train.max_bytes)
    tokenizer.save_pretrained(directory / "tokenizer")
    summary: dict[str, dict[str, dict[str, int]]] = {split: {} for split in SPLITS}
    for split in SPLITS[data.tokenise == "while_training" :]:
        for domain, documents in documents_of(getattr(data, split)).items():
            found = _encode(tokenizer, documents, directory / f"{split}.{domain}")
            summary[split][domain] = found
            size = found["bytes"] / 1e6
            say(f"{split}/{domain}: {found['documents']} documents, {size:.1f} MB, {found['tokens']:,} tokens")
    write_json(directory / "summary.json", summary)


def _encode(tokenizer: PreTrainedTokenizerBase, documents: Iterable[Document], stem: Path) -> dict[str, int]:
    """Write a domain's store; return how many documents, bytes of text and tokens it has."""
    size = 0

    def counted() -> Iterator[Document]:
        nonlocal size
        for document in documents:
            size += len(document.text.encode())
            yield document

    store = TokenStore.write(stem, encode_documents(tokenizer, counted()))
    return {"documents": len(store.names), "bytes": size, "tokens": int(store.offsets[-1])}


def _key(data: DataSpec, tokenizer: TokenizerSpec, path: str) -> str:
    """Name what decides the tokens: settings, and files by path, size and time of change."""
    settings = asdict(data)
    del settings["cache"]
    sources = {source for split in SPLITS for domain in getattr(data, split).values() for source in domain.sources}
    files = {file for source in sources for file in source_files(source)}
    files |= set(Path(path).glob("*token*")) if path and Path(path).is_dir() else set()
    stats = sorted((str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    python = sys.version if any(split_source(source)[0] == "library" for source in sources) else ""
    parts = [_FORMAT, settings, asdict(tokenizer), path, stats, python]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
