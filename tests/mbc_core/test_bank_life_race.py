"""Two ingests, a compaction, forgetting and a reader in processes of their own, all at once on one bank."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from bank_rows import make_bank, shown
from life_race import DOCUMENTS, FORGOTTEN, SLICES, documents
from traces import Planted, traces

from mbc_core.bank.compact import compact
from mbc_core.bank.forget import forget


@pytest.mark.slow
def test_everything_at_once(tmp_path):
    bank = make_bank(tmp_path / "bank")
    script = str(Path(__file__).with_name("life_race.py"))
    work = [("ingest", 0), ("ingest", 1), ("compact", 0), ("forget", 0), ("read", 0)]
    running = [
        subprocess.Popen([sys.executable, script, what, bank.uri, str(number)], stderr=subprocess.PIPE, text=True)
        for what, number in work
    ]
    told = [one.communicate(timeout=500)[1] for one in running]
    assert [one.returncode for one in running] == [0] * len(work), "\n".join(told)

    written = {name for writer in range(2) for number in range(SLICES) for name, _ in documents(writer, number)}
    assert len(written) == 2 * SLICES * DOCUMENTS + 1
    left = written - set(FORGOTTEN)
    assert shown(bank) == sorted((name, passage) for name in left for passage in range(2))
    assert bank.inspect(verify=True)["problems"] == []
    for doc_id in FORGOTTEN:
        found = traces(bank, Planted(doc_id, [f"About {doc_id}", f"What of {doc_id}?"]), bytes.hex)
        assert found == [], "all writers are done, and each took out what was forgotten under it"
    assert forget(bank, FORGOTTEN)["forgotten"] == 0
    compact(bank, history=0, safe_age=0)
    assert shown(bank) == sorted((name, passage) for name in left for passage in range(2))
    assert bank.inspect(verify=True)["problems"] == []
    ledger = bank.read("ledger").to_pylist()
    assert len(ledger) == 2 * SLICES
    assert sum(row["documents_in"] for row in ledger) == 2 * SLICES * (DOCUMENTS + 2)
