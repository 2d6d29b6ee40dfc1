"""From a recipe's sources to token stores on disk, made once for all runs that share data and tokenizer."""

import hashlib
import json
import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from inplace_ttt.records import write_json
from inplace_ttt.train.document import SPLITS, Document
from inplace_ttt.train.domain import DomainDocuments
from inplace_ttt.train.packages import PackageCorpus, collect, installed
from inplace_ttt.train.packing import TokenStore, TokenWriter
from inplace_ttt.train.sources import source_files, split_source
from inplace_ttt.train.specs import DomainSpec, Recipe
from inplace_ttt.train.tokenizer import encode_documents, load_tokenizer, train_tokenizer

_FORMAT = 2  # part of the cache key: raise it when the same recipe would give other tokens


@dataclass(frozen=True)
class Prepared:
    """A directory of tokens: ``tokenizer/``, ``packages.json`` (the manifest), and a store per split and domain."""

    directory: Path

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that made the tokens."""
        return load_tokenizer(self.directory / "tokenizer")

    @cached_property
    def summary(self) -> dict[str, dict[str, dict[str, int]]]:
        """Documents, bytes and tokens by split and domain."""
        return dict(json.loads((self.directory / "summary.json").read_text(encoding="utf-8")))

    def stores(self, split: str) -> dict[str, TokenStore]:
        """Token stores of a split by domain."""
        return {domain: TokenStore.load(self.directory / f"{split}.{domain}") for domain in self.summary[split]}


def prepare(recipe: Recipe, say: Callable[[str], None] = lambda line: None) -> Prepared:
    """Tokens of the recipe's data, from the cache when they are there. ``say`` gets a line at each step."""
    directory = Path(recipe.data.cache) / _key(recipe)
    if (directory / "summary.json").exists():
        say(f"tokens: {directory}")
        return Prepared(directory)
    unfinished = directory.with_name(f"{directory.name}.{os.getpid()}")  # renamed at the end: never half a cache
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        _write(recipe, unfinished, say)
        shutil.rmtree(directory, ignore_errors=True)
        unfinished.rename(directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    say(f"tokens: {directory}")
    return Prepared(directory)


def training_documents(recipe: Recipe) -> dict[str, DomainDocuments]:
    """The training split's documents by domain, for `inplace_ttt.train.stream`."""
    reader = _Reader(recipe)
    return {domain: reader.documents(spec) for domain, spec in recipe.data.train.items()}


def _write(recipe: Recipe, directory: Path, say: Callable[[str], None]) -> None:
    reader = _Reader(recipe)
    if recipe.tokenizer.train is not None:
        spec = recipe.tokenizer.train
        say(f"training a tokenizer of {spec.vocab_size} tokens")
        training = [reader.documents(domain) for domain in recipe.data.train.values()]
        tokenizer: PreTrainedTokenizerBase = train_tokenizer(training, spec.vocab_size, spec.max_bytes)
    else:
        path = recipe.tokenizer.path or recipe.model.base
        assert path is not None  # the recipe's checks saw to it
        tokenizer = load_tokenizer(path)
    tokenizer.save_pretrained(directory / "tokenizer")
    summary: dict[str, dict[str, dict[str, int]]] = {}
    for split in SPLITS:
        summary[split] = {}
        if split == "train" and recipe.data.tokenise == "while_training":
            continue
        for domain, spec_ in recipe.data.split(split).items():
            found = _encode(tokenizer, reader.documents(spec_), directory / f"{split}.{domain}")
            summary[split][domain] = found
            say(
                f"{split}/{domain}: {found['documents']} documents, {found['bytes'] / 1e6:.1f} MB, "
                f"{found['tokens']:,} tokens"
            )
    manifest = reader.packages.manifest_dicts() if reader.used_packages else []
    write_json(directory / "packages.json", manifest)
    write_json(directory / "summary.json", summary)


class _Reader:
    """Reads sources; the package corpus is built at most once."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.used_packages = False

    @cached_property
    def packages(self) -> PackageCorpus:
        self.used_packages = True
        return collect(self.recipe.data.packages)

    def documents(self, spec: DomainSpec) -> DomainDocuments:
        return DomainDocuments(spec, lambda split: self.packages.of(split))


def _encode(tokenizer: PreTrainedTokenizerBase, documents: Iterable[Document], stem: Path) -> dict[str, int]:
    """Writes a domain's store; how many documents, bytes of text and tokens it has."""
    names: deque[str] = deque()  # of texts that are on their way through the tokenizer
    size = 0

    def texts() -> Iterator[str]:
        nonlocal size
        for document in documents:
            names.append(document.id)
            size += len(document.text.encode())
            yield document.text

    with TokenWriter(stem) as writer:
        for ids in encode_documents(tokenizer, texts()):
            writer.add(names.popleft(), ids)
    return {"documents": writer.documents, "bytes": size, "tokens": writer.tokens}


def _key(recipe: Recipe) -> str:
    """Names what decides the tokens: settings, files (path, size, time of change), installed distributions."""
    data = asdict(recipe.data)
    del data["cache"]
    sources: set[str] = set()
    for split in SPLITS:
        for spec in recipe.data.split(split).values():
            sources.update(spec.sources)
    files = [path for source in sources for path in source_files(source)]
    tokenizer_path = recipe.tokenizer.path or recipe.model.base or ""
    files += sorted(Path(tokenizer_path).glob("*token*")) if tokenizer_path and Path(tokenizer_path).is_dir() else []
    stats = sorted((str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in set(files))
    kinds = {split_source(source)[0] for source in sources}
    parts = [
        _FORMAT,
        data,
        asdict(recipe.tokenizer),
        tokenizer_path,
        stats,
        installed() if "packages" in kinds else [],
        *([sys.version] if "library" in kinds else []),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
