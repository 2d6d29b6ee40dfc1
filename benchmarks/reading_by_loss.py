"""What a pretrained model gains when it learns from what it reads, with the loss as objective and nothing trained.

    python benchmarks/reading_by_loss.py --model DIR_OR_FILE.gguf --window 512 --name NAME --run RUN --out DIR

Reads the same documents of two domains (books, and modules of Python's standard library) as rows of one batch, once
without updates and once for every setting in the file of jobs, and writes one JSON record for each: losses by document
and position, the gain, and what of it is the text's *own*: the other text of the same kind is read first with the state
kept, then this one with learning stopped and with learning on. ``--share K/N`` takes every N-th job: one process a GPU.
"""

import argparse
import json
import lzma
import random
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM
from transformers.cache_utils import DynamicCache

import inplace_ttt as ittt
from inplace_ttt.eval.nll import token_losses
from inplace_ttt.hf.attach import runtime_of
from inplace_ttt.hf.cache import cache_name, cache_of
from inplace_ttt.hf.window import clear
from inplace_ttt.records import about, write_json

PIECE = 1024
MODULES = ("argparse", "ast", "inspect", "tarfile", "turtle", "typing", "subprocess", "doctest")
"""Long modules of the standard library."""


def load(name: str, window: int | None, device: torch.device) -> tuple[Any, Any]:
    """A plain model and its tokenizer; Llama weights as a Mistral of a sliding window where one is asked for."""
    path = Path(name)
    place = (str(path.parent), {"gguf_file": path.name}) if path.suffix == ".gguf" else (name, {})
    tokenizer = AutoTokenizer.from_pretrained(place[0], **place[1])
    model: Any = AutoModelForCausalLM.from_pretrained(place[0], dtype=torch.float32, **place[1])
    if window and model.config.model_type == "llama":
        values = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "architectures")}
        plain = MistralForCausalLM(MistralConfig(**{**values, "sliding_window": window}))
        plain.load_state_dict(model.state_dict())
        model = plain
    return model.to(device).eval(), tokenizer


def books(file: Path, seed: int = 0) -> list[str]:
    """The texts of a file of JSON lines, from a place inside each."""
    with lzma.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"][20_000:] for line in lines]


