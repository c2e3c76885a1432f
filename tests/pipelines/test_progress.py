"""Progress: counts are true, shown on standard error and nowhere else."""

from __future__ import annotations

import threading

from pipelines.progress import ENCODED, Counter, report
from pipelines.transforms import _Fraction


def test_the_counter_survives_threads():
    counter = Counter()
    threads = [threading.Thread(target=lambda: [counter.add(0.5) for _ in range(1000)]) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert counter.value == 2000


def test_a_batch_counts_its_documents_exactly_whatever_its_passages():
    for passages_told in ([], [1] * 3, [5, 5, 5, 5]):
        ENCODED.set(100)
        counted = _Fraction(documents=7, passages=5)
        for one in passages_told:
            counted(one)
            assert ENCODED.value <= 107
        counted.finish()
        assert round(ENCODED.value, 9) == 107


def test_shown_on_standard_error_with_a_rate(capsys):
    with report(True) as shown:
        shown.read(3)
        shown.start_encoding(10, 4)
        ENCODED.add(2)
        shown.refresh()
        shown.slice_done(10)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "encoding" in printed.err
    assert "10/10" in printed.err
    assert "documents/s" in printed.err


def test_silent_when_nobody_looks(capsys):
    with report(None) as shown:
        shown.read(1)
        shown.start_encoding(1, 0)
        shown.slice_done(1)
    assert capsys.readouterr() == ("", "")
