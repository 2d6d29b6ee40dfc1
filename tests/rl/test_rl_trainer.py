"""OTBTrainer: advantages, gradients, what is logged, references, refusals."""

import math
import re

import pytest
import torch
from rl.tiny import END_ID, TOKENS, Dataset, config, count_digits, rollout, tiny_model, trainer
from trl.trainer.grpo_trainer import GRPOTrainer

import inplace_ttt as ittt
from inplace_ttt.errors import UserError
from inplace_ttt.rl.baselines import BASELINES, energy_proxy, log_sum_of_squares, token_advantages
from inplace_ttt.rl.config import OTBConfig

LORA = pytest.importorskip("peft").LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)


def scored(model, output, temperature=1.0):
    """Log-probabilities and w [B, T] from whole logits, one row at a time and without padding."""
    log_probs, w = torch.zeros(2, *output["completion_ids"].shape)
    for i in range(len(log_probs)):
        prompt = output["prompt_ids"][i][output["prompt_mask"][i].bool()]
        completion = output["completion_ids"][i][output["completion_mask"][i].bool()]
        with torch.no_grad():
            ids = torch.cat([prompt, completion])[None]
            logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1] / temperature
        n = len(completion)
        log_probs[i, :n] = logits.log_softmax(-1).gather(-1, completion[:, None])[:, 0]
        w[i, :n] = energy_proxy(log_probs[i, :n], log_sum_of_squares(logits))
    return log_probs, w


def rewards_of(output):
    ids = [row[m.bool()].tolist() for row, m in zip(output["completion_ids"], output["completion_mask"], strict=True)]
    return torch.tensor(count_digits(ids))


