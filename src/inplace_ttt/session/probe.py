"""Probes: at intervals, the loss of the next tokens with and without updates, before these tokens are learned."""

import copy
from collections.abc import Sequence

import torch
from torch import nn

from .diagnostics import Timeline, measure
from .stream import Reader, Stream

SAMPLE = 256
"""Tokens scored with and without updates."""


class Probe:
    """A sampler of diagnostics every ``every`` tokens (0: never)."""

    def __init__(self, reader: Reader, every: int) -> None:
        self.reader, self.every = reader, every

    def before(self, stream: Stream, timeline: Timeline, ids: Sequence[int], at: int = 0) -> int:
        """Take a sample before the ids from ``at`` on are fed, if one is due and as many ids are there.

        Returns how many ids may be fed before the next call.
        """
        rest = len(ids) - at
        if not self.every:
            return rest
        if timeline.due(stream.tokens) and rest >= SAMPLE and self.reader.fits(stream, SAMPLE):
            layers = measure(self.reader.model, stream.fast, config=self.reader.config)
            timeline.append(stream.tokens, layers, *self.losses(stream, ids[at : at + SAMPLE]))
        return min(rest, max(timeline.next - stream.tokens, SAMPLE))

    def losses(self, stream: Stream, ids: Sequence[int]) -> tuple[float, float]:
        """Return the losses of ids in nats per token, with the fast weights and without them.

        Without: the slow weights alone read as many tokens as attention sees now, at most ``RECENT``, from scratch; a
        model whose window is much longer than that would do a little better.
        """
        reader, own = self.reader, self.reader.own_window
        seen = 2 * own if own else stream.cached
        plain = copy.copy(reader)
        plain.adapts = False
        fresh = plain.new()
        for _ in plain.feed(fresh, stream.recent[-seen:]):
            pass
        on, off = (
            torch.cat([logits for _, logits in r.feed(s, ids, scored=True)])
            for r, s in ((reader, stream.copy()), (plain, fresh))
        )
        return _mean(on[:-1], ids[1:]), _mean(off[:-1], ids[1:])


def _mean(logits: torch.Tensor, ids: Sequence[int]) -> float:
    return float(nn.functional.cross_entropy(logits.float(), torch.tensor(list(ids), device=logits.device)))