def modules() -> list[str]:
    """Long modules of the standard library."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return [(folder / f"{name}.py").read_text(encoding="utf-8") for name in MODULES]


def rows(texts: list[str], tokenizer: Any, tokens: int) -> Tensor:
    """Ids [documents, tokens] of the texts that are long enough."""
    begin = tokenizer("").input_ids  # a beginning of text, for models that have one
    ids = [(begin + tokenizer(text, add_special_tokens=False).input_ids)[:tokens] for text in texts]
    return torch.tensor([x for x in ids if len(x) == tokens])


@torch.no_grad()
def read(model: Any, ids: Tensor, cache: Any = None, learn: bool = True) -> tuple[Tensor, Any]:
    """Losses [documents, tokens - 1] on the CPU, and the cache."""
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
        for row, target in zip(logits[:, : targets.shape[1]], targets, strict=True):
            losses.append(nn.functional.cross_entropy(row.float(), target, reduction="none").cpu())
        last = out.logits[:, -1:]
    pieces = len(losses) // len(ids)
    found = torch.stack(losses).view(pieces, len(ids), -1) if ids.shape[1] <= PIECE else None
    if found is not None:
        return found[0], cache
    whole = [torch.cat([losses[p * len(ids) + b] for p in range(pieces)]) for b in range(len(ids))]
    return torch.stack(whole), cache


def figures(on: Tensor, off: Tensor) -> dict[str, Any]:
    """Means over all tokens and over the last quarter, by document, and by position (512 tokens each)."""
    quarter = slice(3 * on.shape[1] // 4, None)
    positions = lambda x: [float(part.mean()) for part in x.mean(0).split(512)]  # noqa: E731
    return {
        "on": float(on.mean()),
        "off": float(off.mean()),
        "gain": float((off - on).mean()),
        "gain_last_quarter": float((off - on)[:, quarter].mean()),
        "gain_by_document": (off - on).mean(1).tolist(),
        "on_by_position": positions(on),
        "off_by_position": positions(off),
    }


def own_gain(model: Any, ids: Tensor) -> dict[str, float]:
    """What reading a text gains beyond what reading another text of its kind has adjusted already."""
    _, cache = read(model, ids.roll(1, 0))
    state = {i: fast.fork() for i, fast in ittt.fast_weights(cache).items()}
    clear(cache)
    stopped, _ = read(model, ids, cache, learn=False)
    fresh = DynamicCache(config=model.config)
    read(model, ids[:, :1], fresh)  # makes the layers
    clear(fresh)
    for i, fast in state.items():
        layer: Any = fresh.layers[i]
        layer.fast, layer.record = fast, None
    learning, _ = read(model, ids, fresh)
    return {"after_another_stopped": float(stopped.mean()), "after_another": float(learning.mean()),
            "own_gain": float((stopped - learning).mean())}  # fmt: skip


def measure(model: Any, data: dict[str, Tensor], off: dict[str, Tensor], job: dict[str, Any]) -> dict[str, Any]:
    """One setting, all domains."""
    settings = {k: v for k, v in job.items() if k not in ("name", "own", "other")}
    ittt.attach(model, ittt.InPlaceTTTConfig(objective="loss", **settings))
    found: dict[str, Any] = {}
    try:
        for domain, ids in data.items():
            start = time.perf_counter()
            on, cache = read(model, ids)
            row = figures(on, off[domain])
            row["seconds"] = time.perf_counter() - start
            if job.get("other"):
                clear(cache)
                other = next(x for name, x in data.items() if name != domain)[: len(ids), :2048]
                before = token_losses_off(model, other)
                state = cache if len(other) == len(ids) else None
                if state is not None:
                    after, _ = read(model, other, state, learn=False)
                    row["other_domain"] = {"before": float(before.mean()), "after": float(after.mean())}
            if job.get("own", True):
                row |= own_gain(model, ids)
            found[domain] = row
    finally:
        ittt.detach(model)
    return found


def token_losses_off(model: Any, ids: Tensor) -> Tensor:
    """Losses without updates."""
    with ittt.updates_off(model):
        return token_losses(model, ids, PIECE).cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--name", required=True, help="of the model, in the records")
    parser.add_argument("--window", type=int, default=None)
    parser.add_argument("--books", type=Path, required=True, help="JSON lines, xz")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--documents", type=int, default=None, help="of each domain, at most")
    parser.add_argument("--jobs", type=Path, default=Path(__file__).parent / "reading_jobs.yaml")
    parser.add_argument("--run", required=True, help="which list of the file of jobs")
    parser.add_argument("--share", default="0/1")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1e9, help="no new job after so many")
    arguments = parser.parse_args()
    begin, device = time.perf_counter(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load(arguments.model, arguments.window, device)
    texts = {"books": books(arguments.books), "code": modules()}
    data = {k: rows(v, tokenizer, arguments.tokens)[: arguments.documents].to(device) for k, v in texts.items()}
    off = {domain: read(model, ids)[0] for domain, ids in data.items()}
    print({k: (tuple(v.shape), round(float(off[k].mean()), 4)) for k, v in data.items()}, flush=True)
    jobs = yaml.safe_load(arguments.jobs.read_text())[arguments.run]
    own, of = map(int, arguments.share.split("/"))
    random.seed(0)
    for job in jobs[own::of]:
        if time.perf_counter() - begin > arguments.seconds:
            print("out of time before", job["name"], flush=True)
            break
        found = measure(model, data, off, job)
        record = {
            "name": job["name"], "model": arguments.name, "window": arguments.window, "tokens": arguments.tokens,
            "settings": job, "domains": found, **about(),
        }  # fmt: skip
        write_json(arguments.out / f"{arguments.run}-{job['name']}.json", record)
        say = {
            d: (
                round(r["gain"], 3),
                round(r["gain_last_quarter"], 3),
                round(r.get("own_gain", 0), 3),
                round(r["seconds"]),
            )
            for d, r in found.items()
        }
        print(arguments.name, job["name"], say, flush=True)


if __name__ == "__main__":
    main()
