"""Train a model for its window first, without fast weights: the fair base for what a window costs a reader.

    python benchmarks/train_control.py --model FILE.gguf --window 512 --tokens 40e6 --books FILES --out DIR

Rows of 8,192 tokens, each of one document: half from books, half from the source of the installed Python packages
(the standard library stays unseen). AdamW, cosine to a tenth, bfloat16 autocast on a GPU. Writes the model, its
tokenizer and ``training.json``. ``--seconds`` ends the training early, with the schedule: the record says how many
tokens it saw. Then: ``reading_by_loss.py --model DIR --name smollm2-control --run smollm2-window-control``.
"""

import argparse
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from reading_by_loss import books
from torch import Tensor, nn

import inplace_ttt as ittt
from inplace_ttt.hf.load import load
from inplace_ttt.records import about, write_json
from inplace_ttt.train.attention import choose_attention
from inplace_ttt.train.packages import SplitRule, collect


def rows_of(texts: list[str], tokenizer: Any, tokens: int, most: int, seed: int) -> Tensor:
    """Rows [n, tokens] that each lie in one document, at most ``most``, in random order."""
    random.Random(seed).shuffle(texts)
    found: list[list[int]] = []
    for at in range(0, len(texts), 32):
        for ids in tokenizer(texts[at : at + 32], add_special_tokens=False, verbose=False).input_ids:
            found += [ids[i : i + tokens] for i in range(0, len(ids) - tokens + 1, tokens)]
        if len(found) >= most:
            break
    random.Random(seed).shuffle(found)
    return torch.tensor(found[:most], dtype=torch.int32)


def order(counts: list[int], rows: int, seed: int) -> Iterator[tuple[int, int]]:
    """(domain, row) of every row of the training, the domains in turn, each beginning again where it ends."""
    for i in range(rows):
        domain = i % len(counts)
        epoch, place = divmod(i // len(counts), counts[domain])
        own = list(range(counts[domain]))
        random.Random(f"{seed} {domain} {epoch}").shuffle(own)
        yield domain, own[place]


def row_loss(model: Any, ids: Tensor) -> Tensor:
    """The mean loss of rows [n, tokens]."""
    logits = model(ids, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--books", type=Path, nargs="+", required=True, help="JSON lines, xz: training books")
    parser.add_argument("--tokens", type=float, default=40e6)
    parser.add_argument("--row", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=8, help="rows a step")
    parser.add_argument("--part", type=int, default=2, help="rows a forward")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seconds", type=float, default=1e9, help="of training, at most")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter()
    model, tokenizer = load(arguments.model, "cpu", objective="loss", window=arguments.window)
    ittt.detach(model)
    model = model.to(device).train()
    rows = math.ceil(arguments.tokens / arguments.row)
    corpus = collect(SplitRule())
    texts = {"books": books(arguments.books), "code": [document.text for document in corpus.of("train")]}
    data = {name: rows_of(found, tokenizer, arguments.row, rows // 2 + 1, 0) for name, found in texts.items()}
    print({name: tuple(x.shape) for name, x in data.items()}, f"{time.perf_counter() - start:.0f} s", flush=True)
    if not all(map(len, data.values())):
        raise SystemExit(f"no document has {arguments.row:,} tokens: give other books, or a smaller --row")
    attention = choose_attention("auto", device)
    model.set_attn_implementation(attention)
    print("attention:", attention, flush=True)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=arguments.lr, betas=(0.9, 0.95), fused=device.type == "cuda")
    steps, plan = rows // arguments.batch, order([len(x) for x in data.values()], rows, 0)
    begin, done, curve, kinds = time.perf_counter(), 0, [], list(data.values())
    for step in range(steps):
        # The schedule follows whichever is nearer to its end, the tokens or the time.
        share = max(step / steps, (time.perf_counter() - begin) / arguments.seconds)
        if share >= 1:
            break
        lr = arguments.lr * min(1, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = lr
        ids = torch.stack([kinds[d][i] for d, i in (next(plan) for _ in range(arguments.batch))]).long().to(device)
        total = torch.zeros((), device=device)
        for part in ids.split(arguments.part):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = row_loss(model, part) * len(part) / len(ids)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done += ids.numel()
        if step % 20 == 0 or step == steps - 1:
            seconds = time.perf_counter() - begin
            curve.append({"step": step, "tokens": done, "loss": float(total), "lr": lr, "seconds": round(seconds, 1)})
            print(f"step {step}/{steps}: loss {float(total):.4f}, {done / seconds:,.0f} tokens/s", flush=True)
    model.eval()
    model.set_attn_implementation("sdpa")
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    named = {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items() if k != "books"}
    record = {
        "settings": {**named, "books": [path.name for path in arguments.books]}, "tokens": done,
        "rows": {name: len(x) for name, x in data.items()}, "seconds_of_training": time.perf_counter() - begin,
        "attention": attention, "curve": curve, "packages": corpus.manifest_dicts(), **about(),
    }  # fmt: skip
    write_json(arguments.out / "training.json", record)
    print(f"{done:,} tokens in {record['seconds_of_training']:.0f} s: {arguments.out}", flush=True)


if __name__ == "__main__":
    main()
