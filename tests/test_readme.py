"""The examples of README and docs run as printed, and the tables are the records'."""

import contextlib
import io
import os
import re
import runpy
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import pytest
from forked import Forked
from locations import ROOT
from spawn import free_port

DOCS = ROOT / "docs"
HOME = (DOCS / "index.md").read_text(encoding="utf-8")
START = (DOCS / "start.md").read_text(encoding="utf-8")


def examples(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def run(monkeypatch) -> Callable[..., str]:
    """``run(*command)``: what ``python COMMAND`` prints, run here: a process of its own imports for ten seconds."""
    monkeypatch.chdir(ROOT)

    def python(*command: str) -> str:
        printed, last = io.StringIO(), command[-1]
        with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            patch.setattr(sys, "argv", [last])
            if command[0] == "-c":
                exec(compile(last, "example", "exec"), {"__name__": "__main__"})
            elif command[0] == "-m":
                warnings.simplefilter("ignore", RuntimeWarning)  # the module was imported already
                runpy.run_module(last, run_name="__main__")
            else:
                patch.syspath_prepend(str(ROOT / "benchmarks"))
                runpy.run_path(last, run_name="__main__")
        return printed.getvalue()

    return python


def test_first_example_prints_what_it_says(run):
    printed = re.search(r"```text\n(\d+ tokens: loss .*?)```", START, re.DOTALL)[1]
    out = run("-c", examples(DOCS / "start.md")[0])
    pattern = r"\d+ tokens: loss (\d+\.\d+) with updates, (\d+\.\d+) without\n"
    on, off = map(float, re.fullmatch(pattern, out).groups())
    said_on, said_off = map(float, re.fullmatch(pattern, printed).groups())
    assert on < off - 0.05
    if sys.version_info[:2] == (3, 11):  # the text read is a module of the running Python
        assert (on, off) == pytest.approx((said_on, said_off), abs=0.02)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A folder with a tiny model, its tokenizer and a text, in the place of a model of the hub."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    import inplace_ttt as ittt

    folder = tmp_path_factory.mktemp("local")
    tokenizer = AutoTokenizer.from_pretrained(ittt.DEFAULT_MODEL)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=7, num_attention_heads=2, vocab_size=len(tokenizer)
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "book.txt").write_text("It was the best of times, it was the worst of times. " * 40, encoding="utf-8")
    return folder


@pytest.mark.parametrize("page", ["README.md", "docs/adapt.md"])
def test_a_model_of_the_hub_learns_as_it_reads(run, page, local):
    code = examples(ROOT / page)[0].replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(local / "model"))
    code = code.replace('"book.', f'"{local}/book.')
    code = re.sub(r'generate\("Chapter".*\)\)', 'generate("Chapter", max_new_tokens=4))', code)
    (local / "book.session").unlink(missing_ok=True)
    assert int(run("-c", code + "\nprint(session.stats().updates)").split()[-1]) >= 2
    assert (local / "book.session").exists()


def test_the_papers_objective_on_a_model_of_the_hub(run, local):
    code = examples(DOCS / "adapt.md")[2].replace("Qwen/Qwen3-4B-Base", str(local / "model"))
    trained = "[n for n, p in model.named_parameters() if p.requires_grad]"
    code = code.replace('"out"', f'"{local}/out"').replace("...  #", f"print({trained})  #")
    out = run("-c", code + "\nprint([site.index for site in ittt.adapting_layers(model)])").splitlines()
    assert [".ttt_" in name for name in eval(out[0])] == [True] * 4
    assert out[-1] == "[0, 6]"


def test_session_example_prints_what_it_says(run, tmp_path):
    code = examples(DOCS / "start.md")[1]
    printed = START[START.index(code) :]
    code = code.replace('"argparse', f'"{tmp_path}/argparse')
    printed = re.search(r"```text\n(.*?)```", printed, re.DOTALL)[1]
    before, after = map(float, re.findall(r"\d\.\d\d", run("-c", code)))
    said = [float(x) for x in re.findall(r"\d\.\d\d", printed)]
    assert after < before - 0.1
    if sys.version_info[:2] == (3, 11):
        assert [before, after] == pytest.approx(said, abs=0.02)
    assert (tmp_path / "argparse.session").exists()
    assert (tmp_path / "argparse-lora" / "adapter_config.json").exists()


def test_examples_of_the_page_about_sessions_run(run):
    """The first one: with the next test's."""
    assert run("-c", examples(DOCS / "sessions.md")[1])


