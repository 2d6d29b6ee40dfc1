"""A session file of format 1, written by an older release, goes on with the same numbers."""

import json
from pathlib import Path

import pytest
from old_file import IDS, MORE, model

from inplace_ttt import Session

DATA = Path(__file__).parent / "data"


def test_a_file_of_format_1_goes_on_as_it_did(tmp_path):
    session = Session.load(DATA / "format1.session", model())
    assert session.stats().tokens == len(IDS)
    assert session.stats().updates == len(IDS) // 8
    session.fork().save(tmp_path / "new.session")  # and in the present format
    wanted = json.loads((DATA / "format1.json").read_text())
    for held in (session, Session.load(tmp_path / "new.session", model())):
        taken_back = held.fork()
        assert held.read(MORE, scored=True).losses == pytest.approx(wanted, abs=1e-5)
        for fast in taken_back.fast_weights.values():
            fast.rollback(6)  # one completed chunk opens again
        assert {fast.seen for fast in taken_back.fast_weights.values()} == {(55,)}
