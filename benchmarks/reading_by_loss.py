"""Gain of a pretrained model when it learns from what it reads, with the loss as objective and nothing trained.

    python benchmarks/reading_by_loss.py --model DIR_OR_FILE.gguf --window 512 --name N --run RUN --books FILE --out DIR

Reads the same documents of some domains (``--texts``; by default books, and modules of Python's standard library) as
rows of one batch, once without updates and once for every setting in the file of jobs, and writes one JSON record for
each: losses by document and position, the gain, the worst stretch of 5,000 tokens, and what of the gain is the text's
*own*: the other text of the same kind is read first with the state kept, then this one with learning stopped and with
learning on. ``--join`` reads all texts of a domain one after another instead, for streams of any length.
``--share K/N`` takes every N-th job: one process a GPU.
"""

import argparse
import json
import lzma
import random
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

import inplace_ttt as ittt
from inplace_ttt.errors import UserError
from inplace_ttt.hf.attach import runtime_of
from inplace_ttt.hf.cache import cache_name, cache_of
from inplace_ttt.hf.checkpoint import has_fast_weights
from inplace_ttt.hf.load import load
from inplace_ttt.hf.window import clear
from inplace_ttt.records import about, write_json
from inplace_ttt.shipped import SHIPPED

PIECE = 1024
STRETCH = 5000
"""Tokens over which reading with updates must not be worse."""
MODULES = ("argparse", "ast", "inspect", "tarfile", "turtle", "typing", "subprocess", "doctest")
"""Long modules of the standard library."""


def books(files: list[Path]) -> list[str]:
    """The texts of files of JSON lines, from a place inside each."""
    found = []
    for file in files:
        with lzma.open(file, "rt", encoding="utf-8") as lines:
            found += [json.loads(line)["text"][20_000:] for line in lines]
    return found


def modules() -> list[str]:
    """Long modules of the standard library."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return [(folder / f"{name}.py").read_text(encoding="utf-8") for name in MODULES]


def library() -> list[str]:
    """All larger modules of the standard library, by path."""
    folder, left_out = Path(sysconfig.get_paths()["stdlib"]), {"test", "tests", "site-packages", "dist-packages"}
    found = []
    for path in sorted(folder.rglob("*.py")):
        if not left_out & set(path.relative_to(folder).parts) and path.stat().st_size > 10_000:
            found.append(path.read_text(encoding="utf-8", errors="ignore"))
    return found


def permuted(text: str) -> str:
    """A text with its letters exchanged for one another: a language of known words' lengths and unknown words."""
    small = list("abcdefghijklmnopqrstuvwxyz")
    random.Random(1).shuffle(small)
    order = "".join(small)
    return text.translate(str.maketrans("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", order + order.upper()))


def shuffled(text: str) -> str:
    """A text with its words in random order."""
    words = text[:200_000].split()
    random.Random(2).shuffle(words)
    return " ".join(words)


def repeated(text: str) -> str:
    """The first page of a text, over and over."""
    return (text[:2000] + "\n\n") * 100


FOREIGN = {"permuted": permuted, "shuffled": shuffled, "repeated": repeated}
"""Texts that a guard is for, made from books."""


def texts(domain: str, files: list[Path], own: dict[str, Path]) -> list[str]:
    """The documents of a domain; "random" has none (its tokens are drawn)."""
    if domain in own:
        return [own[domain].read_text(encoding="utf-8")]
    if domain in FOREIGN:
        return [FOREIGN[domain](text) for text in books(files)]
    return {"books": lambda: books(files), "code": modules, "library": library, "random": list}[domain]()


def rows(texts: list[str], tokenizer: Any, tokens: int, join: bool = False) -> Tensor:
    """Ids [documents, tokens] of the texts that are long enough; ``join``: of all texts, one after another."""
    first = tokenizer("").input_ids  # a beginning of text, for models that have one
    ids = [tokenizer(text, add_special_tokens=False, verbose=False).input_ids for text in texts]
    if join:
        whole, step = [x for part in ids for x in part], tokens - len(first)
        ids = [whole[at : at + step] for at in range(0, len(whole), step)]
    ids = [(first + part)[:tokens] for part in ids]
    return torch.tensor([x for x in ids if len(x) == tokens])


