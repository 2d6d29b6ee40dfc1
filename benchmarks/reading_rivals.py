"""Other ways to adapt a model to what it reads, at as many forward and backward passes as the loss as objective takes.

    python benchmarks/reading_rivals.py --model FILE.gguf --window 512 --name smollm2 --run rivals --books F --out DIR

Every document is a row of one batch with weights of its own. A chunk is scored, then one backward pass of its own
next-token loss (mean over its tokens; keys and values of earlier chunks are constants) and one step of an optimizer
change the weights that the next chunk is read with: the same chunks, passes and targets as ``reading_by_loss.py``.

A job's ``method`` says which weights: "lora" (r 16 on every projection of every layer, alpha 16), "all" (dynamic
evaluation), "norms", "last" (the last layer's down projection), "head" (the output matrix alone); ``optimizer`` how:
"adam", "sgd", or "sized" (each matrix moves by ``lr`` times its norm along the gradient). ``method: loss`` is this
library's objective with the job's other settings. Records hold the gain and the own gain as there.
"""

import time
from typing import Any

import torch
from reading_by_loss import arguments_of, books, figures, jobs_of, measure, modules, plain, read, rows, settings_of
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

import inplace_ttt as ittt
from inplace_ttt.hf.cache import cache_name, cache_of
from inplace_ttt.records import about, write_json

RANK = 16


class RowLinear(nn.Module):
    """A projection whose rows of a batch have their own weight [rows, out, in]."""

    def __init__(self, linear: nn.Linear, rows: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().expand(rows, -1, -1).clone())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.mT


class RowLora(nn.Module):
    """A projection with an update B A of low rank for every row; B begins at zero, the scale is 1."""

    def __init__(self, linear: nn.Linear, rows: int) -> None:
        super().__init__()
        self.base = linear
        out, width = linear.weight.shape
        self.A = nn.Parameter(linear.weight.new_empty(rows, RANK, width))
        self.B = nn.Parameter(linear.weight.new_zeros(rows, out, RANK))
        one = torch.empty(RANK, width)
        nn.init.kaiming_uniform_(one, a=5**0.5)
        with torch.no_grad():
            self.A.copy_(one)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (x @ self.A.mT) @ self.B.mT


class RowNorm(nn.Module):
    """A norm whose rows have their own weight: the model's norm with a weight of one, then the row's."""

    def __init__(self, norm: Any, rows: int) -> None:
        super().__init__()
        self.norm = norm
        self.weight = nn.Parameter(norm.weight.detach().expand(rows, -1).clone())
        norm.weight = nn.Parameter(torch.ones_like(norm.weight), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x) * self.weight[:, None]
        return out


class RowEmbedding(nn.Module):
    """An embedding whose rows have their own table."""

    def __init__(self, embedding: nn.Embedding, rows: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(embedding.weight.detach().expand(rows, -1, -1).clone())

    def forward(self, ids: Tensor) -> Tensor:
        return torch.stack([nn.functional.embedding(own, table) for own, table in zip(ids, self.weight, strict=True)])


def prepare(model: Any, method: str, rows: int) -> list[nn.Parameter]:
    """Give the rows weights of their own in ``model`` (a copy: it is changed); return those that learn."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    layers = model.model.layers
    inside = [(m, name) for m in layers.modules() for name, x in m.named_children() if isinstance(x, nn.Linear)]
    norms = [
        (m, name) for m in model.model.modules() for name, x in m.named_children() if "RMSNorm" in type(x).__name__
    ]
    places: list[tuple[Any, str, type[Any]]] = []
    if method == "lora":
        places = [(m, name, RowLora) for m, name in inside]
    elif method == "norms":
        places = [(m, name, RowNorm) for m, name in norms]
    elif method == "last":
        places = [(layers[-1].mlp, "down_proj", RowLinear)]
    elif method == "head":
        places = [(model, "lm_head", RowLinear)]
    elif method == "all":
        places = [(m, name, RowLinear) for m, name in inside] + [(m, name, RowNorm) for m, name in norms]
        places += [(model.model, "embed_tokens", RowEmbedding), (model, "lm_head", RowLinear)]
    else:
        raise ValueError(f"unknown method {method!r}")
    for module, name, kind in places:
        setattr(module, name, kind(getattr(module, name), rows))
    if method == "all" and model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    learning = [p for p in model.parameters() if p.requires_grad]
    if rows < 1 or not learning:
        raise ValueError(f"method {method!r} found nothing to learn in this model")
    return learning


class Sized(torch.optim.Optimizer):
    """Each row of each weight moves against its gradient by ``lr`` times its norm at the start."""

    def __init__(self, parameters: list[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})
        self.sizes = [_norms(p.detach()) for p in parameters]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step."""
        group = self.param_groups[0]
        for p, size in zip(group["params"], self.sizes, strict=True):
            if p.grad is not None:
                p -= group["lr"] * size * p.grad / _norms(p.grad).clamp(min=1e-12)


def _norms(x: Tensor) -> Tensor:
    """The norm of each row, with as many dimensions as x."""
    return x.flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1))


