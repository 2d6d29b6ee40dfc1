"""One attached model in several threads: forwards at once, and settings of one thread alone."""

import threading

import pytest
import torch
from contract.families import C, adapted, tokens

import inplace_ttt as ittt
from inplace_ttt.hf.attach import runtime_of


def at_once(*jobs):
    """Results of functions that run in threads of their own and wait for each other before they begin."""
    found, gate = [None] * len(jobs), threading.Barrier(len(jobs))

    def run(i):
        gate.wait()
        try:
            found[i] = jobs[i]()
        except Exception as error:
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@torch.no_grad()
def logits(model, ids):
    return model(ids, use_cache=False).logits


@pytest.mark.parametrize("objective", ["learned", "loss"])
def test_forwards_at_once(objective):
    settings = {} if objective == "learned" else {"objective": "loss", "update_size": 0.1}
    model = adapted("llama", **settings)
    texts = [tokens(1, 4 * C + i, seed=i) for i in range(4)]
    want = [logits(model, ids) for ids in texts]
    for _ in range(5):
        for got, expected in zip(at_once(*(lambda ids=ids: logits(model, ids) for ids in texts)), want, strict=True):
            assert torch.equal(got, expected)


def test_settings_of_one_thread_alone():
    model, ids = adapted("llama"), tokens(1, 5 * C)
    on = logits(model, ids)
    with ittt.updates_off(model):
        off = logits(model, ids)
    assert not torch.equal(on, off)
    inside, go = threading.Event(), threading.Event()

    def without():
        with ittt.updates_off(model):
            inside.set()
            go.wait(10)
            return logits(model, ids)

    def beside():
        inside.wait(10)
        try:
            return logits(model, ids)
        finally:
            go.set()

    assert all(torch.equal(a, b) for a, b in zip(at_once(without, beside), (off, on), strict=True))
    assert runtime_of(model).enabled


def test_sessions_in_threads():
    model = adapted("llama")
    texts = [tokens(1, 6 * C, seed=i)[0].tolist() for i in range(3)]

    def read(ids):
        return ittt.Session(model, probe_every=0).read(ids, scored=True).losses

    want = [read(ids) for ids in texts]  # the first session finds out what the model's cache can do, alone
    for got, expected in zip(at_once(*(lambda ids=ids: read(ids) for ids in texts)), want, strict=True):
        assert got == pytest.approx(expected, abs=1e-12)
