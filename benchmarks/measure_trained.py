"""A trained model's gain by reading, and its memory: the evaluation that every run of runs.py ends with.

    python benchmarks/measure_trained.py MODEL '{books: [FILE], tokens: 8192, ruler: out/ruler.jsonl}'

Books and modules of Python's standard library (as `reading_by_loss.py` reads them), updates on and off: losses by
document, by position and after the first write; the text's own gain, after another text of its kind; sizes of the fast
weights at the end of a text; needles, multi-query associative recall and RULER's tasks whose texts `ruler_texts.py`
wrote. A model without fast weights is read once, as "on"; with ``reading`` it is also read with the loss as objective,
by the library's own settings. All in float32 (on a GPU its products in TF32).
"""

import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from reading_by_loss import STRETCH, own_gain, read, rows, stretches, texts
from rich.console import Console
from ruler_texts import score
from transformers import AutoTokenizer

import inplace_ttt as ittt
from inplace_ttt.errors import UserError, in_one_line
from inplace_ttt.eval.nll import new_cache, position_edges
from inplace_ttt.eval.paired import bootstrap_mean, means
from inplace_ttt.eval.runner import Variant, run
from inplace_ttt.eval.suites import mqar, needle, nll
from inplace_ttt.eval.suites.mqar import RecallSuite
from inplace_ttt.eval.suites.needle import NeedleSuite
from inplace_ttt.eval.suites.nll import PIECE, NllSuite, piece_size
from inplace_ttt.eval.suites.texts import EvalText, load_texts
from inplace_ttt.hf.attach import runtime_of
from inplace_ttt.hf.cache import cache_name
from inplace_ttt.hf.load import load_baseline
from inplace_ttt.session.diagnostics import measure
from inplace_ttt.train.schema import build, load_yaml

TOKENS_AT_ONCE = 1 << 18
"""Of RULER's texts that are read side by side."""


@dataclass(frozen=True)
class Evaluation:
    """``books``: JSON lines of held-out books. ``tokens``: of a text; ``documents``: of each domain, at most.

    ``contexts``: for sliding-window perplexity, the loss of a document's last 256 tokens after so many before them.
    ``needle``, ``mqar``: settings of the suites (null: left out). ``ruler``: a file of texts, of each task and length
    ``ruler_texts`` at most, and of each answer ``ruler_tokens``. ``reading``: measure a plain model with the loss as
    objective, with these settings. ``speed``: time one row of so many tokens.
    """

    books: tuple[str, ...] = ()
    tokens: int = 8192
    documents: int | None = None
    contexts: tuple[int, ...] = ()
    needle: dict[str, Any] | None = field(default_factory=dict)
    mqar: dict[str, Any] | None = field(default_factory=dict)
    ruler: str | None = None
    ruler_texts: int | None = None
    ruler_tokens: int = 128
    reading: dict[str, Any] | None = None
    speed: int | None = None


