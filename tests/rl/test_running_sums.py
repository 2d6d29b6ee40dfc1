"""The toy task, and the parts of the benchmark on it."""

import json
import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from locations import ROOT

from inplace_ttt.rl.baselines import token_advantages

sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.append(str(ROOT / "examples"))
import plot_rl
import rl_parts
import rl_policy
import rl_running_sums
import running_sums as task

TINY = replace(
    rl_policy.SIZES["tiny"],
    supervised=(5e-3, 4, 8, 2),
    noise=(4, 8, 2),
    samples=2,
    learning=(2, 2, 2),
    final=16,
    levels=(0.0, 0.9),
)


class TestTask:
    def test_answers(self):
        assert task.solve("3+8+5=") == "3,11,16;16$"
        assert task.reward("3+8+5=", "3,11,16;16$") == 1
        assert task.reward("3+8+5=", "1;16$") == 1, "only the final answer counts"
        for wrong in ("3,11,16;17$", "3,11,16;16", "3,11,16;216$", "16$", ""):
            assert task.reward("3+8+5=", wrong) == 0

    def test_tokenizer_agrees(self):
        tokenizer, generator = task.make_tokenizer(), random.Random(0)
        for _ in range(20):
            text = (prompt := task.make_prompt(generator)) + task.solve(prompt)
            assert tokenizer(text)["input_ids"] == task.encode(text)
            assert tokenizer.decode(task.encode(text)) == task.decode(task.encode(text)) == text
            assert len(prompt) <= task.LONGEST_PROMPT
            assert len(task.solve(prompt)) <= task.LONGEST_ANSWER

    def test_decoding_stops_at_the_end(self):
        assert task.decode([*task.encode("3;3$"), 5, 5]) == "3;3$"
        assert task.decode([*task.encode("3;3"), task.PAD_ID]) == "3;3"


