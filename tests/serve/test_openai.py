"""The official client, unchanged: chat and completions, streams, log-probabilities, errors."""

import re
import subprocess

import openai
import pytest
import torch
from cli.tiny_models import CHATML
from locations import ROOT
from serve.running import Running, model, session
from session.models import tokenizer

from inplace_ttt.serve.journal import known
from inplace_ttt.session.template import Template

USER = [{"role": "user", "content": "It was"}]


def test_the_page_s_requests(start, tmp_path):
    """Those of docs/serving.md, in order: a session is made, reads, is asked, and answers OpenAI's client."""
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (tmp_path / "book.txt").write_text("Call me Ishmael. " * 40, encoding="utf-8")
    server = start()
    requests = re.findall(r"^curl .*$", page, re.MULTILINE)
    assert len(requests) == 3
    for request in requests:
        assert "localhost:8000" in request
        request = request.replace("localhost:8000", f"--noproxy '*' -sS --fail-with-body {server.url}")
        done = subprocess.run(["bash", "-c", request], capture_output=True, text=True, cwd=tmp_path, timeout=60)
        assert done.returncode == 0, f"{request}: {done.stdout}{done.stderr}"
    assert '"answer"' in done.stdout
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    places = {"http://127.0.0.1:8000": server.url, '"books-and-code"': '"tiny", max_tokens=4'}
    for old, new in places.items():
        assert old in code
        code = code.replace(old, new)
    before = server.http().get("/v1/sessions/my-book").json()
    found = {}
    exec(compile(code, "docs/serving.md", "exec"), found)
    assert found["answer"].choices[0].message.content
    after = server.http().get("/v1/sessions/my-book").json()
    assert after != before


def test_models(server):
    client = server.openai()
    assert [found.id for found in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'"):
        client.models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError) as raised:
        client.chat.completions.create(model="gpt-4", messages=USER)
    assert raised.value.code == "model_not_found"


def test_chat(server):
    got = server.openai().chat.completions.create(model="tiny", messages=USER, max_tokens=9, temperature=0)
    assert got.choices[0].message.content == session().generate("It was", max_new_tokens=9)
    assert got.choices[0].message.role == "assistant"
    assert got.choices[0].finish_reason == "length"
    assert got.usage.completion_tokens == 9
    assert got.usage.total_tokens == got.usage.prompt_tokens + 9
    parts = [{"type": "text", "text": "It "}, {"type": "text", "text": "was"}]
    same = server.openai().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": parts}], max_completion_tokens=9, temperature=0
    )
    assert same.choices[0].message.content == got.choices[0].message.content


def test_streams(server):
    client = server.openai()
    want = session().generate("It was", max_new_tokens=9)
    options = {"model": "tiny", "max_tokens": 9, "temperature": 0, "stream": True}
    chunks = list(client.chat.completions.create(messages=USER, stream_options={"include_usage": True}, **options))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == want
    assert [c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason] == ["length"]
    assert not chunks[-1].choices
    assert chunks[-1].usage.completion_tokens == 9
    chunks = list(client.completions.create(prompt=["It was", "def"], n=2, **options))
    for index, prompt in enumerate(["It was", "It was", "def", "def"]):
        mine = [c.choices[0] for c in chunks if c.choices[0].index == index]
        assert "".join(c.text for c in mine) == session().generate(prompt, max_new_tokens=9)
        assert mine[-1].finish_reason == "length"


