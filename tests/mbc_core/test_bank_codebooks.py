"""Codebook versions and pending statistics on storage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from bank_rows import CODEWORDS, SLOTS, WIDTH, codebook, make_bank, make_slice, manifest, numbered, window

from mbc_core.bank import (
    Bank,
    commit_slice,
    drop_folded_statistics,
    load_pending,
    register_codebook,
    save_statistics,
)
from mbc_core.codebook.files import Codebook
from mbc_core.codebook.statistics import BatchStatistics
from mbc_core.codebook.update import CodebookUpdate, UpdateRule, update
from mbc_core.codes import quantize
from mbc_core.errors import DamagedFile, StorageError, UsageError

RULE = UpdateRule(tau=10_000.0, min_vectors=SLOTS * 10, growth=0.0, judged=False)


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    return make_bank(tmp_path / "bank")


def _statistics(book: Codebook, seed: int, passages: int = 6) -> BatchStatistics:
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((passages, SLOTS, WIDTH)).astype(np.float32)
    keys = rng.integers(-(2**62), 2**62, passages)
    return BatchStatistics.of(book, vectors, quantize(vectors, book.codewords), keys, np.zeros(passages, np.int32))


def _update(book: Codebook, seed: int, day: int) -> CodebookUpdate:
    return update(book, _statistics(book, seed), RULE, [window(day)])


def test_version_0_is_registered_with_figures_from_its_counts(bank):
    row = bank.read("codebook_versions").to_pylist()[0]
    assert (row["version"], row["parent"], row["built_from"], row["used"], row["resets"]) == (0, None, [], CODEWORDS, 0)
    assert row["perplexity"] == pytest.approx(CODEWORDS)
    assert row["file"] == f"codebooks/00000-{codebook().digest[:32]}.safetensors"
    assert bank.codebook(0).digest == row["digest"] == codebook().digest


def test_a_version_is_registered_once_and_read_back_the_same(bank):
    change = _update(bank.codebook(0), 1, 0)
    assert register_codebook(bank, change.codebook, change, ingest_id="run", slice_name="0") is True
    assert register_codebook(bank, change.codebook, change, ingest_id="run", slice_name="0") is False
    assert bank.codebook(1).to_bytes() == change.codebook.to_bytes()
    row = bank.read("codebook_versions").to_pylist()[-1]
    assert (row["vectors"], row["used"], row["resets"]) == (change.vectors, change.used, change.resets)
    assert (row["perplexity"], row["error"]) == (change.perplexity, change.error)
    assert (row["built_from"], row["ingest_id"], row["slice"]) == ([window(0)], "run", "0")
    assert [book.version for book in bank.codebooks().versions] == [0, 1]


def test_loading_the_chain_reads_the_table_once_whatever_its_length(bank, monkeypatch):
    for day in range(4):
        change = _update(bank.codebook(day), day, day)
        register_codebook(bank, change.codebook, change)
    read, tables = Bank.read, []

    def counted(self, table, *args, **kwargs):
        tables.append(table)
        return read(self, table, *args, **kwargs)

    monkeypatch.setattr(Bank, "read", counted)
    assert len(Bank.open(bank.uri).codebooks().versions) == 5
    assert tables.count("codebook_versions") == 1


def test_another_codebook_under_a_taken_version_is_refused(bank):
    mine, theirs = _update(bank.codebook(0), 1, 0), _update(bank.codebook(0), 2, 0)
    register_codebook(bank, theirs.codebook, theirs, ingest_id="theirs", slice_name="0")
    with pytest.raises(
        StorageError, match=r"codebook version 1 was published by another run meanwhile: .*by ingest th"
    ):
        register_codebook(bank, mine.codebook, mine, ingest_id="mine", slice_name="0")
    assert bank.codebook(1).digest == theirs.codebook.digest


def test_a_codebook_of_another_size_is_refused(bank, tmp_path):
    with pytest.raises(UsageError, match=r"does not fit the bank: 'K = 8, d_c = 4'.*the bank has K = 32, d_c = 4"):
        register_codebook(bank, codebook(codewords=8))
    with pytest.raises(UsageError, match="does not fit the bank"):
        Bank.create(tmp_path / "other", manifest(codewords=64), codebook())
    assert not (tmp_path / "other").exists()


def test_versions_of_an_unfinished_slice_are_left_out_when_it_is_resumed(bank):
    first = _update(bank.codebook(0), 1, 0)
    register_codebook(bank, first.codebook, first, ingest_id="run", slice_name="0")
    assert bank.codebooks(resuming="run").head.version == 0
    assert bank.codebooks(resuming="another").head.version == 1
    commit_slice(bank, make_slice("run", "0", numbered(0, 2)), "run", "0")
    assert bank.codebooks(resuming="run").head.version == 1


def test_versions_that_another_run_built_on_stay(bank):
    first = _update(bank.codebook(0), 1, 0)
    second = _update(first.codebook, 2, 1)
    register_codebook(bank, first.codebook, first, ingest_id="run", slice_name="0")
    register_codebook(bank, second.codebook, second, ingest_id="another", slice_name="0")
    assert bank.codebooks(resuming="run").head.version == 2


def test_statistics_count_with_their_slice_and_until_a_version_took_them_in(bank):
    book = bank.codebook(0)
    one, two = _statistics(book, 1), _statistics(book, 2)
    paths = [save_statistics(bank, "run", name, window(0), part) for name, part in (("0", one), ("1", two))]
    assert load_pending(bank, None) == []  # no slice is committed yet
    commit_slice(bank, make_slice("run", "0", numbered(0, 6), statistics=paths[0]), "run", "0")
    assert [(name, part.to_bytes()) for name, part in load_pending(bank, None)] == [(window(0), one.to_bytes())]
    commit_slice(bank, make_slice("run", "1", numbered(6, 6), statistics=paths[1]), "run", "1")
    chain = bank.codebooks(RULE)
    assert chain.pending is not None and chain.pending.to_bytes() == (one + two).to_bytes()
    assert chain.pending_windows == (window(0),)
    assert load_pending(bank, window(0)) == []
    assert drop_folded_statistics(bank, None) == 0
    assert drop_folded_statistics(bank, window(0)) == 2
    assert drop_folded_statistics(bank, window(0)) == 0
    assert not any(bank.storage.exists(path) for path in paths)


def test_saving_equal_statistics_again_changes_nothing(bank):
    part = _statistics(bank.codebook(0), 1)
    assert save_statistics(bank, "run", "0", window(0), part) == save_statistics(bank, "run", "0", window(0), part)
    assert len(bank.storage.list("codebooks/pending")) == 1


def test_damaged_statistics_are_refused(bank):
    path = save_statistics(bank, "run", "0", window(0), _statistics(bank.codebook(0), 1))
    commit_slice(bank, make_slice("run", "0", numbered(0, 6), statistics=path), "run", "0")
    file = Path(bank.uri) / path
    file.write_bytes(file.read_bytes()[:-1] + b"\x99")
    with pytest.raises(DamagedFile, match="does not match its digest"):
        bank.codebooks()


def test_a_damaged_or_missing_codebook_file_is_refused(bank):
    change = _update(bank.codebook(0), 1, 0)
    register_codebook(bank, change.codebook, change)
    file = Path(bank.uri) / bank.read("codebook_versions").to_pylist()[-1]["file"]
    whole = bytearray(file.read_bytes())
    whole[-1] ^= 1
    file.write_bytes(bytes(whole))
    again = Bank.open(bank.uri)
    with pytest.raises(DamagedFile, match=r"the codebook file .* does not match its digest"):
        again.codebook(1)
    assert any("does not match its digest" in one for one in again.inspect(verify=True)["problems"])
    file.unlink()
    with pytest.raises(DamagedFile, match="of codebook version 1 is missing"):
        again.codebook(1)
    with pytest.raises(DamagedFile, match="codes name a codebook version that the bank does not hold: 7"):
        again.codebook(7)
