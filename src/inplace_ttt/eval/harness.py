"""Models with fast weights in lm-evaluation-harness, with updates on and off on the same samples.

Importing this module registers the harness model ``inplace-ttt``. The harness does not discover third-party models,
so start its command line through this module, with the same arguments:

    python -m inplace_ttt.eval.harness --model inplace-ttt --model_args pretrained=DIR,updates=off --tasks piqa

Every request is read from an empty cache, so the fast weights start at zero and nothing passes between requests.
"""

import copy
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from inplace_ttt.errors import UserError
from inplace_ttt.eval.harness_tasks import PAPER, RULER, RULER_OFFLINE, evaluate, load_tasks, require
from inplace_ttt.eval.nll import evaluating, token_losses
from inplace_ttt.eval.paired import Mean, bootstrap_mean
from inplace_ttt.hf.attach import READING, is_attached, runtime_of, updates_off
from inplace_ttt.hf.load import load_model, load_tokenizer
from inplace_ttt.hf.window import sliding_windows

require()

from lm_eval import utils as harness_utils  # noqa: E402
from lm_eval.api.registry import model_registry  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.models.utils import normalize_gen_kwargs  # noqa: E402

__all__ = ["PAPER", "RULER", "RULER_OFFLINE", "InPlaceTTTLM", "Paired", "SampleValue", "main", "paired", "run"]

NAME = "inplace-ttt"
UNLIMITED = 1 << 40
_HARNESS_ARGUMENTS = {
    "add_bos_token", "chat_template_args", "enable_thinking", "logits_cache", "max_batch_size", "prefix_token_id",
    "softmax_dtype", "think_end_token",
}  # fmt: skip