class TestAdvantages:
    @pytest.mark.parametrize("kind", ["plain", "attached", "lora"])
    @pytest.mark.parametrize("baseline", ["otb", "optimal_trajectory"])
    def test_equal_the_functions_on_whole_logits(self, tmp_path, kind, baseline):
        model = tiny_model(kind != "plain")
        made = trainer(
            tmp_path, model, baseline=baseline, temperature=0.7, peft_config=LORA if kind == "lora" else None
        )
        output = rollout(made)
        mask = output["completion_mask"]
        assert output["prompt_mask"].sum(1).unique().numel() == 2, "no left padding: the test tests less than it says"
        _, w = scored(made.model, output, temperature=0.7)
        expected = token_advantages(rewards_of(output), mask, w, group_size=4, baseline=baseline)
        assert output["advantages"].shape == output["completion_ids"].shape
        assert output["advantages"].std() > 0
        torch.testing.assert_close(output["advantages"], expected.values, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("leave_one_out", [False, True])
    @pytest.mark.parametrize("lone_tail", ["zero", "mean"])
    def test_settings_reach_the_functions(self, tmp_path, leave_one_out, lone_tail):
        made = trainer(tmp_path, leave_one_out=leave_one_out, lone_tail=lone_tail)
        output = rollout(made)
        _, w = scored(made.model, output)
        settings = {"leave_one_out": leave_one_out, "lone_tail": lone_tail}
        expected = token_advantages(rewards_of(output), output["completion_mask"], w, group_size=4, **settings)
        torch.testing.assert_close(output["advantages"], expected.values, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("scale", ["none", "group", "batch"])
    def test_mean_is_grpo_s_own(self, tmp_path, monkeypatch, scale):
        """With the mean, one reward function that answers for some and one weight that is not 1."""
        original, theirs = GRPOTrainer._generate_and_score_completions, []

        def keep(self, inputs):
            output = original(self, inputs)
            theirs.append(output["advantages"])
            return output

        def some(completion_ids, **_):
            return [None if i == 1 else 0.1 * len(c) for i, c in enumerate(completion_ids)]

        monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", keep)
        made = trainer(
            tmp_path, reward=[count_digits, some], baseline="mean", scale_rewards=scale, reward_weights=[1.0, 3.0]
        )
        output = rollout(made)
        expected = theirs[0][:, None] * output["completion_mask"]
        torch.testing.assert_close(output["advantages"], expected, rtol=1e-5, atol=1e-6)

    def test_a_row_without_reward_counts_for_nobody(self, tmp_path):
        def some(completion_ids, **_):
            return [None if i == 1 else r for i, r in enumerate(count_digits(completion_ids))]

        made = trainer(tmp_path, reward=some)
        output = rollout(made)
        rewards = rewards_of(output)
        rewards[1] = torch.nan
        _, w = scored(made.model, output)
        expected = token_advantages(rewards, output["completion_mask"], w, group_size=4).values
        torch.testing.assert_close(output["advantages"], expected, rtol=1e-4, atol=1e-5)
        assert not output["advantages"][1].any()

    def test_tokens_of_tools_have_no_advantage_and_no_energy(self, tmp_path):
        def with_holes(prompts, made):
            rows = [[3, 4, 5, 6, 7, 8, END_ID][: 4 + i % 4] for i in range(len(prompts))]
            holes = [[1, 0, 0, 1, 1, 1, 1][: len(row)] for row in rows]
            return {
                "prompt_ids": [made._tokenizer(p)["input_ids"] for p in prompts],
                "completion_ids": rows,
                "logprobs": None,
                "env_mask": holes,
            }

        made = trainer(tmp_path, rollout_func=with_holes)
        output = rollout(made)
        mask = output["completion_mask"] * output["tool_mask"]
        assert 0 < mask.sum() < output["completion_mask"].sum()
        _, w = scored(made.model, output)
        expected = token_advantages(rewards_of(output), mask, w, group_size=4).values
        torch.testing.assert_close(output["advantages"], expected, rtol=1e-4, atol=1e-5)
        assert not output["advantages"][mask == 0].any()

    @pytest.mark.parametrize("shape", ["token", "sequence"])
    def test_importance_ratios_weigh_the_energy(self, tmp_path, monkeypatch, shape):
        original, ratios = GRPOTrainer._generate_and_score_completions, []

        def with_ratios(self, inputs):
            output = original(self, inputs)
            wide = output["completion_ids"].shape if shape == "token" else (len(inputs), 1)
            ratios.append(torch.rand(wide) + 0.5)
            return output | {"importance_sampling_ratio": ratios[-1]}

        monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", with_ratios)
        made = trainer(tmp_path)
        output = rollout(made)
        mask = output["completion_mask"]
        _, w = scored(made.model, output)
        rho = ratios[0].expand(mask.shape)
        expected = token_advantages(rewards_of(output), mask, w, group_size=4, ratios=rho).values
        torch.testing.assert_close(output["advantages"], expected, rtol=1e-4, atol=1e-5)


class TestTraining:
    @pytest.mark.parametrize("beta", [0.0, 0.1])
    def test_gradient_is_that_of_the_objective(self, tmp_path, monkeypatch, beta):
        """Over both micro-batches, shuffled rows, and with the divergence from the reference, which is 0 but curved."""
        outputs, gradients = [], {}
        original = GRPOTrainer._generate_and_score_completions
        monkeypatch.setattr(
            GRPOTrainer,
            "_generate_and_score_completions",
            lambda self, inputs: outputs.append(original(self, inputs)) or outputs[-1],
        )
        made = trainer(tmp_path, max_steps=1, beta=beta, max_grad_norm=1e9)
        before = {n: p.detach().clone() for n, p in made.model.named_parameters()}
        step = made.training_step

        def watch(*args):
            loss = step(*args)
            gradients.update({n: p.grad.clone() for n, p in made.model.named_parameters()})
            return loss

        made.training_step = watch
        made.train()
        for name, parameter in made.model.named_parameters():
            parameter.data.copy_(before[name])
        made.model.zero_grad()
        (output,) = outputs
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
        mask = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
        tokens = output["completion_ids"].shape[1]
        logits = made.model(ids, attention_mask=mask, use_cache=False).logits[:, -tokens - 1 : -1]
        log_probs = logits.log_softmax(-1).gather(-1, output["completion_ids"][..., None])[..., 0]
        loss = -(output["advantages"] * log_probs * output["completion_mask"]).sum() / (len(ids) * TOKENS)
        loss.backward()
        for name, parameter in made.model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=name)
        assert max(g.abs().max() for n, g in gradients.items() if "ttt_" in n) > 1e-4

    def test_learns_what_is_rewarded(self, tmp_path):
        made = trainer(tmp_path, max_steps=25, learning_rate=1e-2)
        made.train()
        rewards = [entry["reward"] for entry in made.state.log_history if "reward" in entry]
        assert sum(rewards[-5:]) > sum(rewards[:5]) + 1

    def test_resumes(self, tmp_path):
        def run(folder, **changes):
            made = trainer(tmp_path / folder, max_steps=4, save_steps=2, save_strategy="steps", beta=0.1)
            made.train(**changes)
            return {n: p.detach().clone() for n, p in made.model.named_parameters()}

        whole = run("whole")
        resumed = run("other", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
        for name, parameter in whole.items():
            torch.testing.assert_close(resumed[name], parameter, rtol=1e-5, atol=1e-7, msg=name)

    def test_several_updates_on_the_same_completions(self, tmp_path):
        made = trainer(tmp_path, num_iterations=2, steps_per_generation=4, gradient_accumulation_steps=2, max_steps=4)
        made.train()
        assert made.state.global_step == 4
        assert any(entry.get("clip_ratio/region_mean") is not None for entry in made.state.log_history)

    def test_lora_trains_and_its_reference_is_the_model_below(self, tmp_path):
        made = trainer(tmp_path, peft_config=LORA, beta=0.1, max_steps=2)
        assert made.ref_model is None
        assert ittt.is_attached(made.model)
        made.train()
        assert any("kl" in entry for entry in made.state.log_history)

    def test_with_activation_checkpointing(self, tmp_path):
        made = trainer(tmp_path, gradient_checkpointing=True, noise_every=1)
        made.train()
        assert made.state.global_step == 2

    def test_evaluates_in_groups_of_their_own(self, tmp_path):
        data = Dataset.from_dict({"prompt": ["1+1=", "2+2+2="]})
        made = trainer(tmp_path, eval_dataset=data, num_generations_eval=2, per_device_eval_batch_size=4, noise_every=1)
        assert math.isfinite(made.evaluate()["eval_loss"])
        logged = made.state.log_history[-1]
        assert logged["eval_otb/w"] > 0
        assert "eval_otb/noise_sq" not in logged


class TestReference:
    def test_is_a_copy_with_fast_weights(self, tmp_path):
        made = trainer(tmp_path, beta=0.1, sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=1.0)
        assert ittt.is_attached(made.ref_model)
        assert made.args.beta == made.beta == 0.1
        output = rollout(made)
        expected, _ = scored(made.model, output)
        torch.testing.assert_close(output["ref_per_token_logps"], expected, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            next(made.model.parameters()).add_(0.3)
        now, _ = scored(made.model, output)
        reference, _ = scored(made.ref_model, output)
        assert (now - reference).abs().max() > 0.05
        torch.testing.assert_close(reference, expected, rtol=1e-4, atol=1e-5)
        made.train()  # the reference follows every step
        after, _ = scored(made.model, output)
        reference, _ = scored(made.ref_model, output)
        torch.testing.assert_close(reference, after, rtol=1e-4, atol=1e-5)

    def test_of_a_plain_model_is_trl_s(self, tmp_path):
        tiny_model(False).save_pretrained(tmp_path / "model")
        made = trainer(tmp_path, str(tmp_path / "model"), beta=0.1, max_steps=1)
        made.train()
        assert made.ref_model is not None


class TestLog:
    def test_metrics(self, tmp_path):
        made = trainer(tmp_path)
        output = rollout(made)
        mask = output["completion_mask"]
        _, w = scored(made.model, output)
        found = token_advantages(rewards_of(output), mask, w, group_size=4)
        logged = {name: values[-1] for name, values in made._metrics["train"].items()}
        assert logged["otb/w"] == pytest.approx(float(w.sum() / mask.sum()), rel=1e-4)
        assert logged["otb/energy"] == pytest.approx(float(w.sum() / 8), rel=1e-4)
        assert logged["otb/baseline"] == pytest.approx(float(found.baseline.sum() / mask.sum()), rel=1e-4)
        assert logged["otb/lone_tail"] == pytest.approx(float(found.is_lone.sum() / mask.sum()), abs=1e-6)

    def test_completions_have_their_mean_advantage(self, tmp_path):
        made = trainer(tmp_path, log_completions=True, max_steps=1)
        outputs, original = [], made._generate_and_score_completions
        made._generate_and_score_completions = lambda inputs: outputs.append(original(inputs)) or outputs[-1]
        made.train()
        import pandas

        table = pandas.read_parquet(next((tmp_path / "completions").glob("*.parquet")))
        mask = outputs[0]["completion_mask"]
        expected = (outputs[0]["advantages"] * mask).sum(1) / mask.sum(1)
        assert table["advantage"].tolist() == pytest.approx(expected.tolist(), abs=1e-6)

    def test_noise_signal_and_shrinkage(self, tmp_path):
        """The mean shrinks every gradient by 3/4, whatever the noise."""
        made = trainer(tmp_path, baseline="mean", noise_every=1, max_steps=12, learning_rate=0.0)
        made.train()
        logged = [entry for entry in made.state.log_history if "otb/noise_sq" in entry]
        assert len(logged) == 12
        assert all(entry["otb/noise_sq"] > 0 for entry in logged)
        known = [entry["otb/shrinkage"] for entry in logged if entry["otb/shrinkage"] is not None]
        assert known
        assert known == pytest.approx([0.75] * len(known), rel=1e-3)
        assert not any("cross" in name for entry in logged for name in entry)

    def test_noise_is_that_of_the_halves(self, tmp_path, monkeypatch):
        made = trainer(tmp_path, noise_every=1)
        output = rollout(made)
        gradients = []
        for rows in (slice(0, 4), slice(4, 8)):
            made.model.zero_grad()
            part = {name: output[name][rows] for name in output if torch.is_tensor(output[name]) and output[name].ndim}
            ids = torch.cat([part["prompt_ids"], part["completion_ids"]], 1)
            mask = torch.cat([part["prompt_mask"], part["completion_mask"]], 1)
            logits = made.model(ids, attention_mask=mask, use_cache=False).logits
            logits = logits[:, -part["completion_ids"].shape[1] - 1 : -1]
            log_probs = logits.log_softmax(-1).gather(-1, part["completion_ids"][..., None])[..., 0]
            (-(part["advantages"] * log_probs).sum() / (4 * TOKENS)).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in made.model.parameters()]).double())
        logged = {name: values[-1] for name, values in made._metrics["train"].items()}
        a, b = gradients
        assert logged["otb/signal_sq"] == pytest.approx(float(a @ b), rel=1e-3, abs=1e-6)
        assert logged["otb/noise_sq"] == pytest.approx(float((a - b).square().sum() / 4), rel=1e-3)


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            (
                {"importance_sampling_level": "sequence"},
                'importance_sampling_level="sequence" gives a whole completion',
            ),
            ({"loss_type": "luspo"}, 'loss_type="luspo" needs one advantage per completion'),
            ({"loss_type": "vespo"}, 'loss_type="vespo" needs one advantage per completion'),
            ({"multi_objective_aggregation": "normalize_then_sum"}, "normalises rewards before a baseline"),
            ({"num_generations": 1}, "num_generations must be at least 2, got 1"),
            ({"top_entropy_quantile": 0.5}, "top_entropy_quantile=0.5 drops tokens"),
            ({"baseline": "best"}, "baseline must be one of otb"),
            ({"lone_tail": "best"}, "lone_tail must be one of reward"),
            ({"noise_every": -1}, "noise_every must not be negative"),
            ({"noise_every": 1, "num_generations": 8}, "noise_every compares two halves of the prompts"),
        ],
    )
    def test_settings(self, tmp_path, changes, says):
        with pytest.raises(UserError, match=re.escape(says)) as error:
            config(tmp_path, **changes)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "sapo"])
    def test_losses_by_length_warn(self, tmp_path, loss_type):
        with pytest.warns(UserWarning, match=f'loss_type="{loss_type}" weights tokens by the length'):
            config(tmp_path, loss_type=loss_type)

    @pytest.mark.parametrize("name", ["use_vllm", "use_transformers_continuous_batching"])
    def test_generation_without_fast_weights(self, tmp_path, name):
        with pytest.raises(UserError, match=f"{name}=True would generate without fast weights"):
            trainer(tmp_path, **{name: True})

    @pytest.mark.parametrize("saved_by", ["save_pretrained", "trainer"])
    def test_the_name_of_a_model_with_fast_weights(self, tmp_path, saved_by):
        if saved_by == "trainer":
            trainer(tmp_path).save_model(str(tmp_path / "model"))
        else:
            ittt.save_pretrained(tiny_model(), tmp_path / "model")
        with pytest.raises(UserError, match="has fast weights: load it"):
            trainer(tmp_path, str(tmp_path / "model"))

    def test_other_arguments(self, tmp_path):
        from trl import GRPOConfig

        from inplace_ttt.rl import OTBTrainer

        with pytest.raises(UserError, match="args must be an OTBConfig, got GRPOConfig"):
            OTBTrainer(tiny_model(), count_digits, GRPOConfig(str(tmp_path), bf16=False, use_cpu=True))


def test_defaults(tmp_path):
    made = OTBConfig(str(tmp_path), bf16=False, use_cpu=True)
    assert (made.loss_type, made.scale_rewards, made.baseline) == ("dr_grpo", "none", "otb")
    assert (made.leave_one_out, made.lone_tail, made.noise_every) == (False, "reward", 0)


@pytest.mark.parametrize("baseline", BASELINES)
def test_every_baseline_trains(tmp_path, baseline):
    made = trainer(tmp_path, tiny_model(False), baseline=baseline, max_steps=1)
    made.train()

    assert made.state.log_history[0]["grad_norm"] > 0