@pytest.fixture(params=rl_policy.KINDS)
def policy(request):
    model = rl_policy.build(request.param, TINY, 0, "cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if "ttt_conv" in name else 0.05))
    return model


def test_group_gradients_are_autograd_s(policy):
    """Of every linear layer, the adapting ones' slow weights included, through the fast weights."""
    rolled = rl_policy.roll_out(policy, ["1+2+3=", "9+9="], 4, TINY, torch.Generator().manual_seed(0))
    rewards = torch.rand(8)
    with rl_policy.linear_layers(policy) as layers:
        log_probs, w = rolled.score(policy)
    A = token_advantages(rewards, rolled.completion_mask, w, group_size=4).values
    found = dict(rl_policy.group_gradients((A * log_probs).sum(), layers, 4))
    for group in range(2):
        policy.zero_grad()
        rows = slice(4 * group, 4 * group + 4)
        again, _ = rolled.score(policy)
        (A[rows] * again[rows]).sum().backward()
        for name, gradient in found.items():
            true = policy.get_submodule(name).weight.grad
            torch.testing.assert_close(gradient[group], true, rtol=1e-3, atol=1e-5, msg=name)
    assert sum("proj" in name for name in found) == 14


def test_scores_are_the_sampler_s(policy):
    """Teacher forcing of a sampled row gives the logits that it was sampled from: greedy rows are their own argmax."""
    torch.manual_seed(0)
    greedy = torch.multinomial
    try:
        torch.multinomial = lambda p, n, generator=None: p.argmax(-1, keepdim=True)
        rolled = rl_policy.roll_out(policy, ["1+2+3=", "9+9="], 1, TINY, torch.Generator())
    finally:
        torch.multinomial = greedy
    log_probs, _ = rolled.score(policy)
    best = []
    for i in range(2):
        row = rolled.without_padding(i)
        ids = torch.cat([row.ids, row.completions], 1)
        with torch.no_grad():
            logits = policy(ids, use_cache=False).logits[0, row.ids.shape[1] - 1 : -1]
        assert torch.equal(logits.argmax(-1), row.completions[0])
        best.append(logits.log_softmax(-1).max(-1).values)
    for i, row in enumerate(best):
        torch.testing.assert_close(log_probs[i, : len(row)], row, rtol=1e-4, atol=1e-4)


def test_jackknife_finds_what_was_put_in():
    """Gradients of known mean and covariance; the baseline's mean is half the unbiased one."""
    generator = torch.Generator().manual_seed(0)
    dimensions, prompts, groups, chunks = 40, 16, 4, 64
    mean = torch.randn(dimensions, generator=generator, dtype=torch.float64)
    by_prompt = torch.randn(chunks, prompts, 1, dimensions, generator=generator, dtype=torch.float64)
    inner = 2 * torch.randn(chunks, prompts, groups, dimensions, generator=generator, dtype=torch.float64)
    unbiased = mean + by_prompt + inner
    own = mean / 2 + by_prompt + inner
    squares = [(float(c.square().sum(-1).mean()), float(c.mean(1).square().sum(-1).mean())) for c in own]
    means = [x.mean((1, 2)) for x in (own, unbiased)]
    grams = [a @ b.mT for a, b in ((means[0], means[0]), (means[0], means[1]), (means[1], means[1]))]
    found = rl_parts.jackknife(grams, squares, groups)
    truth = {"signal_sq": float(mean @ mean) / 4, "noise": 5.0 * dimensions, "shrinkage": 0.5}
    truth |= {"noise_within_prompts": 4.0 * dimensions, "noise_to_signal": 20.0 * dimensions / float(mean @ mean)}
    for name, value in truth.items():
        assert abs(found[name] - value) < 4 * found[f"{name}_se"], name
        assert found[f"{name}_se"] < 0.2 * abs(value), name


def test_rank_correlation():
    assert rl_parts.spearman([1, 2, 3, 4], [10, 20, 30, 1000]) == pytest.approx(1)
    assert rl_parts.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert rl_parts.spearman([1, 1, 2, 3], [1, 2, 3, 3]) == pytest.approx(8 / 9)  # ranks 1.5 1.5 3 4, 1 2 3.5 3.5


@pytest.mark.slow
def test_parts_follow_each_other_and_are_drawn(tmp_path):
    jobs = {part: [] for part in ("noise", "proxy", "learning")}
    for kind in rl_policy.KINDS:
        made = rl_parts.supervised(tmp_path, TINY, "cpu", kind)
        assert [*made["levels"]] == ["0.0", "0.9"]
        for level in TINY.levels:
            found = rl_parts.noise(tmp_path, TINY, "cpu", kind, level)
            name = rl_parts.job_name("noise", kind, level)
            known = {"results": [r | {"shrinkage": 0.5} for r in found["results"]]}  # so few rows may leave none
            (tmp_path / f"{name}.json").write_text(json.dumps(known))
            jobs["noise"].append({"kind": kind, "level": level} | found)
            jobs["proxy"].append({"kind": kind, "level": level} | rl_parts.proxy(tmp_path, TINY, "cpu", kind, level))
        for lr in rl_parts.RATES:
            found = rl_parts.tune(tmp_path, TINY, "cpu", kind, lr)
            name = rl_parts.job_name("tune", kind, lr)
            (tmp_path / f"{name}.json").write_text(json.dumps(found | {"last_quarter": lr if lr < 1e-4 else 0}))
        for variant in ("otb", "rloo-scaled"):
            found = rl_parts.learning(tmp_path, TINY, "cpu", kind, variant, 4, 2)
            assert len(found["runs"]) == 2
            assert found["learning_rate"] == (1.5e-5 if variant == "rloo-scaled" else 3e-5)
            jobs["learning"].append({"kind": kind, "variant": variant, "n": 4} | found)
    for part, found in jobs.items():
        (tmp_path / f"{part}.json").write_text(json.dumps({"jobs": found}))
    for part, table in plot_rl.TABLES:
        assert len({line.count("|") for line in table({"jobs": jobs[part]}).splitlines()}) == 1
    assert len(plot_rl.draw(tmp_path, tmp_path)) == 3


class Job(subprocess.Popen):
    """A process's work, done here and at once: a process of its own imports for ten seconds."""

    def __init__(self, command, **keywords):
        if command[:2] != [sys.executable, rl_running_sums.__file__]:
            super().__init__(command, **keywords)
            return
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", command[1:])
            rl_running_sums.main()
        self.returncode = 0

    def poll(self):
        return self.returncode


@pytest.mark.slow
def test_command(tmp_path, monkeypatch):
    monkeypatch.setitem(rl_policy.SIZES, "tiny", replace(rl_policy.SIZES["tiny"], samples=TINY.samples))
    command = ["rl_running_sums.py", "--device", "cpu", "--size", "tiny", "--parts", "proxy", "--minutes", "4"]
    command += ["--out", str(tmp_path / "out"), "--work", str(tmp_path)]
    for level in rl_policy.SIZES["tiny"].levels:  # one policy is missing, so that its jobs cannot be done
        model = rl_policy.build("plain", rl_policy.SIZES["tiny"], 0, "cpu")
        torch.save(model.state_dict(), rl_parts.checkpoint(tmp_path, "plain", level))
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(subprocess, "Popen", Job)
    with pytest.raises(SystemExit) as end:
        rl_running_sums.main()
    assert end.value.code == 1
    record = json.loads((tmp_path / "out" / "proxy.json").read_text())
    assert [job["kind"] for job in record["jobs"]] == ["plain"] * 3
    assert record["missing"] == [f"proxy-attached-{level}" for level in (0.1, 0.4, 0.8)]
    assert {"commit", "date", "hardware", "versions", "command", "seconds"} <= record.keys()
    assert (tmp_path / "out" / "proxy.png").stat().st_size > 5000