def measure_trained(directory: Path, settings: Mapping[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """Measure a saved model and say what takes how long. Raises UserError for settings that are wrong.

    What fails after the losses is named in ``failed``, and the rest is measured.
    """
    given = build(Evaluation, settings, "evaluation")
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = load_baseline(directory).float()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    found: dict[str, Any] = {"settings": dict(settings), "failed": {}}

    def part(name: str, work: Callable[[], Any]) -> None:
        begin = time.perf_counter()
        try:
            found[name] = work()
        except Exception as error:
            if name == "losses":
                raise
            traceback.print_exc()
            found["failed"][name] = in_one_line(error)
        say(f"measured {name} in {time.perf_counter() - begin:.1f} s")

    files, data = list(map(Path, given.books)), {}
    for domain in ("books", "code") if files else ("code",):
        ids = rows(texts(domain, files, {}), tokenizer, given.tokens)[: given.documents]
        if not len(ids):
            raise UserError(f"evaluation.tokens: no text of {domain} has {given.tokens:,} tokens")
        data[domain] = ids.to(device)
    part("losses", lambda: {domain: losses(model, ids) for domain, ids in data.items()})
    if given.contexts or given.needle is not None or given.mqar is not None:
        part("recall", lambda: recall(model, tokenizer, given))
    if given.ruler is not None:
        part("ruler", lambda: ruler(model, tokenizer, Path(str(given.ruler)), given.ruler_texts, given.ruler_tokens))
    if given.speed is not None:
        part("speed", lambda: speed(model, int(given.speed or 0)))
    if given.reading is not None and not ittt.is_attached(model):
        options = given.reading
        part("reading", lambda: {domain: by_loss(model, ids, options) for domain, ids in data.items()})
    return found


def losses(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """One domain's documents [N, T]: mean losses, by document and position, and sizes of the fast weights."""
    on, cache = read(model, ids)
    found: dict[str, Any] = {"on": float(on.mean()), "on_by_document": on.mean(1).tolist()}
    edges = [edge for edge in position_edges(ids.shape[1]) if edge < ids.shape[1]]
    found["positions"] = edges
    spans = [slice(max(low - 1, 0), high - 1) for low, high in zip(edges, [*edges[1:], ids.shape[1]], strict=True)]
    found["on_by_position"] = [float(on[:, span].mean()) for span in spans]
    if not ittt.is_attached(model):
        return found
    with ittt.updates_off(model):
        off, _ = read(model, ids)
    gap = (off - on).double()
    chunk = runtime_of(model).config.chunk_size
    gain = bootstrap_mean(gap.mean(1).numpy(), np.ones(len(gap)))
    first = gap[:, chunk - 1 : 2 * chunk - 1].mean(1)  # tokens of the second chunk
    found |= {
        "off": float(off.mean()), "off_by_document": off.mean(1).tolist(),
        "off_by_position": [float(off[:, span].mean()) for span in spans],
        "gain": gain.value, "gain_low": gain.low, "gain_high": gain.high,
        "gain_last_quarter": float(gap[:, 3 * gap.shape[1] // 4 :].mean()),
        "gain_after_first_write": float(first.mean()), "gain_after_first_write_by_document": first.tolist(),
        "worst_stretch": float(stretches(-gap).max()), "stretch": min(STRETCH, gap.shape[1]),
        "sizes": sizes(model, cache),
    }  # fmt: skip
    return found | (own_gain(model, ids, cache) if len(ids) > 1 and not ids.shape[1] % chunk else {})


def sizes(model: Any, cache: Any) -> list[dict[str, Any]]:
    """Sizes by layer at the end of a text, the median of two documents: ||eta S z|| / ||W0 z|| and the norms'."""
    fast = ittt.fast_weights(cache)
    documents = range(min(2, next(iter(fast.values())).rows)) if fast else range(0)
    layers: dict[int, list[Any]] = {}
    for row in documents:
        for layer in measure(model, fast, row):
            layers.setdefault(layer.layer, []).append(layer)
    found = []
    for index, kept in sorted(layers.items()):
        found.append({"layer": index})
        for name in ("output_change", "relative_norm", "update_norm", "effective_rank"):
            values = [value for one in kept if (value := getattr(one, name)) is not None]
            found[-1][name] = statistics.median(values) if values else None
    return found


def readings(model: Any) -> list[Variant]:
    """Updates on and off; of a plain model the one reading there is."""
    on = Variant("on", model, nullcontext)
    attached = ittt.is_attached(model)
    return [on, Variant("off", model, lambda: ittt.updates_off(model))] if attached else [on]


def recall(model: Any, tokenizer: Any, given: Evaluation) -> dict[str, Any]:
    """Perplexity by context, needles and associative recall in the books (without any: in the modules): tables."""
    books = load_texts(given.books, tokenizer, domain="books") if given.books else [
        EvalText(str(i), "code", np.array(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, np.int32))
        for i, text in enumerate(texts("code", [], {}))
    ]  # fmt: skip
    suites: list[Any] = [NllSuite(books, 2, 0, contexts=given.contexts)] if given.contexts else []
    if given.needle is not None:
        suites.append(NeedleSuite(tokenizer, books, **given.needle))
    if given.mqar is not None:
        suites.append(RecallSuite(tokenizer, books, **given.mqar))
    with TemporaryDirectory() as folder:
        records = run(suites, readings(model), Path(folder) / "run", {}, console=Console(quiet=True))
    found = [suite.tables(records) for suite in (nll, needle, mqar)]
    return {name: rows for tables in found for name, rows in tables.items()}


@torch.no_grad()
def ruler(model: Any, tokenizer: Any, file: Path, most: int | None, longest: int) -> list[dict[str, Any]]:
    """Scores of RULER's texts by task and length, and the mean of the tasks at each length."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for line in lines:
        line["tokens"] = min(line["tokens"], longest)
        groups.setdefault((line["task"], line["length"]), []).append(line)
    kept = [line for group in groups.values() for line in group[:most]]
    records = []
    for variant in readings(model):
        with variant.context():
            for length in sorted({line["length"] for line in kept}):
                same = sorted((x for x in kept if x["length"] == length), key=lambda x: x["tokens"])
                step = max(1, TOKENS_AT_ONCE // length)
                for batch in (same[at : at + step] for at in range(0, len(same), step)):
                    for line, text in zip(batch, generate(model, tokenizer, batch), strict=True):
                        about = {name: line[name] for name in ("task", "length")}
                        document = f"{line['task']}/{line['length']}/{line['prompt'][-200:]}"
                        value = score(text, line["outputs"])
                        records.append({**about, "document": document, "variant": variant.label, "value": value})
    every = [{**record, "task": "all"} for record in records]
    return means(every + records, ["task", "length"], "value")


def generate(model: Any, tokenizer: Any, batch: list[dict[str, Any]]) -> list[str]:
    """Return the text that the model writes after each prompt, the most likely token every time."""
    rows_of = [tokenizer(line["prompt"]).input_ids for line in batch]
    width = max(map(len, rows_of))
    ids = torch.zeros(len(batch), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, seen, found in zip(ids, mask, rows_of, strict=True):
        row[width - len(found) :] = torch.tensor(found)
        seen[width - len(found) :] = 1
    device = next(model.parameters()).device
    new = [line["tokens"] for line in batch]
    out = model.generate(
        ids.to(device), attention_mask=mask.to(device), do_sample=False, max_new_tokens=max(new),
        pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    written = out[:, width:].tolist()
    return [tokenizer.decode(row[:n], skip_special_tokens=True) for row, n in zip(written, new, strict=True)]


@torch.no_grad()
def speed(model: Any, tokens: int, decoded: int = 32) -> dict[str, float]:
    """One row of random tokens: tokens per second of reading it, seconds of a token after it, bytes of the cache."""
    device = next(model.parameters()).device
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, tokens + decoded), generator=draw).to(device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(2):  # the first time is for compiling
        cache = new_cache(model)
        wait()
        begin = time.perf_counter()
        for piece in torch.split(ids[:, :tokens], piece_size(model, PIECE), 1):
            model(piece, use_cache=True, logits_to_keep=1, **{cache_name(model): cache})
        wait()
        middle = time.perf_counter()
        for piece in torch.split(ids[:, tokens:], 1, 1):
            model(piece, use_cache=True, **{cache_name(model): cache})
        wait()
        end = time.perf_counter()
    size = tensor_bytes([layer.__dict__ for layer in cache.layers], set())
    return {"tokens": tokens, "prefill_tokens_per_second": tokens / (middle - begin),
            "decode_seconds": (end - middle) / decoded, "cache_bytes": size}  # fmt: skip


def tensor_bytes(value: Any, seen: set[int]) -> int:
    """Bytes of all tensors in containers and in fast weights: the state, not W0 nor the chunks kept for undoing."""
    if isinstance(value, torch.Tensor):
        place = value.untyped_storage().data_ptr()
        is_new = place not in seen
        seen.add(place)
        return value.numel() * value.element_size() if is_new else 0
    if isinstance(value, list | tuple):
        return sum(tensor_bytes(part, seen) for part in value)
    if type(value).__module__.startswith(("inplace_ttt.core", "inplace_ttt.fast")):
        value = getattr(value, "__dict__", {})
    if not isinstance(value, dict):
        return 0
    return sum(tensor_bytes(part, seen) for name, part in value.items() if name not in ("slow", "history", "_key"))


def by_loss(model: Any, ids: torch.Tensor, settings: Mapping[str, Any]) -> dict[str, Any]:
    """One domain's documents with the loss as objective, for a plain model."""
    ittt.attach(model, ittt.InPlaceTTTConfig(**{"objective": "loss", **settings}))
    try:
        return losses(model, ids)
    finally:
        ittt.detach(model)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print(json.dumps(measure_trained(Path(sys.argv[1]), load_yaml(sys.argv[2]), print), indent=1))
