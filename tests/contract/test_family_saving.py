"""A saved model comes back as it was; an adapter does, on its own base only."""

import pytest
import torch
from contract.families import BUILDERS, C, adapted, logits, one_target_each, plain, tokens

import inplace_ttt as ittt

families = pytest.mark.parametrize("model_type", sorted(BUILDERS))


@one_target_each()
def test_whole_model_round_trip(model_type, target, tmp_path):
    model, ids = adapted(model_type, torch.float32, target=target), tokens(2, 3 * C)
    ittt.save_pretrained(model, tmp_path)
    again = ittt.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert type(again) is type(model)
    assert again.config.inplace_ttt == model.config.inplace_ttt
    want, got = model.state_dict(), again.state_dict()
    assert list(got) == list(want)
    assert all(torch.equal(got[k], want[k]) for k in want)
    assert torch.equal(logits(again, ids), logits(model, ids))


@families
def test_adapter_round_trip_and_wrong_base(model_type, tmp_path):
    model, ids = adapted(model_type, torch.float32), tokens(2, 3 * C)
    ittt.save_pretrained(model, tmp_path, adapter_only=True)
    assert not (tmp_path / "base").exists()
    base = plain(model_type, torch.float32)
    again = ittt.from_pretrained(tmp_path, model=base)
    assert again is base
    assert torch.equal(logits(again, ids), logits(model, ids))

    other = plain(model_type, torch.float32)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    with pytest.raises(ittt.UserError, match="wrong base model: the weights of layer 0"):
        ittt.from_pretrained(tmp_path, model=other)
    assert not ittt.is_attached(other)