@torch.no_grad()
def read(model: Any, ids: Tensor, cache: Any = None, learn: bool = True, seconds: float = 1e9) -> tuple[Tensor, Any]:
    """Losses [documents, tokens - 1] on the CPU, and the cache; of fewer tokens where the ``seconds`` are over."""
    begin = time.perf_counter()
    losses, cache = [], DynamicCache(config=model.config) if cache is None else cache
    runtime = runtime_of(model) if ittt.is_attached(model) else None
    last = None
    for at in range(0, ids.shape[1], PIECE):
        part = ids[:, at : at + PIECE]
        given = {cache_name(model): cache, "use_cache": True}
        if runtime is None:
            out = model(part, **given)
        else:
            with runtime.override(learn=learn):
                out = model(part, **given)
        cache = cache_of(out)
        logits = out.logits if last is None else torch.cat([last, out.logits], 1)
        targets = part if last is not None else part[:, 1:]
        pairs = zip(logits[:, : targets.shape[1]], targets, strict=True)
        losses.append(
            torch.stack([nn.functional.cross_entropy(x.float(), y, reduction="none") for x, y in pairs]).cpu()
        )
        last = out.logits[:, -1:]
        if time.perf_counter() - begin > seconds:
            break
    return torch.cat(losses, 1), cache


