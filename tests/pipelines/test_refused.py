"""The plan refuses documents that were to be forgotten, before anything of them leaves the staging folder."""

from __future__ import annotations

import numpy as np
from tiny import corpus

from pipelines.plan import Spill, deal_out, make_plan
from pipelines.readers import Rejected
from pipelines.records import DEAD_LETTER_ROWS, sum_tallies
from pipelines.refused import forgotten_rows, refuse_letters
from pipelines.staging import read_rows
from schemas.document import Document, document_key

SALT = b"0123456789abcdef"
GONE = 'doc "3"'
KEY = document_key(GONE, SALT)


class Forgets:
    """A bank that shows nothing and was told to forget one document."""

    def status(self, keys, hashes):
        return np.where(keys == KEY, 3, 0).astype(np.int8)


BAD = [
    Rejected("bad_timestamp", "secret", "s.jsonl", 1, b"secret", GONE),
    Rejected("not_json", "secret", "s.jsonl", 2, b'{"id": "doc \\"3\\"", "text": "secret'),
    Rejected("not_json", "kept", "s.jsonl", 3, b'{"id": "doc 3", "doc_id": 7, "text": "kept'),
    Rejected("not_utf8", "kept", "s.jsonl", 4, b"\xff"),
]


def test_a_plan_leaves_it_out_and_counts_it(tmp_path):
    spill = Spill(tmp_path, SALT, 86_400)
    twice = [Document(GONE, "secret one", event_time=0), Document(GONE, "secret two", event_time=1)]
    spill.read([*corpus(5), *twice, *BAD])
    spill.finish()
    make_plan(spill, Forgets())  # a run may be planned more than once
    plan = make_plan(spill, Forgets())
    deal_out(spill, plan)
    assert KEY not in plan.keys.tolist()
    rows = [row for one in plan.slices for row in read_rows(one.path).to_pylist()]
    assert {row["doc_id"] for row in rows} == {one.doc_id for one in corpus(5)}
    letters = [row for one in plan.judged if one.path for row in read_rows(one.path).to_pylist()]
    assert sorted(row["reason"] for row in letters) == ["forgotten"] * 3 + ["not_json", "not_utf8"]
    refused = [row for row in letters if row["reason"] == "forgotten"]
    blank = {(row["raw"], row["key"], row["source"], row["position"]) for row in refused}
    assert blank == {(None, None, "", 0)} and "secret" not in str(letters)
    total = sum_tallies([tally for one in plan.judged for tally in one.tallies])
    assert sum(one.dead_letters.get("forgotten", 0) for one in total) == 3
    assert sum(one.replaced for one in total) == 1
    assert sum(one.documents_in for one in total) + len(rows) == plan.documents_in == 11


def test_the_name_of_a_commit_does_not_change_when_one_of_its_letters_is_forgotten(tmp_path):
    """Else the run's letters would be stored once more."""

    class Knows(Forgets):
        def status(self, keys, hashes):
            return np.zeros(len(keys), np.int8)

    names = []
    for place, visible in (("a", Knows()), ("b", Forgets())):
        (tmp_path / place).mkdir()
        spill = Spill(tmp_path / place, SALT, 86_400)
        spill.read(BAD)
        spill.finish()
        names.append([one.name for one in make_plan(spill, visible).judged])
    assert names[0] == names[1]


def test_letters_without_any_of_it_stay_as_they_are():
    rows = forgotten_rows(["2024-07-01T00:00:00Z"])
    assert rows.schema.equals(DEAD_LETTER_ROWS) and refuse_letters(rows, Forgets(), SALT) is rows