class Reader:
    """A model with weights of its own for every row, and what changes them."""

    def __init__(self, model: Any, method: str, optimizer: str, lr: float, rows: int, chunk_size: int) -> None:
        self.model, self.C = model, chunk_size
        self.learning = prepare(model, method, rows)
        kinds: dict[str, Any] = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD, "sized": Sized}
        self.optimizer = kinds[optimizer](self.learning, lr=lr)

    def read(self, ids: Tensor, learn: bool = True) -> Tensor:
        """Losses [rows, tokens - 1] on the CPU, each before the step that saw its token. The cache is new."""
        cache: Any = DynamicCache(config=self.model.config)
        losses: list[Tensor] = []
        last = None
        for at in range(0, ids.shape[1], self.C):
            part = ids[:, at : at + self.C]
            with torch.set_grad_enabled(learn):
                out = self.model(part, **{cache_name(self.model): cache, "use_cache": True})
                cache = cache_of(out)
                own = token_losses(out.logits[:, :-1], part[:, 1:])
            if last is not None:
                losses.append(token_losses(last, part[:, :1]).detach().cpu())
            losses.append(own.detach().cpu())
            last = out.logits[:, -1:].detach()
            if learn and part.shape[1] == self.C:  # as there, a chunk that is not complete is not learned
                self.optimizer.zero_grad(set_to_none=True)
                own.mean(1).sum().backward()
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        return torch.cat(losses, 1)

    @torch.no_grad()
    def roll(self) -> None:
        """Give every row what the row before it has learned: each has read another text then."""
        for p in self.learning:
            kept = [x for x in self.optimizer.state[p].values() if isinstance(x, Tensor) and x.shape == p.shape]
            for x in (p, *kept):
                x.copy_(x.roll(1, 0))


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits [rows, n, V], targets [rows, n] -> losses [rows, n]."""
    flat = nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return flat.view(targets.shape)


def rival(arguments: Any, job: dict[str, Any], data: dict[str, Tensor], off: dict[str, Tensor], fresh: Any) -> Any:
    """One rival, all domains. ``fresh``: makes a plain model."""
    found: dict[str, Any] = {}
    for domain, ids in data.items():
        torch.manual_seed(0)
        options = job["method"], job["optimizer"], float(job["lr"]), len(ids), int(job["chunk_size"])
        reader, start = Reader(fresh(), *options), time.perf_counter()
        row = figures(reader.read(ids), off[domain])
        row["seconds"] = time.perf_counter() - start
        row["weights_that_learn"] = sum(p.numel() for p in reader.learning) // len(ids)
        if job.get("own", True):
            reader.roll()
            stopped, learning = reader.read(ids, learn=False), reader.read(ids)
            row |= {"after_another_stopped": float(stopped.mean()), "after_another": float(learning.mean()),
                    "own_gain": float((stopped - learning).mean())}  # fmt: skip
        del reader
        found[domain] = row
    return found


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--documents", type=int, default=None, help="of each domain, at most")
    arguments = parser.parse_args()
    begin, device = time.perf_counter(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = plain(arguments)
    ittt.detach(model)
    weights = {name: x.to(device) for name, x in model.state_dict().items()}
    config, kind = model.config, type(model)

    def fresh() -> Any:
        with device:
            new = kind(config).eval()
        new.load_state_dict(weights)
        return new

    texts = {"books": books(arguments.books), "code": modules()}
    data = {k: rows(v, tokenizer, arguments.tokens)[: arguments.documents].to(device) for k, v in texts.items()}
    plain_model = fresh()
    off = {domain: read(plain_model, ids)[0] for domain, ids in data.items()}
    print({k: (tuple(v.shape), round(float(off[k].mean()), 4)) for k, v in data.items()}, flush=True)
    for job in jobs_of(arguments, begin):
        if job["method"] == "loss":
            found = measure(plain_model, data, off, {k: v for k, v in job.items() if k != "method"})
        else:
            found = rival(arguments, job, data, off, fresh)
        record = {
            "name": job["name"], "model": arguments.name, "window": arguments.window, "tokens": arguments.tokens,
            "settings": settings_of(job) if job["method"] == "loss" else job, "domains": found, **about(),
        }  # fmt: skip
        write_json(arguments.out / f"{arguments.run}-{job['name']}.json", record)
        for domain, row in found.items():
            print(
                f"{job['name']} {domain}: gain {row['gain']:+.4f}, own {row.get('own_gain', float('nan')):+.4f}, "
                f"{row['seconds']:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