def figures(on: Tensor, off: Tensor) -> dict[str, Any]:
    """Means over all tokens and over the last quarter, by document, and by position (512 tokens each)."""
    quarter = slice(3 * on.shape[1] // 4, None)
    worse = stretches(on - off)
    positions = lambda x: [float(part.mean()) for part in x.mean(0).split(512)]  # noqa: E731
    return {
        "on": float(on.mean()),
        "off": float(off.mean()),
        "gain": float((off - on).mean()),
        "gain_last_quarter": float((off - on)[:, quarter].mean()),
        "on_by_document": on.mean(1).tolist(),
        "off_by_document": off.mean(1).tolist(),
        "gain_by_document": (off - on).mean(1).tolist(),
        "worst_stretch": float(worse.max()),
        "worst_stretch_by_document": worse.tolist(),
        "gain_by_stretch": [[float(x.mean()) for x in row.split(STRETCH)] for row in off - on],
        "on_by_position": positions(on),
        "off_by_position": positions(off),
    }


def stretches(worse: Tensor) -> Tensor:
    """The largest mean [documents] of a difference [documents, tokens] over ``STRETCH`` tokens in a row."""
    n = min(STRETCH, worse.shape[1])
    sums = nn.functional.pad(worse.double().cumsum(1), (1, 0))
    return (sums[:, n:] - sums[:, :-n]).amax(1) / n


def own_gain(model: Any, ids: Tensor, cache: Any) -> dict[str, float]:
    """Return the gain of reading a text beyond what reading another text of its kind has adjusted already.

    ``cache``: after the texts were read once. Every row continues with the state of the row before it.
    """
    state = {i: fast.fork() for i, fast in ittt.fast_weights(cache).items()}
    for fast in state.values():
        fast.select(torch.arange(len(ids)).roll(1))
    with stopped(model, state, ids.shape[1]) as kept:
        still, _ = read(model, ids, with_state(model, kept, ids), learn=False)
    learning, _ = read(model, ids, with_state(model, state, ids))
    gain = (still - learning).mean(1)
    return {"after_another_stopped": float(still.mean()), "after_another": float(learning.mean()),
            "own_gain": float(gain.mean()), "own_gain_by_document": gain.tolist()}  # fmt: skip


@contextmanager
def stopped(model: Any, state: dict[int, Any], tokens: int) -> Iterator[dict[int, Any]]:
    """The states to read with and not to write: of objective "loss" itself, else in chunks as long as the text.

    A target other than the loss has no switch; in chunks of all ``tokens`` that were read no chunk is complete again
    before the text ends.
    """
    runtime = runtime_of(model)
    if runtime.config.objective == "loss":
        yield state
        return
    if tokens % runtime.config.chunk_size:
        raise UserError(f"--tokens {tokens}: take a multiple of the chunk size, {runtime.config.chunk_size}")
    kept = {i: fast.fork() for i, fast in state.items()}
    for fast in kept.values():
        fast.z, fast.u, fast.history, fast.kept = None, None, {}, (0,) * fast.rows
        fast.chunk_size = tokens
    with runtime.override(config=replace(runtime.config, chunk_size=tokens)):
        yield kept


def settings_of(job: dict[str, Any], model: Any = None) -> dict[str, Any]:
    """A job with the defaults that it leaves out; what an attached ``model`` reads with."""
    given = {k: v for k, v in job.items() if k not in ("name", "own", "other", "method")}
    config = runtime_of(model).config if model else ittt.InPlaceTTTConfig(**{"objective": "loss", **given})
    kept = ("layers", "chunk_size", "update_size", "decay", "rule", "lr")
    own = {"objective": config.objective} if model else {}
    return {name: getattr(config, name) for name in kept} | job | own


def measure(
    model: Any, data: dict[str, Tensor], off: dict[str, Tensor], job: dict[str, Any], seconds: float = 1e9
) -> dict[str, Any]:
    """One setting, all domains, each read for so many ``seconds`` at most.

    Objective "learned": a model that has fast weights already, as it is.
    """
    settings = {k: v for k, v in job.items() if k not in ("name", "own", "other")}
    if job.get("objective") != "learned":
        if ittt.is_attached(model):
            ittt.detach(model)
        ittt.attach(model, ittt.InPlaceTTTConfig(**{"objective": "loss", **settings}))
    elif not ittt.is_attached(model) or runtime_of(model).config.objective == "loss":
        raise UserError("the model's own fast weights are gone: put the job with objective: learned first")
    found: dict[str, Any] = {}
    for domain, ids in data.items():
        start = time.perf_counter()
        on, cache = read(model, ids, seconds=seconds)
        row = {"tokens_read": on.shape[1] + 1} | figures(on, off[domain][:, : on.shape[1]])
        row["seconds"] = time.perf_counter() - start
        if job.get("other"):
            row["other_domains"] = dict(others(model, cache, domain, data))
        if job.get("own", True) and len(ids) > 1:
            row |= own_gain(model, ids, cache)
        found[domain] = row
    return found


def others(model: Any, cache: Any, domain: str, data: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, float]]]:
    """Losses on the first 2,048 tokens of the other domains, without updates and after a text with learning stopped."""
    learned = {i: fast.fork() for i, fast in ittt.fast_weights(cache).items()}
    rows_read = next(iter(learned.values())).rows
    for name, ids in data.items():
        if name != domain:
            own = ids[torch.arange(rows_read, device=ids.device) % len(ids), :2048]
            with ittt.updates_off(model):
                before, _ = read(model, own)
            after, _ = read(model, own, with_state(model, learned, own), learn=False)
            yield name, {"before": float(before.mean()), "after": float(after.mean())}


