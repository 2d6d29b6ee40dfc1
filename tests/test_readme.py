"""The examples of README and of the first pages run as printed, and the tables are the records'."""

import contextlib
import io
import re
import runpy
import sys
import warnings
from collections.abc import Callable

import pytest
from locations import ROOT

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
