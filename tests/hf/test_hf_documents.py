"""Where documents come from, and the precision the projection's product is taken in."""

import pytest
import torch
from contract.families import C, adapted, logits, tokens
from torch.testing import assert_close

FIRST, SECOND = 2 * C + 1, C + 2
IDS = tokens(1, FIRST + SECOND)
POSITIONS = torch.cat([torch.arange(FIRST), torch.arange(SECOND)])[None]


def packed(model, **keywords):
    return logits(model, IDS, position_ids=POSITIONS, **keywords)


@pytest.mark.parametrize(
    "explicit",
    [
        {"seq_idx": torch.zeros(1, FIRST + SECOND, dtype=torch.int32)},
        {"cu_seq_lens_q": torch.tensor([0, FIRST + SECOND])},
    ],
    ids=["seq_idx", "cu_seq_lens_q"],
)
def test_explicit_documents_win_over_positions(explicit):
    """Attention stays isolated by positions; the fast weights follow the explicit word that it is one document."""
    model = adapted("llama")
    apart, together = packed(model), packed(model, **explicit)
    assert_close(together[:, :FIRST], apart[:, :FIRST])
    assert (together - apart)[:, FIRST].abs().max() > 1e-2, "the first document's updates must reach the second"


@pytest.mark.parametrize(
    "explicit",
    [
        {"seq_idx": torch.tensor([[7] * FIRST + [3] * SECOND], dtype=torch.int32)},
        {"cu_seq_lens_q": torch.tensor([0, FIRST, FIRST + SECOND], dtype=torch.int32)},
    ],
    ids=["seq_idx", "cu_seq_lens_q"],
)
def test_explicit_documents_that_agree_change_nothing(explicit):
    model = adapted("llama")
    assert torch.equal(packed(model, **explicit), packed(model))


def test_cu_seq_lens_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="cu_seqlens must run from 0 to the 15 tokens"):
        packed(adapted("llama"), cu_seq_lens_q=torch.tensor([0, 9]))


def test_autocast_covers_a_float32_input():
    """Under autocast a plain projection takes its product in bfloat16 whatever comes in; so must the adapting one."""
    model = adapted("llama", torch.float32)
    projection, dtypes = model.model.layers[0].mlp.down_proj, []
    projection.register_forward_pre_hook(lambda module, args: (args[0].float(),))
    projection.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    want = logits(model, IDS)
    with torch.autocast("cpu", torch.bfloat16):
        got = logits(model, IDS)
    assert dtypes == [torch.float32, torch.bfloat16]
    assert (got - want).norm() < 0.05 * want.norm()
