"""One process of test_bank_life_race.py: ingests, compacts, forgets or reads a bank that others use meanwhile.

python life_race.py WHAT BANK NUMBER
"""

from __future__ import annotations

import sys
import time

from bank_rows import make_slice

from mbc_core.bank import Bank, commit_slice
from mbc_core.bank.compact import compact
from mbc_core.bank.forget import forget

SLICES, DOCUMENTS = 12, 4
FORGOTTEN = [f"w{writer}-{number}-1" for writer in range(2) for number in range(0, SLICES, 3)]


def documents(writer: int, number: int) -> list[tuple[str, str]]:
    """Some of their own, and one that every slice of both writers revises."""
    mine = [(f"w{writer}-{number}-{place}", f"text {writer} {number} {place}") for place in range(DOCUMENTS)]
    return [*mine, ("shared", f"by {writer} in {number}")]


def ingest(bank: Bank, writer: int) -> None:
    for number in range(SLICES):
        rows = make_slice(f"writer{writer}", str(number), documents(writer, number), passages=2, day=number % 5, dead=1)
        commit_slice(bank, rows, f"writer{writer}", str(number))


def read(bank: Bank) -> None:
    """Whatever is shown is whole: two passages a document, none twice, all with their documents row."""
    seen = 0
    until = time.monotonic() + 30
    while time.monotonic() < until and seen < 2 * SLICES * DOCUMENTS - len(FORGOTTEN):
        rows = bank.passages()
        pairs = list(zip(rows["doc_id"].to_pylist(), rows["passage"].to_pylist(), strict=True))
        assert len(pairs) == len(set(pairs)), "a passage twice"
        names = {name for name, _ in pairs}
        assert len(pairs) == 2 * len(names), "half a document"
        seen = len(names)


def main(what: str, place: str, number: int) -> None:
    bank = Bank.open(place)
    if what == "ingest":
        ingest(bank, number)
    elif what == "read":
        read(bank)
    elif what == "compact":
        for _ in range(5):
            compact(bank, history=0)
            time.sleep(0.2)
    else:
        for doc_id in FORGOTTEN:
            forget(bank, [doc_id])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
