"""A rule and a target that only this file knows go through everything; the examples of docs/extending.md run."""

import contextlib
import re

import numpy as np
import pytest
import torch
from contract.families import C, adapted, logits, padded, plain, tokens
from locations import ROOT
from torch import nn
from torch.testing import assert_close
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments
from transformers.cache_utils import DynamicCache, StaticCache

import inplace_ttt as ittt
from inplace_ttt.core import RULES, TARGETS
from inplace_ttt.core.scan import PATHS
from inplace_ttt.eval.runner import Variant, run
from inplace_ttt.eval.suites.nll import NllSuite
from inplace_ttt.eval.suites.texts import EvalText
from inplace_ttt.hf.families import FAMILIES

TOLERANCE = {"atol": 1e-6, "rtol": 0.0}


@pytest.fixture
def registries():
    """Leaves the library's registries as they were."""
    kept = [(known, dict(known)) for known in (RULES, TARGETS, FAMILIES)]
    paths = list(PATHS)
    yield
    for known, before in kept:
        known.clear()
        known.update(before)
    PATHS[:] = paths


@pytest.fixture
def extended(registries):
    """A rule that is not linear and carries two tensors, and a target with parameters that looks at the keys."""

    @ittt.register_rule("saturating")
    class Saturating(ittt.Rule):
        decay: float = 0.0
        limit: float = 1.0

        def init(self, B, D, F, like):
            return {**super().init(B, D, F, like), "n": like.new_zeros(B)}

        def apply(self, state, z):
            mean = state["S"] / state["n"].clamp(min=1)[:, None, None]
            return self.lr * self.limit * torch.tanh(torch.bmm(z, mean.to(z.dtype).mT) / self.limit)

        def update(self, state, z, v, W0):
            S = (1 - self.decay) * state["S"] + torch.bmm(v.to(z.dtype).mT, z).to(state["S"].dtype)
            return {"S": S, "n": state["n"] + 1}

    @ittt.register_target("ahead")
    class Ahead(ittt.Target):
        source = "hidden_states"
        needs_keys = True

        def __init__(self, width, *, distance=2):
            super().__init__(width)
            self.distance, self.proj = distance, nn.Linear(width, width, bias=False)
            nn.init.zeros_(self.proj.weight)

        def forward(self, u, z):
            later = nn.functional.pad(u, (0, 0, 0, self.distance))[:, :, self.distance :]
            return self.proj(later) / z.norm(dim=-1, keepdim=True).clamp(min=1e-3)

    return {"rule": "saturating", "rule_options": {"limit": 0.5}, "objective": "ahead", "lr": 2.0, "decay": 0.1}


def greedy(model, ids, n, **keywords):
    keywords.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, max_new_tokens=n, do_sample=False, **keywords)


def test_attach_changes_nothing_and_training_does(extended, tmp_path):
    """The Trainer on rows of packed documents: the loss is that of the documents apart, and the target's P moves."""
    model = plain("llama", torch.float32)
    ids = tokens(1, 3 * C)
    want = logits(model, ids)
    ittt.attach(model, ittt.InPlaceTTTConfig(layers="0::2", chunk_size=C, **extended))
    assert torch.equal(logits(model, ids), want)
    assert [info.extra_parameters for info in ittt.adapting_layers(model)] == [32 * 32] * 2
    assert {(info.rule, info.path) for info in ittt.adapting_layers(model)} == {("saturating", "generic")}

    model = adapted("llama", torch.float32, **extended)
    documents = [tokens(1, n, n)[0] for n in (2 * C + 3, C, 3 * C + 1)]
    with torch.no_grad():
        sums = [nn.functional.cross_entropy(logits(model, d[None])[0, :-1], d[1:], reduction="sum") for d in documents]
    before = {name: p.detach().clone() for name, p in model.named_parameters() if ".ttt_" in name}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        learning_rate=1e-2,
        per_device_train_batch_size=3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [{"input_ids": d.tolist(), "labels": d.tolist()} for d in documents]
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=DataCollatorWithFlattening())
    trainer.train()
    scored = sum(len(d) - 1 for d in documents)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(sum(sums)) / scored, abs=1e-4)
    after = dict(model.named_parameters())
    moved = {name: float((after[name].detach() - p).abs().max()) for name, p in before.items()}
    assert len(moved) == 2
    assert min(moved.values()) > 1e-3


