"""What is scored is what was generated: fast weights learn in both, token for token."""

import pytest
import torch
from contract.families import C
from rl.tiny import rollout, tiny_model, trainer

import inplace_ttt as ittt


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_are_the_generator_s(tmp_path, family, temperature):
    """Left padding, a chunk's update in the prompt and in the completion; logits as the sampler saw them."""
    model = tiny_model(family=family)
    made, logits = trainer(tmp_path, model, temperature=temperature), []
    generate = model.generate

    def watched(*args, **kwargs):
        result = generate(*args, **kwargs, return_dict_in_generate=True, output_logits=True)
        logits.append(torch.stack(result.logits, dim=1))
        return result.sequences

    model.generate = watched
    output = rollout(made)
    ids, mask = output["completion_ids"], output["completion_mask"].bool()
    lengths = output["prompt_mask"].sum(1)
    assert lengths.min() < lengths.max(), "no left padding"
    assert (lengths + mask.sum(1)).max() >= 3 * C, "no update inside a completion"
    sampled = (logits[0][:, : ids.shape[1]] / temperature).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    with torch.no_grad():
        scored = made._score(output)
    torch.testing.assert_close(scored[mask], sampled[mask], rtol=1e-4, atol=1e-4)
    with torch.no_grad(), ittt.updates_off(model):
        off = made._score(output)
    assert (off - sampled)[mask].abs().max() > 0.01, "updates change nothing: the test tests nothing"
