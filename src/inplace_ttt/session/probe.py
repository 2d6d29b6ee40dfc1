"""Looks now and then at what the updates did: loss of the next tokens with and without them, before learning those."""

from collections.abc import Sequence

import torch
from torch import nn

from ..hf.attach import updates_off
from .diagnostics import Timeline, measure
from .stream import Reader, Stream

SAMPLE = 256
"""Tokens scored with and without updates."""


class Probe:
    """Takes a sample every ``every`` tokens (0: never)."""

    def __init__(self, reader: Reader, every: int) -> None:
        self.reader, self.every = reader, every

    def before(self, stream: Stream, timeline: Timeline, ids: Sequence[int]) -> int:
        """Called before ``ids`` are fed: takes a sample if one is due; how many ids may be fed before the next look."""
        if not self.every:
            return len(ids)
        left = timeline.next - stream.tokens
        if left > 0 or len(ids) < SAMPLE:
            return min(len(ids), max(left, SAMPLE))
        layers = measure(self.reader.model, stream.fast, config=self.reader.config)
        timeline.append(stream.tokens, layers, *self.losses(stream, ids[:SAMPLE]))
        return min(len(ids), max(timeline.next - stream.tokens, SAMPLE))

    def losses(self, stream: Stream, ids: Sequence[int]) -> tuple[float, float]:
        """Nats per token of ids, with the fast weights and without them.

        Without: the slow weights alone read the same tokens after the last ``RECENT`` ones from scratch; a model whose
        window is much longer than that would do a little better.
        """
        copy = stream.copy()
        parts = [logits for _, logits in self.reader.feed(copy, ids, scored=True)]
        on = _mean(torch.cat(parts)[:-1], ids[1:])
        own = self.reader.own_window
        context = [*(stream.recent[-2 * own :] if own else stream.recent), *ids]
        was_training = self.reader.model.training
        self.reader.model.train(False)
        with updates_off(self.reader.model), torch.no_grad():
            logits = self.reader.model(
                input_ids=torch.tensor([context], device=self.reader.device), use_cache=False
            ).logits[0]
        self.reader.model.train(was_training)
        return on, _mean(logits[-len(ids) : -1], ids[1:])


def _mean(logits: torch.Tensor, ids: Sequence[int]) -> float:
    return float(nn.functional.cross_entropy(logits.float(), torch.tensor(list(ids), device=logits.device)))