def test_log_probabilities(server):
    s = session()
    s.read("It was")
    want, tokens = [], []
    for _ in range(5):
        scores = s.next_logits.float().log_softmax(-1)
        want.append(scores)
        tokens.append(int(scores.argmax()))
        s.read([tokens[-1]])
    client = server.openai()
    got = client.chat.completions.create(
        model="tiny", messages=USER, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    for entry, scores, token in zip(got.choices[0].logprobs.content, want, tokens, strict=True):
        assert entry.logprob == pytest.approx(float(scores[token]), abs=1e-5)
        top = scores.topk(3)
        assert [x.logprob for x in entry.top_logprobs] == pytest.approx(top.values.tolist(), abs=1e-5)
        assert entry.token == tokenizer().decode([token])
        assert bytes(entry.bytes).decode() == entry.token
    got = client.completions.create(model="tiny", prompt="It was", max_tokens=5, temperature=0, logprobs=2)
    found = got.choices[0].logprobs
    assert found.token_logprobs == pytest.approx([float(s[t]) for s, t in zip(want, tokens, strict=True)], abs=1e-5)
    assert [len(top) for top in found.top_logprobs] == [2] * 5
    assert found.text_offset[0] == 0
    stream = client.completions.create(
        model="tiny", prompt="It was", max_tokens=5, temperature=0, logprobs=0, stream=True
    )
    streamed = [c.choices[0].logprobs for c in stream if c.choices[0].logprobs]
    assert [p for lp in streamed for p in lp.token_logprobs] == pytest.approx(found.token_logprobs)
    assert [o for lp in streamed for o in lp.text_offset] == found.text_offset


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 99}, "at most 8"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"tools": [{"type": "function", "function": {"name": "x"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "content"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "role"),
        ({"top_logprobs": 3}, "logprobs"),
        ({"extra_body": {"nonsense": 1}}, "nonsense"),
        ({"extra_headers": {"x-session-id": "../../etc"}}, "x-session-id"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_mistakes(server, changes, says):
    with pytest.raises(openai.BadRequestError, match=says) as raised:
        server.openai().chat.completions.create(**({"model": "tiny", "messages": USER} | changes))
    assert raised.value.body["type"] == "invalid_request_error"


def test_prompts_that_make_no_sense(server):
    client = server.openai()
    with pytest.raises(openai.BadRequestError, match="vocabulary"):
        client.completions.create(model="tiny", prompt=[1, 10**6])
    with pytest.raises(openai.NotFoundError, match="no session nobody"):
        client.completions.create(model="tiny", prompt="x", extra_headers={"x-session-id": "nobody"})
    server.http().post("/v1/sessions", json={"id": "single"})
    with pytest.raises(openai.BadRequestError, match="one answer at a time"):
        client.completions.create(model="tiny", prompt="x", n=2, extra_headers={"x-session-id": "single"})


def test_an_answer_that_fails_midway(server, monkeypatch):
    """A stream that has begun ends with the reason."""
    calls = []

    def sampler(self, recent, logits):
        calls.append(1)
        return 7 if len(calls) < 4 else int(torch.multinomial(torch.tensor([float("nan")]), 1))

    monkeypatch.setattr("inplace_ttt.session.sampling.Sampler.__call__", sampler)
    client = server.openai()
    stream = client.completions.create(model="tiny", prompt="x", max_tokens=9, stream=True)
    with pytest.raises(openai.APIError, match="failed inside the server"):
        list(stream)
    monkeypatch.undo()
    got = client.completions.create(model="tiny", prompt="It was", max_tokens=5, temperature=0)
    assert got.choices[0].text == session().generate("It was", max_new_tokens=5)


# -- conversations -----------------------------------------------------------------------------------------------------


def test_a_session_reads_only_what_is_new(server):
    """Whether the client sends the whole conversation, its end, or the new message alone."""
    http = server.http()
    for name in ("whole", "end", "new"):
        http.post("/v1/sessions", json={"id": name})
    talk = {name: [] for name in ("whole", "end", "new")}
    s = session()
    for turn, words in enumerate(["It was", "a whale", "in the sea"]):
        want = s.generate(words if turn == 0 else "\n" + words, max_new_tokens=5)
        for name, messages in talk.items():
            messages.append({"role": "user", "content": words})
            sent = {"whole": messages, "end": messages[-3:], "new": messages[-1:]}[name]
            got = server.openai(session=name).chat.completions.create(
                model="tiny", messages=sent, max_tokens=5, temperature=0
            )
            assert got.choices[0].message.content == want, (name, turn)
            messages.append({"role": "assistant", "content": want})
    assert http.get("/v1/sessions/whole").json()["stats"]["tokens"] == s.stats().tokens


def test_what_is_known_of_a_conversation():
    assert known([], ["a"]) == 0
    assert known(["a", "b"], ["a", "b", "c"]) == 2
    assert known(["a", "b", "c"], ["b", "c", "d"]) == 2
    assert known(["a", "b"], ["c"]) == 0
    assert known(["x", "a", "x", "a"], ["x", "a", "b"]) == 2


def test_chat_template(tmp_path, monkeypatch):
    """Turns are fed as the template says; what looks like its special tokens in a message is spelled out."""
    import copy

    chatty = copy.deepcopy(tokenizer())
    chatty.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    chatty.chat_template = CHATML
    monkeypatch.setattr("serve.running.tokenizer", lambda: chatty)
    root = model()
    size = root.config.vocab_size
    root.resize_token_embeddings(size + 2)
    try:
        with Running(tmp_path) as server:
            server.http().post("/v1/sessions", json={"id": "talk"})
            client = server.openai(session="talk")
            s = session()
            s.tokenizer = chatty
            messages = [{"role": "system", "content": "Short."}, {"role": "user", "content": "Hi <|im_end|> you"}]
            ids = Template(chatty).conversation(s, messages, False)
            assert ids.count(chatty.convert_tokens_to_ids("<|im_end|>")) == 2
            assert chatty.decode(ids) == chatty.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            got = client.chat.completions.create(model="tiny", messages=messages, max_tokens=5, temperature=0)
            want = s.generate(ids, max_new_tokens=5)
            assert got.choices[0].message.content == want
            messages += [{"role": "assistant", "content": want}, {"role": "user", "content": "More"}]
            got = client.chat.completions.create(model="tiny", messages=messages, max_tokens=5, temperature=0)
            rest = "<|im_end|>\n<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n"
            want = s.generate(chatty(rest, add_special_tokens=False)["input_ids"], max_new_tokens=5)
            assert got.choices[0].message.content == want
            plain = server.openai().chat.completions.create(
                model="tiny", messages=messages, max_tokens=5, temperature=0
            )
            whole = chatty.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
            spelled = Template(chatty).conversation(session(), messages, False)
            assert chatty.decode(whole) == chatty.decode(spelled)
            assert plain.choices[0].message.content == session().generate(spelled, max_new_tokens=5)
    finally:
        root.resize_token_embeddings(size)
