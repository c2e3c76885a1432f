"""A dated stream small enough for tests of the nightly proof."""

from __future__ import annotations

from mbc_core.evaluation.dated_stream import DatedStream, StreamDocument, StreamQuestion

QUARTERS, EACH = ("2024Q3", "2024Q4", "2025Q1"), 10


def stream() -> DatedStream:
    """Ten documents a quarter, one row each; every fifth is held out; an asked, a cloze and a gate question each."""
    count = len(QUARTERS) * EACH
    documents = [StreamDocument(f"d{n}", n // EACH, n % 2, n % 5 == 0) for n in range(count)]
    questions = [
        StreamQuestion(f"{kind} about town{n}?", (f"Name{n}",), n, kind, n)
        for n in range(count)
        for kind in ("asked", "cloze", "gate")
    ]
    recalled = []
    for quarter in range(len(QUARTERS)):
        held = (quarter + 1) * EACH
        recalled.append(
            {
                number: tuple((one.true + step) % held for step in range(1, 9))
                if number % 7 == 0
                else tuple((one.true + step) % held for step in range(8))
                for number, one in enumerate(questions)
                if documents[one.document].quarter == quarter
                or (documents[one.document].quarter < quarter and one.kind != "gate")
            }
        )
    words = tuple(f"town{n} Name{n} salt" for n in range(count))
    texts = tuple(f"The town of town{n} was\nfounded by  Name{n}." for n in range(count))
    return DatedStream(
        QUARTERS, tuple(documents), tuple(questions), words, texts, tuple(range(count)), tuple(recalled), {"qa": "x"}
    )


STREAM = stream()