def test_it_generates_in_every_mode(extended):
    model, prompt = adapted("llama", **extended), tokens(1, C + 2).repeat(1, 2)
    want = greedy(model, prompt, 2 * C + 1, use_cache=False)
    with ittt.updates_off(model):
        assert not torch.equal(greedy(model, prompt, 2 * C + 1), want)
    out = greedy(model, prompt, 2 * C + 1, return_dict_in_generate=True)
    assert torch.equal(out.sequences, want)
    assert all(state.tensors["n"].item() == 5 for state in ittt.fast_weights(out.past_key_values).values())
    static = StaticCache(model.config, max_cache_len=6 * C)
    assert torch.equal(greedy(model, prompt, 2 * C + 1, past_key_values=static), want)
    assistant = adapted("llama", **(extended | {"lr": -2.0}))
    assistant.generation_config.update(
        num_assistant_tokens=C + 1, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    assert torch.equal(greedy(model, prompt, 2 * C + 1, assistant_model=assistant), want)
    assert torch.equal(greedy(model, prompt, 2 * C + 1, prompt_lookup_num_tokens=C + 1), want)
    batch = padded([tokens(1, n, n) for n in (C + 3, C)], "left")
    ids, mask, beams = batch["input_ids"], batch["attention_mask"], {"num_beams": 3, "num_return_sequences": 2}
    want = greedy(model, ids, C + 2, attention_mask=mask, use_cache=False, **beams)
    assert torch.equal(greedy(model, ids, C + 2, attention_mask=mask, **beams), want)


def test_it_is_taken_back(extended):
    model, ids, cache = adapted("llama", **extended), tokens(2, 3 * C + 1), DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
        cache.crop(-2 * C - 1)
        got = model(ids[:, C:], past_key_values=cache).logits
    assert_close(got, logits(model, ids)[:, C:], **TOLERANCE)


def test_a_session_reads_forks_saves_and_loads(extended, tmp_path):
    model = adapted("llama", **extended)
    ids, more = tokens(1, 5 * C + 2)[0].tolist(), tokens(1, 2 * C, seed=1)[0].tolist()
    session = ittt.Session(model, decay=0.1)
    session.read(ids)
    with session.fork() as fork:
        fork.read(list(reversed(more)))
    session.save(tmp_path / "session")
    again = ittt.Session.load(tmp_path / "session", model)
    want = logits(model, torch.tensor([ids + more]))[0, -1]
    for reader in (session, again):
        reader.read(more)
        assert_close(reader.next_logits, want, **TOLERANCE)
    with pytest.raises(ittt.UserError, match="rule 'saturating' is not linear, which an export as LoRA needs"):
        session.export_lora(tmp_path / "lora")
    with pytest.raises(ittt.UserError, match="rule 'saturating' is not outer, which a state of form 'auto' needs"):
        ittt.Session(model, state="auto").read(ids)


def test_a_saved_model_needs_the_rule_to_load(extended, tmp_path):
    model, ids = adapted("llama", torch.float32, **extended), tokens(1, 3 * C)
    ittt.save_pretrained(model, tmp_path)
    again = ittt.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(logits(again, ids), logits(model, ids))
    del RULES["saturating"]
    with pytest.raises(ittt.UserError, match=r"rule must be one of .*, got 'saturating' \(register_rule adds one\)"):
        ittt.from_pretrained(tmp_path)


def test_it_is_evaluated(extended, tmp_path):
    model, ids = adapted("llama", **extended), tokens(1, 5 * C)
    documents = [EvalText("d", "random", ids[0].numpy().astype(np.int32))]
    suite = NllSuite(documents, 5 * C, edges=[0, C, 5 * C], contexts=[])
    variants = [
        Variant("on", model, contextlib.nullcontext),
        Variant("off", model, lambda: ittt.updates_off(model), updates=False),
    ]
    records = [row for row in run([suite], variants, tmp_path, {}) if row["kind"] == "document"]
    found = {row["variant"]: row["loss_sum"] for row in records}
    with torch.no_grad():
        losses = nn.functional.cross_entropy(logits(model, ids)[0, :-1], ids[0, 1:], reduction="sum")
    assert found["on"] == pytest.approx(float(losses), abs=1e-4)
    assert abs(found["on"] - found["off"]) > 1e-2


# -- docs/extending.md -------------------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
EXAMPLES = {
    re.search(r"\A(.*)\n", section)[1]: re.search(r"```python\n(.*?)```\n+```text\n(.*?)```", section, re.DOTALL)
    for section in PAGE.split("\n## ")[1:]
}


def test_the_page_has_an_example_for_everything():
    assert list(EXAMPLES) == ["A rule", "A target", "A fast path", "A family", "An eval suite"]
    assert all(EXAMPLES.values())


@pytest.mark.parametrize("section", EXAMPLES)
def test_examples_of_the_page_print_what_they_say(section, registries, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said = EXAMPLES[section].groups()
    exec(compile(code, section, "exec"), {"__name__": "example"})
    assert capsys.readouterr().out == said


def test_functions_that_the_page_about_the_method_names_are_there():
    page = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    named = re.findall(r"`(\w+(?:\.\w+)?)`,? (?:\(|in )`([\w/]+\.py)`", page)
    assert len(named) > 12
    for name, file in named:
        text = (ROOT / "src" / "inplace_ttt" / file).read_text(encoding="utf-8")
        for part in name.split("."):
            assert re.search(rf"^ *(def|class) {part}\b", text, re.MULTILINE), f"{file} has no {part}"
