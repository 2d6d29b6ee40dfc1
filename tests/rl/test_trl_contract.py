"""What OTBTrainer takes from trl's private side. A failure here: trl moved, read its GRPOTrainer anew."""

import inspect
from collections import deque
from importlib.metadata import version

import pytest
import torch
from rl.tiny import TOKENS, count_digits, rollout, tiny_model, trainer
from trl.trainer import grpo_trainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head


def names(function):
    return list(inspect.signature(function).parameters)


def test_trl_is_the_version_that_was_read():
    assert version("trl").startswith("1.16.")


def test_private_methods_are_where_they_were():
    assert names(GRPOTrainer._generate_and_score_completions) == ["self", "inputs"]
    assert names(GRPOTrainer._calculate_rewards) == ["self", "inputs", "prompts", "completions", "completion_ids_list"]
    scoring = names(GRPOTrainer._get_per_token_logps_and_entropies)
    assert scoring[:6] == ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"]
    assert {"compute_entropy", "compute_aux_loss", "pixel_values", "image_grid_thw"} <= {*scoring[6:]}
    assert names(GRPOTrainer.__init__)[1:5] == ["model", "reward_funcs", "args", "train_dataset"]
    assert names(GRPOTrainer.log) == ["self", "logs", "start_time"]
    assert {"temperature", "cast_lm_head_to_fp32", "outputs"} <= {*names(add_fused_lm_head)}


def test_private_attributes_are_what_they_were(tmp_path):
    made = trainer(tmp_path)
    output = rollout(made)
    assert {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages"} <= {*output}
    assert isinstance(made._logs["advantages"], deque)
    assert len(made._logs["advantages"]) == 8
    assert isinstance(made._metrics["train"]["reward"], list)
    assert made.scale_rewards == "none"
    assert made.reward_weights.tolist() == [1.0]
    assert made.num_generations == made.num_generations_eval == 4


def test_the_loss_takes_advantages_per_token(tmp_path):
    made = trainer(tmp_path)
    output = rollout(made)
    made.current_gradient_accumulation_steps = 1  # the training loop sets it
    values = torch.randn(output["advantages"].shape) * output["completion_mask"]
    loss = made._compute_loss(made.model, output | {"advantages": values})
    assert loss.item() == pytest.approx(-values.sum().item() / (8 * TOKENS), rel=1e-4)


def test_rewards_are_those_of_all_rows_and_are_asked_for_once(tmp_path, monkeypatch):
    original, calls = GRPOTrainer._calculate_rewards, []
    monkeypatch.setattr(
        GRPOTrainer, "_calculate_rewards", lambda self, *args: calls.append(original(self, *args)) or calls[-1]
    )
    rollout(trainer(tmp_path, reward=[count_digits, count_digits]))
    assert [tuple(c.shape) for c in calls] == [(8, 2)]


def test_the_reference_is_made_where_it_was():
    """For models with fast weights it is avoided by beta = 0 during ``__init__``."""
    source = inspect.getsource(grpo_trainer.GRPOTrainer.__init__)
    assert source.count("self.beta = args.beta") == 1
    assert "self.ref_model = create_model_from_path(" in source


def test_a_second_head_over_the_first_gives_sums_of_squares():
    model = tiny_model()
    add_fused_lm_head(model, temperature=0.5, outputs=("log_probs", "entropy"))
    add_fused_lm_head(model, temperature=0.5, outputs=("log_probs", "log_sum_sq_probs"))
    ids = torch.randint(2, 12, (2, 9))
    with torch.no_grad():
        found = model(input_ids=ids, labels=ids, fused_lm_head=True).log_sum_sq_probs
        probabilities = (model(input_ids=ids).logits[:, :-1] / 0.5).softmax(-1)
    torch.testing.assert_close(found, probabilities.square().sum(-1).log(), rtol=1e-4, atol=1e-4)