def test_the_example_of_a_chat_prompt_reads_special_tokens(run):
    """Behind the page's first one, and beside the rendered string, in which they are text."""
    found = examples(DOCS / "sessions.md")
    (example,) = [code for code in found if "apply_chat_template" in code]
    template = "{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}"
    setting = f"tokenizer.chat_template = {template!r}\nmessages = [{{'role': 'user', 'content': 'def f():'}}]\n"
    check = """
session.reset()
rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
as_text = session.read(rendered + " ", scored=True).tokens
print(tokenizer.eos_token_id in ids, tokenizer.eos_token_id in as_text[1:], type(answer).__name__)
"""
    first, _, rest = run("-c", f"{found[0]}\nprint('first ends')\n{setting}{example}{check}").partition("first ends\n")
    assert "Stats(" in first
    assert rest == "True False str\n"


PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in DOCS.glob("*.md"))]
PYTHON = {(page, i): code for page in PAGES for i, code in enumerate(examples(ROOT / page))}
ELSEWHERE = {
    "README.md": (1, "test_readme.py", "test_a_model_of_the_hub_learns_as_it_reads"),
    "docs/extending.md": (5, "test_extending.py", "test_examples_of_the_page_print_what_they_say"),
    "docs/rl.md": (1, "rl/test_rl_docs.py", "test_the_example_runs"),
    "docs/serving.md": (1, "serve/test_openai.py", "test_the_page_s_requests"),
    "docs/start.md": (2, "test_readme.py", "test_session_example_prints_what_it_says"),
}
"""How many examples a page has that a test runs which is not about this list, and which test."""
NOT_RUN = {("docs/decoding.md", 1): "needs a GPU; tests/gpu/test_gpu_decoding.py does the same"}


class Around(NamedTuple):
    """What a page leaves to its reader: the code before an example and behind it, other values, how many processes."""

    before: str
    after: str
    other: Mapping[str, str] = MappingProxyType({})
    processes: int = 1


BEGIN = """
import os, torch
import inplace_ttt as ittt
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache
plain = lambda: AutoModelForCausalLM.from_pretrained("model").eval()
tokenizer = AutoTokenizer.from_pretrained("model")
text = open("book.txt").read()
ids = tokenizer(text, return_tensors="pt").input_ids[:, :300]
learning = lambda: ittt.attach(plain(), ittt.InPlaceTTTConfig(objective="loss", chunk_size=64))
shipped = lambda: ittt.from_pretrained(ittt.DEFAULT_MODEL, dtype=torch.float32).eval()
layers = lambda model: [layer.index for layer in ittt.adapting_layers(model)]
"""
AROUND = {
    ("docs/adapt.md", 1): Around("", "assert layers(ittt.attach(plain(), config)) == [0, 3, 6]"),
    ("docs/decoding.md", 0): Around(
        "model = shipped(); inputs = dict(tokenizer('def f(', return_tensors='pt'), max_new_tokens=8)",
        "assert torch.equal(out, model.generate(**inputs)) and callable(step)",
    ),
    ("docs/families.md", 0): Around(
        """sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
model = AutoModelForCausalLM.from_config(AutoConfig.for_model("phi", vocab_size=50, **sizes))""",
        "assert layers(ittt.attach(model, config)) == [0]",
    ),
    ("docs/families.md", 1): Around(
        "config = AutoConfig.from_pretrained('model')",
        "assert layers(model) == [0, 6] and model.eval()(ids).logits.isfinite().all()",
        {'"cuda"': '"cpu"'},
    ),
    ("docs/parallel.md", 0): Around("", "", processes=2),
    ("docs/parallel.md", 1): Around(
        """from transformers.distributed import DistributedConfig
base, config = "model", ittt.InPlaceTTTConfig()
want = plain()(ids).logits""",
        "assert layers(model) == [0, 6] and torch.allclose(model.eval()(ids).logits, want, atol=1e-4)",
        processes=2,
    ),
    ("docs/reading.md", 0): Around(
        "model = plain()",
        "session = ittt.Session(model); session.read(ids[0].tolist()); assert session.stats().updates >= 2",
    ),
    ("docs/reading.md", 1): Around(
        "model = learning(); want = model(ids).logits",
        """assert model.config._attn_implementation == "inplace_ttt_pieces"
assert torch.allclose(model(ids).logits, want, atol=1e-4)""",
    ),
    ("docs/reading.md", 2): Around(
        """tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
session = ittt.Session(learning(), tokenizer)""",
        "assert session.stats().updates > 0",
        {"minutes=5": "minutes=0.02"},
    ),
    ("docs/results.md", 0): Around(
        "import inplace_ttt",
        """made = ittt.from_pretrained('shipped').config.inplace_ttt
assert (made['chunk_size'], made['decay']) == (64, 0.01)""",
        {'"out/books-and-code-ttt/model"': "ittt.DEFAULT_MODEL", "inplace_ttt.DEFAULT_MODEL, t": '"shipped", t'},
    ),
    ("docs/sessions.md", 3): Around(
        """from peft import PeftModel
session = ittt.Session(learning(), tokenizer)
session.read(text)
base = plain(); want = base(ids).logits""",
        "assert not torch.equal(model(ids).logits, want)",
    ),
    ("docs/sharing.md", 0): Around(
        "model = ittt.attach(plain(), ittt.InPlaceTTTConfig())", "assert layers(model) == [0, 6]"
    ),
    ("docs/training.md", 0): Around(
        """model = shipped(); cache = DynamicCache(config=model.config); pieces = ids.split(100, 1)
trained = model.get_parameter("model.layers.0.mlp.ttt_proj.weight")""",
        "assert trained.grad.any() and cache.get_seq_length() == ids.shape[1]",
    ),
}


