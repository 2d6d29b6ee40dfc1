"""Which tests one of pytest's workers gets together, and what comes first: ``make test`` runs two workers."""

import pytest
from xdist.scheduler import LoadFileScheduling

TOGETHER = {
    "tests/distributed/": "processes",
    "tests/rl/test_rl_ranks.py": "processes",
    "tests/train/test_train_kill.py": "processes",
    "tests/train/test_train_torchrun.py": "processes",
    "tests/eval/test_harness.py": "harness",
    "tests/eval/test_harness_suite.py": "harness",
    "tests/eval/test_canary.py": "harness",
    "tests/cli/test_eval.py": "harness",
    "tests/hf/test_hf_training.py": "compile",
    "tests/hf/test_hf_steps.py": "compile",
    "tests/hf/test_hf_lora.py": "compile",
    "tests/contract/test_family_training.py": "compile",
    "tests/cli/test_bench.py": "compile",
    "tests/train/test_train_loss.py": "compile",
    "tests/train/test_train_attention.py": "compile",
}
"""Files that share what takes seconds: the launcher of ranks (`spawn`), RULER's generators, PyTorch's compiler.

All other tests of a file stay together too, and so do its fixtures.
"""
LONG = (
    "compile",
    "processes",
    "harness",
    "tests/contract/test_family_decoding.py",
    "tests/train/test_train_run.py",
    "tests/session/test_session.py",
    "tests/hf/test_loss.py",
    "tests/test_readme.py",
    "tests/contract/",
    "tests/session/test_long_stream.py",
    "tests/session/test_text.py",
    "tests/train/",
    "tests/serve/",
    "tests/session/",
    "tests/hf/",
    "tests/rl/",
    "tests/test_wheel.py",
)
"""The longest first, so that no worker waits for the other's last file."""


def unit(nodeid: str) -> str:
    """Return the name of what a test belongs to: a group of files, or its file."""
    return next((name for path, name in TOGETHER.items() if nodeid.startswith(path)), nodeid.partition("::")[0])


def place(item: pytest.Item) -> tuple[int, str]:
    """Return where an item stands in the order of the workers."""
    name = unit(item.nodeid)
    return next((number for number, start in enumerate(LONG) if name.startswith(start)), len(LONG)), name


class Scheduling(LoadFileScheduling):
    """Units in the order in which they were collected. (``--dist loadgroup`` leaves groups apart since pytest 9.2.)"""

    def _split_scope(self, nodeid: str) -> str:
        return unit(nodeid)
