"""The source code of the installed Python distributions as long documents.

One document per package directory: its ``.py`` files in path order, each after a line ``=== path ===``. A directory
above 1 MiB is split into its own files and its subdirectories. Documents shorter than 64 KiB are dropped. Left out:
tests, vendored and generated files, files above 1 MiB or with lines above 1,000 characters, exact duplicates, near
copies of held-out files, forks of the standard library, and distributions under other licences than
`licences` permits. Whole distributions are split into train, validation and test by a hash of their
name, so that two machines with the same distributions build the same splits.
"""

import csv
import hashlib
import importlib.metadata
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath

from licences import permitted_licence

from inplace_ttt.errors import SourceError
from inplace_ttt.train.sources import SPLITS

MAX_BYTES = 1 << 20  # of a file, and of a directory that stays one document
MIN_DOCUMENT_BYTES = 64 << 10
MAX_LINE = 1000

# Distributions of one project share code and go to one split.
PROJECT = {
    "pytorch-lightning": "lightning",
    "lightning-fabric": "lightning",
    "jaxlib": "jax",
    "numba-cuda": "numba",
    "onnx-ir": "onnxscript",
    "opt-einsum-fx": "opt-einsum",
    "tensorboard-data-server": "tensorboard",
}
# Forks and backports of standard library modules: the standard library is held-out text.
STANDARD_LIBRARY_FORKS = {
    "async-timeout",
    "exceptiongroup",
    "future",
    "importlib-metadata",
    "importlib-resources",
    "multiprocess",
    "setuptools",
    "simplejson",
    "tomli",
    "typing-extensions",
    "zipp",
}
OWN_NAME = "inplace-ttt"


_LEFT_OUT_FOLDER = re.compile(
    r"_?tests?|_?testing|_?test_\w+|_?vendor(ed)?|_vendoring|_?extern(als?)?|_?third_?party|_distutils|__pycache__",
    re.IGNORECASE,
)
_LEFT_OUT_FILE = re.compile(r"(test_.*|.*_tests?|conftest|.*_pb2(_grpc)?)\.py")
_GENERATED = re.compile(r"auto-?\s?generated|automatically generated|@generated|do not (edit|modify)", re.IGNORECASE)


@dataclass(frozen=True)
class SplitRule:
    """A split of distributions. A named list replaces the hash for its split."""

    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    validation_percent: float = 3.0
    test_percent: float = 5.0

    def split(self, name: str) -> str:
        """Split of a distribution by its normalised name."""
        project = _project(name)
        for split, names in (("test", self.test), ("validation", self.validation)):
            if project in {_project(normalise(listed)) for listed in names}:
                return split
        percent = int(hashlib.sha256(project.encode()).hexdigest()[:8], 16) / 2**32 * 100
        if not self.test and percent < self.test_percent:
            return "test"
        if not self.validation and self.test_percent <= percent < self.test_percent + self.validation_percent:
            return "validation"
        return "train"


@dataclass(frozen=True)
class ManifestEntry:
    """A record of what one distribution gave: ``bytes`` counts the UTF-8 text of its documents."""

    distribution: str
    version: str
    licence: str
    split: str
    documents: int
    bytes: int


@dataclass(frozen=True)
class Document:
    """One text, the distribution it comes from, and under which terms ("" if unknown)."""

    id: str
    text: str
    source: str
    licence: str = ""


