"""How long training takes, by a formula: matrix products, attention, and what the rest moves through memory.

Symbols as in `inplace_ttt.train.plan`. The three parts are added: eager training overlaps them little. The shares of a
data sheet's numbers that are reached were read off the recorded runs (docs/training.md), which the formula then meets
within a fifth; a small model that waits for its host takes longer.
"""

from dataclasses import dataclass

PRODUCTS, ATTENTION, VARLEN, MEMORY = 0.7, 0.53, 0.28, 0.72
"""Shares reached by matrix products, PyTorch's attention of whole rows, its attention for packed rows, and memory."""
LOGIT_BYTES = 30
"""Moved for each entry of the logits: cast to float32, normalised, and back."""


@dataclass(frozen=True)
class Work:
    """Of one process: FLOPs of a trained token in matrix products and in attention, bytes a token and bytes a step."""

    products: float
    attention: float
    token_bytes: float
    step_bytes: float
    tokens_per_step: int
    packed: bool
    """Whether attention is the one for packed rows."""

    def seconds_per_token(self, tflops: float, bandwidth: float) -> float:
        """On a device of so many TFLOP/s and TB/s by its data sheet."""
        peak, rate = tflops * 1e12, MEMORY * bandwidth * 1e12
        attention = self.attention / (peak * (VARLEN if self.packed else ATTENTION))
        moved = self.token_bytes + self.step_bytes / self.tokens_per_step
        return self.products / (peak * PRODUCTS) + attention + moved / rate


def layer_bytes(D: int, F: int, q: int, kv: int, half: int, *, casts: bool, head_norms: bool) -> int:
    """What a layer's element-wise operations read and write for a token, forward, run one by one.

    q, kv: widths of the queries and of the keys. Two norms of 8 passes in float32, two residual sums, rotary
    embeddings, the MLP's activation and product; norms of the heads, and autocast's copies for five projections.
    """
    moved = 2 * 8 * 8 * D + 24 * D + 40 * (q + kv) + 9 * half * F
    if head_norms:
        moved += 8 * 8 * (q + kv)
    if casts:
        moved += 5 * 6 * D
    return moved