def test_every_example_is_run_or_says_why_not():
    own = {"adapt.md": [0, 2], "sessions.md": [0, 1, 2]}  # by the tests above
    known = [*AROUND, *NOT_RUN, *((f"docs/{page}", i) for page, places in own.items() for i in places)]
    known += [(page, i) for page, (count, *_) in ELSEWHERE.items() for i in range(count)]
    assert sorted(known) == sorted(PYTHON), "run a new example: AROUND says what comes before and behind it"
    for _, file, test in ELSEWHERE.values():
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file} has no {test}"


@pytest.mark.parametrize("place", AROUND, ids=lambda place: f"{Path(place[0]).stem}-{place[1]}")
def test_examples_of_the_other_pages_run(place, local, tmp_path, monkeypatch):
    for name in ("model", "book.txt"):
        (tmp_path / name).symlink_to(local / name)
    monkeypatch.chdir(tmp_path)
    code, around = PYTHON[place], AROUND[place]
    for old, new in around.other.items():
        assert old in code
        code = code.replace(old, new)
    code = compile("\n".join((BEGIN, around.before, code, around.after)), place[0], "exec")
    if around.processes == 1:
        exec(code, {"__name__": "example"})
        return
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(around.processes)}

    def work(rank: int) -> None:
        os.environ |= {**where, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        exec(code, {"__name__": "example"})

    ranks = [Forked(lambda rank=rank: work(rank)) for rank in range(around.processes)]
    printed = [rank.stdout.read().decode() for rank in ranks]
    assert [rank.wait() for rank in ranks] == [0, 0], printed
    said = re.findall(r"^step \d: loss (.*)$", (ROOT / place[0]).read_text(encoding="utf-8"), re.MULTILINE)
    losses = re.findall(r"^step \d: loss (.*)$", printed[0], re.MULTILINE)
    if place == ("docs/parallel.md", 0):
        assert [float(loss) for loss in losses] == pytest.approx([float(loss) for loss in said], abs=0.02)


def test_session_tables_are_the_records(run):
    results = (DOCS / "results.md").read_text(encoding="utf-8")
    for script in ("summarise_long_stream.py", "summarise_sessions.py"):
        for table in run(f"benchmarks/{script}").strip().split("\n\n"):
            assert table in results


def test_reading_table_is_the_records(run):
    page = (DOCS / "reading.md").read_text(encoding="utf-8")
    tables = [block for block in run("benchmarks/summarise_reading.py").split("\n\n") if block.startswith("| ")]
    assert tables
    assert [table for table in tables if table.strip() not in page] == []


def test_families_table_is_the_code_s(run):
    table = run("-m", "inplace_ttt.hf.families").strip()
    assert table in (DOCS / "families.md").read_text(encoding="utf-8")


def test_speed_tables_are_the_records(run):
    pages = "\n".join((DOCS / name).read_text(encoding="utf-8") for name in ("results.md", "parallel.md"))
    tables = run("benchmarks/summarise_bench.py").strip().split("\n\n")
    assert len(tables) == 3
    for table in [*tables, run("benchmarks/summarise_adapter.py").strip()]:
        assert table in pages


def test_results_tables_are_the_records(run):
    table = run("benchmarks/summarise_books_and_code.py").strip()
    assert table in (DOCS / "results.md").read_text(encoding="utf-8")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from summarise_books_and_code import figures

    for domain in ("code", "books"):
        f = figures(0, domain)
        assert f"| {domain} | {f['window']:.3f} | {f['off']:.3f} | **{f['shipped']:.3f}** |" in HOME
