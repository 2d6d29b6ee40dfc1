"""Skills of a model before and after reading: a fixed set of chat prompts answered greedily.

    python benchmarks/reading_keeps.py --model FILE.gguf --name smollm2 --run smollm2-keeps --books FILE --out DIR

For every job one text of each domain is read (8,192 tokens, the settings of the job), then the context is dropped and
learning stopped, and every prompt of ``chat_prompts.txt`` is answered alone. The record holds all answers: read them.
Losses on other domains after reading are in the records of ``reading_by_loss.py`` (``other: true``).
"""

import time
from pathlib import Path
from typing import Any

import torch
from reading_by_loss import arguments_of, books, jobs_of, modules, plain, read, rows, settings_of, with_state
from torch import Tensor

import inplace_ttt as ittt
from inplace_ttt.errors import UserError
from inplace_ttt.hf.attach import runtime_of
from inplace_ttt.hf.cache import cache_name
from inplace_ttt.records import about, write_json


def prompts_of(tokenizer: Any, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Ids and mask [prompts, longest] of single turns, padded on the left."""
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    longest = max(map(len, ids))
    padded = torch.tensor([[0] * (longest - len(own)) + own for own in ids])
    mask = torch.tensor([[0] * (longest - len(own)) + [1] * len(own) for own in ids])
    return padded, mask


@torch.no_grad()
def answers(model: Any, tokenizer: Any, ids: Tensor, mask: Tensor, tokens: int, cache: Any = None) -> list[str]:
    """Return the text that the model writes after each row, greedily; ``cache``: empty, with fast weights."""
    given = {} if cache is None else {cache_name(model): cache}
    ends = {tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(["<|im_end|>", "<end_of_turn>"])}
    out = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens, pad_token_id=tokenizer.eos_token_id or 0,
        eos_token_id=sorted(i for i in ends if i is not None and i != tokenizer.unk_token_id), **given,
    )  # fmt: skip
    return [tokenizer.decode(row, skip_special_tokens=True) for row in out[:, ids.shape[1] :]]


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--answer", type=int, default=96, help="tokens of an answer, at most")
    parser.add_argument("--prompts", type=Path, default=Path(__file__).parent / "chat_prompts.txt")
    arguments = parser.parse_args()
    begin, device = time.perf_counter(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = plain(arguments)
    if not tokenizer.chat_template:
        raise UserError(f"{arguments.model} has no chat template: choose a model that was trained for chat")
    model = model.to(device)
    prompts = arguments.prompts.read_text(encoding="utf-8").splitlines()
    ids, mask = (x.to(device) for x in prompts_of(tokenizer, prompts))
    with ittt.updates_off(model):
        before = answers(model, tokenizer, ids, mask, arguments.answer)
    texts = {"books": books(arguments.books), "code": modules()}
    for job in jobs_of(arguments, begin):
        ittt.detach(model)
        settings = {k: v for k, v in job.items() if k not in ("name", "own", "other")}
        ittt.attach(model, ittt.InPlaceTTTConfig(**{"objective": "loss", **settings}))
        after, same = {}, {}
        for domain, found in texts.items():
            _, cache = read(model, rows(found, tokenizer, arguments.tokens)[:1].to(device))
            learned = {i: fast.fork() for i, fast in ittt.fast_weights(cache).items()}
            for fast in learned.values():
                fast.select(torch.zeros(len(ids), dtype=torch.int64, device=device))
            with runtime_of(model).override(learn=False):
                empty = with_state(model, learned, ids)
                after[domain] = answers(model, tokenizer, ids, mask, arguments.answer, empty)
            same[domain] = sum(x == y for x, y in zip(before, after[domain], strict=True))
        turns = [
            {"prompt": prompt, "before": old, **{f"after {d}": after[d][i] for d in after}}
            for i, (prompt, old) in enumerate(zip(prompts, before, strict=True))
        ]
        record = {
            "name": job["name"], "model": arguments.name, "window": arguments.window, "tokens": arguments.tokens,
            "settings": settings_of(job), "same_answers": same, "prompts": turns, **about(),
        }  # fmt: skip
        write_json(arguments.out / f"{arguments.run}-{job['name']}.json", record)
        print(f"{arguments.name} {job['name']}: of {len(prompts)} answers, the same as before: {same}", flush=True)
        for turn in turns[:3]:
            print(turn, flush=True)


if __name__ == "__main__":
    main()