class InPlaceTTTLM(HFLM):  # type: ignore[misc]
    """A wrapper of a model with fast weights for lm-evaluation-harness.

    ``pretrained``: what ``inplace_ttt.from_pretrained`` reads (directory, adapter, hub id, the authors' format), or a
    model, attached or plain, which is left as it is. ``updates``: on or off. ``chunk_size``, ``lr``, ``decay``,
    ``clip`` and ``clip_relative`` override the stored settings. ``piece``: tokens read at a time in
    ``loglikelihood_rolling``. ``max_length``: the model's ``max_position_embeddings`` unless given; unlimited where all
    layers have sliding windows. A longer prompt raises UserError instead of being truncated.
    """

    def __init__(
        self,
        pretrained: str | Path | nn.Module,
        tokenizer: Any = None,
        *,
        updates: str | bool = "on",
        device: str | None = None,
        dtype: str | torch.dtype | None = None,
        batch_size: int | str = 1,
        max_length: int | None = None,
        piece: int = 2048,
        **arguments: Any,
    ) -> None:
        settings = {name: arguments.pop(name) for name in READING if name in arguments}
        if unknown := sorted(set(arguments) - _HARNESS_ARGUMENTS):
            raise UserError(f"{NAME} has no argument {', '.join(unknown)}")
        if str(updates).lower() not in ("on", "off", "true", "false"):
            raise UserError(f"updates must be on or off, got {updates!r}")
        for name, value in (("batch_size", batch_size), ("piece", piece)):
            if not str(value).isdigit() or int(value) < 1:
                raise UserError(f"{name} must be a whole number from 1 on, got {value!r}")
        model = pretrained if isinstance(pretrained, nn.Module) else _load(str(pretrained), device, dtype)
        self.updates = str(updates).lower() in ("on", "true")
        self._settings = None
        if is_attached(model):
            runtime = runtime_of(model)
            self._settings = replace(runtime.config, **settings)
        elif settings:
            raise UserError(f"the model has no fast weights, so no {', '.join(settings)} either")
        self._piece = int(piece)
        if model.dtype in (torch.float16, torch.bfloat16):
            arguments.setdefault("softmax_dtype", "float32")
        super().__init__(
            pretrained=model,
            tokenizer=_tokenizer(tokenizer, pretrained, model),
            backend="causal",
            batch_size=int(batch_size),
            max_length=int(max_length) if max_length else _max_length(model),
            **arguments,
        )

    def _reading(self) -> Any:
        """Return a context with this object's settings; a model that was passed in gets its own back after it."""
        if self._settings is None:
            return nullcontext()
        if not self.updates:
            return updates_off(self.model)
        return runtime_of(self.model).override(enabled=True, config=self._settings, form="dense")

    def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Any:
        """Return logits of rows that may be padded at their end: no real token sees what follows it."""
        with torch.no_grad(), self._reading():
            return self.model(input_ids=inps, use_cache=False).logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **keywords: Any) -> Any:
        with torch.no_grad(), self._reading():
            return super()._model_generate(context, max_length, stop, **keywords)

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **keywords: Any) -> list[tuple[float, bool]]:
        longest = max((len(context) + len(continuation) for _, context, continuation in requests), default=0)
        self._check_length(longest - 1, 0)
        scores: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, *args, **keywords)
        return scores

    def tok_batch_encode(self, strings: list[str], *args: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
        room = keywords.pop("left_truncate_len", None)
        ids, mask = super().tok_batch_encode(strings, *args, **keywords)
        if room is not None:
            self._check_length(ids.shape[1], self.max_length - room)
        return ids, mask

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        for request in requests:  # before any of them is read
            text, keywords = request.args
            new = normalize_gen_kwargs(keywords, self.max_gen_toks)["max_gen_toks"]
            self.tok_batch_encode([text], left_truncate_len=self.max_length - new)
        texts: list[str] = super().generate_until(requests, disable_tqdm)
        return texts

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, read in pieces through a cache.

        A text of up to ``max_length`` tokens is one window behind the prefix token. A longer one is cut into windows
        that score ``max_length`` tokens each with one token of context before them: each starts from an empty cache.
        """
        windows = []
        for i, request in enumerate(requests):
            (text,) = request.args
            cut = harness_utils.get_rolling_token_windows(
                self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            for window in cut:
                context, scored = harness_utils.make_disjoint_window(window)
                windows.append((i, context + scored, len(scored)))
        windows.sort(key=lambda window: -len(window[1]))
        totals = [0.0] * len(requests)
        for at in range(0, len(windows), self.batch_size):
            batch = windows[at : at + self.batch_size]
            rows = torch.zeros(len(batch), len(batch[0][1]), dtype=torch.int64)
            for row, (_, ids, _) in zip(rows, batch, strict=True):
                row[: len(ids)] = torch.tensor(ids)
            with self._reading():
                losses = token_losses(self.model, rows.to(self.device), self._piece).double().cpu()
            for row_losses, (i, ids, scored) in zip(losses, batch, strict=True):
                totals[i] -= float(row_losses[len(ids) - 1 - scored : len(ids) - 1].sum())
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _check_length(self, tokens: int, new: int) -> None:
        if tokens + new <= self.max_length:
            return
        parts = f"{tokens} tokens and {new} to generate" if new else f"{tokens} tokens"
        raise UserError(
            f"a prompt has {parts}, the model reads at most {self.max_length}: set max_length={tokens + new} if it can "
            "read that far, or take shorter prompts"
        )

    def get_model_info(self) -> dict[str, Any]:
        """Return the model's entry in the harness's report, without asking the hub."""
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": str(self.model.dtype),
            "updates": "on" if self.updates and self._settings else "off",
            "inplace_ttt": self._settings and self._settings.to_dict(),
        }


@dataclass(frozen=True)
class SampleValue:
    """A sample's value of one metric. ``on`` or ``off`` is None when that setting was not run.

    ``task`` is the name asked for, ``part`` the task below it (for groups such as mmlu), ``length`` RULER's. Perplexity
    metrics are given as nats per word or byte, with the number of these as ``weight``.
    """

    task: str
    part: str
    length: int | None
    sample: int
    metric: str
    on: float | None
    off: float | None
    weight: float = 1.0


@dataclass(frozen=True)
class Paired:
    """Means of a metric with updates on and off, and of on - off, with 95% bootstrap intervals over samples."""

    on: Mean
    off: Mean
    difference: Mean
    samples: int


if NAME not in model_registry:
    # By path, so that running this module as a program registers one class, not two.
    model_registry.register(NAME, target="inplace_ttt.eval.harness:InPlaceTTTLM")


def run(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 1,
    updates: Sequence[str] = ("on", "off"),
    lengths: Sequence[int] = (),
    num_fewshot: int | None = None,
    include_path: str | Path | None = None,
    seed: int = 0,
    **arguments: Any,
) -> list[SampleValue]:
    """Run tasks with updates on and off on the same samples; return one record for each sample and metric.

    ``model``: a model or a name as `InPlaceTTTLM` takes it (``arguments`` are its further ones); ``tokenizer`` None
    takes the one beside the model. ``lengths``: RULER's texts in tokens. ``limit``: samples of each task, at each
    length. ``include_path``: a directory of your own task files. Raises UserError, before anything is read, when a
    task is unknown or its data could not be loaded.
    """
    if not updates or set(updates) - {"on", "off"}:
        raise UserError(f"updates must be of on and off, got {updates!r}")
    records = []
    with evaluating(model) if isinstance(model, nn.Module) else nullcontext():
        lm = InPlaceTTTLM(model, tokenizer, batch_size=batch_size, **arguments)
        for task, length, parts in load_tasks(tasks, lm.tokenizer, lengths, include_path, texts=limit, seed=seed):
            for part in parts:
                samples, readings = range(len(part.eval_docs))[:limit], {}
                for setting in updates:
                    lm.updates = setting == "on"
                    readings[setting] = list(evaluate(lm, part, samples, length, num_fewshot, seed))
                for pair in zip(*readings.values(), strict=True):
                    if len({sample["prompt_hash"] for sample, _ in pair}) > 1:
                        raise RuntimeError(
                            f"task {part.task_name} made other prompts the second time: its results are not paired"
                        )
                    number, found = int(pair[0][0]["doc_id"]), dict(zip(readings, (x for _, x in pair), strict=True))
                    for metric, (_, weight) in pair[0][1].items():
                        on, off = (found[s][metric][0] if s in found else None for s in ("on", "off"))
                        records.append(SampleValue(task, part.task_name, length, number, metric, on, off, weight))
    return records


def paired(records: Sequence[SampleValue]) -> dict[tuple[str, int | None, str], Paired]:
    """Return means and differences by (task, length, metric). Parts of a group count by their samples."""
    groups: dict[tuple[str, int | None, str], list[SampleValue]] = {}
    for record in records:
        if record.on is not None and record.off is not None:
            groups.setdefault((record.task, record.length, record.metric), []).append(record)
    results = {}
    for key, found in groups.items():
        on, off, weights = (np.array([getattr(r, name) for r in found]) for name in ("on", "off", "weight"))
        means = [bootstrap_mean(values, weights) for values in (on, off, on - off)]
        results[key] = Paired(means[0], means[1], means[2], len(found))
    return results


def main() -> None:
    """Run lm-evaluation-harness's own command line, with the model ``inplace-ttt`` in it."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except (UserError, ConnectionError) as error:
        sys.exit(f"error: {error}")


def _load(name: str, device: str | None, dtype: str | torch.dtype | None) -> Any:
    if not torch.cuda.is_available() and (device or "cuda").startswith("cuda"):  # cuda:0 is the harness's own default
        device = "cpu"
    return load_model(name, device, dtype)


def _tokenizer(given: Any, pretrained: Any, model: Any) -> Any:
    """Return a copy of what was passed in, because the harness sets its padding token."""
    source = pretrained if given is None else given
    if isinstance(source, nn.Module):
        raise UserError("pass the tokenizer with a model object")
    found = load_tokenizer(source) if isinstance(source, str | Path) else copy.deepcopy(source)
    if found.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-text token, which the harness needs: set tokenizer.eos_token")
    return found


def _max_length(model: nn.Module) -> int | None:
    """Return the longest text; None leaves it to the harness, which looks into the model's configuration."""
    try:
        return UNLIMITED if all(sliding_windows(model)) else None
    except NotImplementedError:  # unusual kinds of attention
        return None


if __name__ == "__main__":
    main()