@dataclass
class PackageCorpus:
    """Documents by split, and the list of what they were made from."""

    documents: dict[str, list[Document]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    manifest: list[ManifestEntry] = field(default_factory=list)

    def of(self, split: str) -> list[Document]:
        """Documents of a split. Raises SourceError when it is empty."""
        if not self.documents[split]:
            raise SourceError(
                f"the split {split} is empty: no installed distribution of it has documents of "
                f"{MIN_DOCUMENT_BYTES >> 10} KiB; name installed ones"
            )
        return self.documents[split]

    def manifest_dicts(self) -> list[dict[str, object]]:
        """The manifest, ready for JSON."""
        return [asdict(entry) for entry in self.manifest]


def normalise(name: str) -> str:
    """Distribution name as the packaging standard compares it: lower case, runs of ``-_.`` as one dash."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _project(name: str) -> str:
    return PROJECT.get(name, name)


@dataclass(frozen=True)
class _Distribution:
    name: str
    version: str
    licence: str
    files: tuple[tuple[str, Path], ...]


def collect(rule: SplitRule, path: Sequence[str] | None = None) -> PackageCorpus:
    """Builds the corpus of the running environment, or of the site directories ``path``."""
    order = {"test": 0, "validation": 1, "train": 2}  # held-out files first: a duplicate leaves the later split
    chosen = {dist.name: dist for dist in reversed(list(_candidates(path)))}  # the first on the path wins
    corpus = PackageCorpus()
    seen: set[bytes] = set()
    held_out_lines: set[str] = set()
    for dist in sorted(chosen.values(), key=lambda dist: (order[rule.split(dist.name)], dist.name)):
        split = rule.split(dist.name)
        texts: dict[str, str] = {}
        for name, text in _read(dist.files):
            digest = hashlib.sha256(text.encode()).digest()
            lines = _telling_lines(text)
            copied = split != "test" and len(lines) >= 10 and len(lines & held_out_lines) > len(lines) / 2
            if digest not in seen and not copied:
                texts[name] = text
            seen.add(digest)
            if split != "train":
                held_out_lines |= lines
        documents = list(_documents(dist, texts))
        if documents:
            corpus.documents[split] += documents
            size = sum(len(document.text.encode()) for document in documents)
            corpus.manifest.append(ManifestEntry(dist.name, dist.version, dist.licence, split, len(documents), size))
    corpus.manifest.sort(key=lambda entry: entry.distribution)
    return corpus


def _distributions(path: Sequence[str] | None) -> Iterable[importlib.metadata.Distribution]:
    if path is None:
        return importlib.metadata.distributions()
    return importlib.metadata.distributions(path=list(path))


def _candidates(path: Sequence[str] | None) -> Iterator[_Distribution]:
    for dist in _distributions(path):
        name = normalise(dist.name or "")
        if not name or name == OWN_NAME or name in STANDARD_LIBRARY_FORKS or name.startswith("backports"):
            continue
        licence = permitted_licence(dist.metadata)
        record = dist.read_text("RECORD")
        if licence is None or record is None:
            continue
        # The RECORD is read directly: Distribution.files asks the disk about every single file.
        names = sorted(row[0] for row in csv.reader(record.splitlines()) if row and _wanted(row[0]))
        files = tuple((file, Path(str(dist.locate_file(file)))) for file in names)
        yield _Distribution(name, dist.version, licence, files)


def _wanted(file: str) -> bool:
    parts = PurePosixPath(file).parts
    return (
        file.endswith(".py")
        and len(parts) > 1  # a lone module is not in a package directory
        and ".." not in parts
        and not PurePosixPath(file).is_absolute()
        and _is_source(parts)
    )


def _is_source(parts: Sequence[str]) -> bool:
    """Return whether a file, by the parts of its path, is neither a test, nor vendored, nor generated."""
    return not _LEFT_OUT_FILE.fullmatch(parts[-1]) and not any(map(_LEFT_OUT_FOLDER.fullmatch, parts[:-1]))


def _read(files: Sequence[tuple[str, Path]]) -> Iterator[tuple[str, str]]:
    """(name, text) of the files that may take part, in the order given."""
    with ThreadPoolExecutor(8) as pool:
        texts = pool.map(_read_text, [path for _, path in files], chunksize=64)
        for (name, _), text in zip(files, texts, strict=True):
            if text is not None:
                yield name, text


def _read_text(path: Path) -> str | None:
    """The text of a file; None for one that is left out."""
    try:
        data = path.read_bytes()
        if not data.strip() or len(data) > MAX_BYTES:
            return None
        text = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except (OSError, UnicodeDecodeError):
        return None
    if _GENERATED.search(text[:1500]) or re.search(rf"[^\n]{{{MAX_LINE + 1}}}", text):
        return None
    return text if text.endswith("\n") else text + "\n"


def _telling_lines(text: str) -> set[str]:
    """Lines long enough to tell where a file was copied from."""
    return {line for line in map(str.strip, text.split("\n")) if len(line) >= 40}


def _documents(dist: _Distribution, texts: dict[str, str]) -> Iterator[Document]:
    sizes = {name: len(text.encode()) for name, text in texts.items()}
    for folder in sorted({name.split("/")[0] for name in texts}):
        for unit, names in _units(folder, [name for name in texts if name.startswith(folder + "/")], sizes):
            if sum(sizes[name] for name in names) >= MIN_DOCUMENT_BYTES:
                yield Document(
                    id=f"{dist.name}-{dist.version}:{unit}",
                    text="".join(f"=== {name} ===\n{texts[name]}" for name in names),
                    source=f"{dist.name} {dist.version}",
                    licence=dist.licence,
                )


def _units(folder: str, names: list[str], sizes: dict[str, int]) -> Iterator[tuple[str, list[str]]]:
    """(directory, its files in path order) for every document that ``folder`` becomes."""
    if sum(sizes[name] for name in names) <= MAX_BYTES:
        yield folder, sorted(names)
        return
    below: dict[str, list[str]] = defaultdict(list)
    own = []
    for name in sorted(names):
        child, slash, _ = name[len(folder) + 1 :].partition("/")
        if slash:
            below[child].append(name)
        else:
            own.append(name)
    yield folder, own
    for child in sorted(below):
        yield from _units(f"{folder}/{child}", below[child], sizes)