def with_state(model: Any, learned: dict[int, Any], ids: Tensor) -> Any:
    """An empty cache with fast weights in it."""
    cache = DynamicCache(config=model.config)
    read(model, ids[:, :1], cache)  # makes the layers
    clear(cache)
    for i, fast in learned.items():
        layer: Any = cache.layers[i]
        layer.fast, layer.record = fast.fork(), None
    return cache


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--documents", type=int, default=None, help="of each domain, at most")
    parser.add_argument("--texts", default="books,code", help="domains, separated by commas")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE", help="a text as another domain")
    parser.add_argument("--join", action="store_true", help="read the texts of a domain one after another")
    parser.add_argument("--together", action="store_true", help="all domains as the rows of one batch")
    parser.add_argument("--seconds-of-text", type=float, default=1e9, help="at most, for each domain's texts")
    parser.add_argument("--weights", choices=("trained", "random"), default="trained")
    arguments = parser.parse_args()
    begin, device = time.perf_counter(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = plain(arguments)
    if arguments.weights == "random":
        torch.manual_seed(0)
        ittt.detach(model)
        model = AutoModelForCausalLM.from_config(model.config).eval()
    model = model.to(device)
    own = {name: Path(file) for name, file in (x.split("=", 1) for x in arguments.text)}
    data = {}
    for domain in [*filter(None, arguments.texts.split(",")), *own]:
        ids = rows(texts(domain, arguments.books, own), tokenizer, arguments.tokens, arguments.join)
        if domain == "random":
            shape = (arguments.documents or 4, arguments.tokens)
            ids = torch.randint(len(tokenizer), shape, generator=torch.Generator().manual_seed(0))
        if not len(ids):
            raise UserError(f"no text of {domain} has {arguments.tokens:,} tokens: ask for fewer by --tokens")
        data[domain] = ids[: arguments.documents].to(device)
    if arguments.together:
        data = {" and ".join(data): torch.cat(list(data.values()))}
    with ittt.updates_off(model) if ittt.is_attached(model) else torch.no_grad():
        off = {domain: read(model, ids)[0] for domain, ids in data.items()}
    print({k: (tuple(v.shape), round(float(off[k].mean()), 4)) for k, v in data.items()}, flush=True)
    for job in jobs_of(arguments, begin):
        try:
            found = measure(model, data, off, job, arguments.seconds_of_text)
        except UserError as error:
            print(f"{job['name']}: {error}", flush=True)
            continue
        record = {
            "name": job["name"], "model": arguments.name, "window": arguments.window, "tokens": arguments.tokens,
            "weights": arguments.weights, "settings": settings_of(job, model), "domains": found, **about(),
        }  # fmt: skip
        write_json(arguments.out / f"{arguments.run}-{job['name']}.json", record)
        for domain, row in found.items():
            own_part = f", own {row['own_gain']:+.3f}" if "own_gain" in row else ""
            print(
                f"{arguments.name} {job['name']} {domain}: gain {row['gain']:+.4f}, last quarter "
                f"{row['gain_last_quarter']:+.4f}{own_part}, worst stretch {row['worst_stretch']:+.4f}, "
                f"{row['seconds']:.0f} s",
                flush=True,
            )


def arguments_of(doc: str | None) -> argparse.ArgumentParser:
    """The arguments that the benchmarks of reading share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help=f"a directory, a GGUF file, or {SHIPPED!r}")
    parser.add_argument("--tokenizer", type=Path, default=None, help="a directory, where the model's own is not good")
    parser.add_argument("--name", required=True, help="of the model, in the records")
    parser.add_argument("--window", type=int, default=None)
    parser.add_argument("--books", type=Path, nargs="+", default=[], help="JSON lines, xz")
    parser.add_argument("--jobs", type=Path, default=Path(__file__).parent / "reading_jobs.yaml")
    parser.add_argument("--run", required=True, help="which list of the file of jobs")
    parser.add_argument("--share", default="0/1", help="K/N: every N-th job from the K-th on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1e9, help="no new job after so many")
    return parser


def plain(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The model in float32 on the CPU, attached, and its tokenizer; one that has fast weights as it is."""
    objective = None if arguments.model == SHIPPED or has_fast_weights(Path(arguments.model)) else "loss"
    options: dict[str, Any] = {"objective": objective, "window": arguments.window, "tokenizer": arguments.tokenizer}
    return load(arguments.model, "cpu", **options)


def jobs_of(arguments: argparse.Namespace, begin: float) -> Iterator[dict[str, Any]]:
    """This process's jobs, until the time is over."""
    own, of = map(int, arguments.share.split("/"))
    for job in yaml.safe_load(arguments.jobs.read_text())[arguments.run][own::of]:
        if time.perf_counter() - begin > arguments.seconds:
            print("out of time before", job["name"], flush=True)
            return
        yield job


if __name__ == "__main__":
    main()
