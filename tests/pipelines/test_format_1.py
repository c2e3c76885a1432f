"""A bank of format version 1, as the release that fixed the format wrote it: it must open for ever.

tests/fixtures/format-1.tar.gz is never made again; a release that cannot read them has another format version
and needs a reader of this one.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from tiny import RULE, corpus, settings, write_corpus

from mbc_core.bank import Bank
from mbc_core.bank.compact import compact
from mbc_core.bank.verify import verify
from mbc_core.codes import Rotation
from mbc_core.lexicon import Lexicon
from mbc_core.memory import Memory

FIXTURES = Path(__file__).parents[1] / "fixtures"
ARCHIVE = FIXTURES / "format-1.tar.gz"


class Recorded:
    """The encoder of then, as far as a reader needs it: the questions' embeddings were written down."""

    def __init__(self, bank: Bank, questions: list[dict]) -> None:
        self.encoder_id = bank.manifest.encoder
        self.known = {one["question"]: one["embedding"] for one in questions}

    def encode_questions(self, questions):
        return np.array([self.known[one] for one in questions], np.float32)


@pytest.fixture
def format_1(tmp_path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11 before 3.11.4 has none
        archive.extractall(tmp_path / "format-1")
    return tmp_path / "format-1"


@pytest.fixture
def bank(format_1) -> Bank:
    return Bank.open(format_1 / "bank")


@pytest.fixture
def lexicon(format_1) -> Lexicon:
    return Lexicon.load(format_1 / "lexicon.json")


def test_it_is_read_as_it_was_written(bank, lexicon, format_1):
    expected, out = json.loads((format_1 / "expected.json").read_text("utf-8")), io.BytesIO()
    assert bank.export(out, "jsonl", lexicon) == len(expected["passages"])
    assert [json.loads(line) for line in out.getvalue().splitlines()] == expected["passages"]
    rotation = Rotation.load(format_1 / "rotation.safetensors")
    memory = Memory.open(bank, Recorded(bank, expected["questions"]), lexicon=lexicon, rotation=rotation)
    for one in expected["questions"]:
        found = memory.recall([one["question"]], 60)[0]
        assert [[each.doc_id, each.title, each.words] for each in found[:1]] == one["recalled"][:1]
        assert {tuple(each[:2]) for each in one["recalled"]} <= {(each.doc_id, each.title) for each in found}
    told = bank.inspect()
    assert {name: told[name] for name in expected["inspect"]} == expected["inspect"]
    assert [book.digest for book in bank.codebooks().versions] == expected["versions"] and len(expected["versions"]) > 1
    assert bank.replay().num_rows == expected["replay"] > 0


def test_it_is_whole(bank, lexicon):
    found = verify(bank, lexicon)
    assert (found["problems"], found["information"]) == ([], [])


def test_it_is_small_and_holds_everything_a_bank_can_hold(format_1):
    assert ARCHIVE.stat().st_size < 100_000
    top = {one.name for one in (format_1 / "bank").iterdir()}
    assert {"adapters", "codebooks", "codebook_versions", "codes", "dead_letter", "documents", "ledger"} <= top
    assert {"manifest.json", "receipts", "replay", "tombstones"} <= top


def test_it_can_be_written_to(bank, lexicon, format_1, tmp_path):
    from pipelines.ingest import run_ingest

    given = settings(tmp_path / "w", key_salt=bank.manifest.key_salt, update_rule=RULE)
    sys.path.insert(0, str(FIXTURES))
    from make_format_1 import WithLexicon

    given = given.__class__(**{**vars(given), "encoder": WithLexicon(str(format_1 / "lexicon.json"))})
    result = run_ingest(
        [write_corpus(tmp_path / "a.jsonl", corpus(62))], bank.uri, given, show_progress=False
    )  # fmt: skip
    assert (result["documents"], result["duplicates"], result["dead_letters_by_reason"]) == (14, 47, {"forgotten": 1})
    compact(bank, history=0)
    assert verify(bank, lexicon)["problems"] == []


@pytest.mark.slow
def test_the_script_beside_it_still_makes_such_a_bank(tmp_path):
    script = FIXTURES / "make_format_1.py"
    subprocess.run([sys.executable, str(script), str(tmp_path / "again")], check=True, timeout=300)
    again = Bank.open(tmp_path / "again" / "bank")
    assert verify(again, Lexicon.load(tmp_path / "again" / "lexicon.json"))["problems"] == []
