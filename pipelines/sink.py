"""Writing codes: shards by key, each one Parquet file a table, then one commit that makes the slice visible.

In batch a commit is a slice of a run; the slice's id carries the pane, so that a stream can commit a window once
and each late pane again. Files are named by ingest, slice, pane and content: a worker that is retried writes the
same file, a rerun never touches a committed one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import apache_beam as beam
import pyarrow as pa

from mbc_core.bank import Bank, PreparedFile, SliceId, SliceRows, commit_slice, write_slice_rows
from mbc_core.bank.recheck import JudgedAt
from pipelines import coders as _coders  # noqa: F401 - registers the elements' coders
from pipelines.plain import deal_by_key, smallest_by_priority
from pipelines.records import CodeBatch, DeadLetters, Tally, concat, sum_tallies
from schemas.tables import LEDGER, TABLES

PCollection = beam.PCollection

_ONE_COMMIT = "commit"


class WriteCodes(beam.PTransform):
    """{"codes", "dead_letters", "tallies"} → one slice of a bank, visible all at once and exactly once.

    Plain twin: :func:`write_slice`.

    Args:
        bank: opened; it pickles as its address.
        slice_id: ingest id, name and pane; made before the workers start, so that retries agree.
        shards: files a table; keep ≥ 5,000 documents a shard.
        replay_floors: window → the greatest priority of replay rows that its sample can still take; any for others.
        judged: what duplicates were judged against; the commit judges again what others have added since.

    Raises (while running):
        MbcError: documents seen are not all accounted for.
        StorageError, DamagedFile: the store refused, or a file changed between writing and commit.

    Example:
        ``{"codes": codes, "dead_letters": dead, "tallies": tallies} | WriteCodes(bank, SliceId.begin("run", "all"))``
    """

    def __init__(
        self,
        bank: Bank,
        slice_id: SliceId,
        shards: int = 1,
        replay_floors: Mapping[str, int] | None = None,
        judged: JudgedAt | None = None,
    ) -> None:
        super().__init__()
        self.bank, self.slice_id, self.shards, self.judged = bank, slice_id, shards, judged
        self.replay_floors = dict(replay_floors or {})

    def expand(self, pcolls: Mapping[str, PCollection[Any]]) -> PCollection[str]:
        """Shard, write, and commit when every shard is written; the output is the slice's name."""
        shards = (
            pcolls["codes"]
            | "DealByKey"
            >> beam.FlatMap(deal_by_key, shards=self.shards).with_output_types(tuple[int, CodeBatch])
            | "GatherShard" >> beam.GroupByKey()
            | "WriteShard"
            >> beam.ParDo(_WriteShardDoFn(self.bank, self.slice_id, self.shards, self.replay_floors))
            .with_output_types(tuple[str, bytes])
        )  # fmt: skip
        letters = (
            pcolls["dead_letters"]
            | "KeyDeadLetters" >> beam.WithKeys(0).with_output_types(tuple[int, DeadLetters])
            | "GatherDeadLetters" >> beam.GroupByKey()
            | "WriteDeadLetters"
            >> beam.ParDo(_WriteDeadLettersDoFn(self.bank, self.slice_id)).with_output_types(tuple[str, bytes])
        )
        tallies = pcolls["tallies"] | "TallyParts" >> beam.Map(_tally_part).with_output_types(tuple[str, bytes])
        return (
            (shards, letters, tallies)
            | "Parts" >> beam.Flatten()
            | "KeyParts" >> beam.WithKeys(_ONE_COMMIT).with_output_types(tuple[str, tuple[str, bytes]])
            | "GatherParts" >> beam.GroupByKey()
            | "CommitSlice" >> beam.ParDo(_CommitDoFn(self.bank, self.slice_id, self.judged)).with_output_types(str)
        )


def _tally_part(tally: Tally) -> tuple[str, bytes]:
    return "tally", tally.to_bytes()


class _WriteShardDoFn(beam.DoFn):
    def __init__(self, bank: Bank, slice_id: SliceId, shards: int, floors: Mapping[str, int]) -> None:
        self._bank, self._slice_id, self._shards, self._floors = bank, slice_id, shards, floors

    def process(self, element: tuple[int, Iterable[CodeBatch]]) -> Iterator[tuple[str, bytes]]:
        shard, batches = element
        files, tallies = write_shard(self._bank, self._slice_id, CodeBatch.concat(list(batches)), self._floors, shard)
        for table, file in files.items():
            yield table, json.dumps(asdict(file)).encode()
        for tally in tallies:
            yield _tally_part(tally)


class _WriteDeadLettersDoFn(beam.DoFn):
    def __init__(self, bank: Bank, slice_id: SliceId) -> None:
        self._bank, self._slice_id = bank, slice_id

    def process(self, element: tuple[int, Iterable[DeadLetters]]) -> Iterator[tuple[str, bytes]]:
        letters = DeadLetters(concat([one.rows for one in element[1]]))
        file = write_slice_rows(self._bank, "dead_letter", dead_letter_rows(letters, self._slice_id), self._slice_id)
        yield "dead_letter", json.dumps(asdict(file)).encode()
        for tally in letters.tallies(documents_in=False):
            yield _tally_part(tally)


class _CommitDoFn(beam.DoFn):
    def __init__(self, bank: Bank, slice_id: SliceId, judged: JudgedAt | None) -> None:
        self._bank, self._slice_id, self._judged = bank, slice_id, judged

    def process(self, element: tuple[str, Iterable[tuple[str, bytes]]]) -> Iterator[str]:
        files: dict[str, list[PreparedFile]] = {}
        tallies = []
        for kind, data in element[1]:
            if kind == "tally":
                tallies.append(Tally.from_bytes(data))
            else:
                files.setdefault(kind, []).append(PreparedFile(**json.loads(data)))
        commit(self._bank, self._slice_id, files, tallies, self._judged)
        yield self._slice_id.name


def write_shard(
    bank: Bank, slice_id: SliceId, batch: CodeBatch, floors: Mapping[str, int], shard: int = 0
) -> tuple[dict[str, PreparedFile], list[Tally]]:
    """Write one shard's rows; nothing reads them before the commit.

    Args:
        floors: window → the greatest priority of replay rows that is still wanted. A shard writes what its own rows
            may give to the window's sample; which of all shards' rows the sample has, the bank's reader chooses.

    Returns:
        Table → its file, and the counts of the shard by window.
    """
    replay = batch.replay
    if replay.num_rows:
        replay = smallest_by_priority(replay, bank.replay_policy().per_window, floors)
    rows = {"codes": batch.codes, "documents": batch.documents, "replay": replay}
    files = {}
    for name, part in rows.items():
        if part.num_rows:
            table = pa.Table.from_batches([part]).select([one for one in TABLES[name].names if one != "added_at"])
            files[name] = write_slice_rows(bank, name, table, slice_id, shard)
    return files, _shard_tallies(batch)


def commit(
    bank: Bank,
    slice_id: SliceId,
    files: Mapping[str, list[PreparedFile]],
    tallies: Iterable[Tally],
    judged: JudgedAt | None = None,
) -> bool:
    """Commit prepared files and the ledger rows made of ``tallies``, once.

    Args:
        judged: what duplicates were judged against; what others have added since is judged again.

    Returns:
        False when the slice was committed before.

    Raises:
        MbcError: the counts do not add up.
    """
    rows = SliceRows(
        codes=files.get("codes", []),
        documents=files.get("documents", []),
        replay=files.get("replay", []),
        dead_letters=files.get("dead_letter", []),
        ledger=ledger_rows(sum_tallies(tallies), slice_id),
    )
    return commit_slice(bank, rows, slice_id.ingest_id, slice_id.name, slice_id.pane, slice_id, judged)


def write_slice(
    bank: Bank,
    slice_id: SliceId,
    codes: CodeBatch | None,
    tallies: Iterable[Tally],
    dead_letters: DeadLetters | None = None,
    replay_floors: Mapping[str, int] | None = None,
    judged: JudgedAt | None = None,
) -> bool:
    """The plain twin of :class:`WriteCodes`, and the commit of records that need no encoding.

    Args:
        dead_letters: its counts must be in ``tallies`` already.
        judged: what duplicates were judged against.

    Returns:
        False when the slice was committed before.
    """
    files: dict[str, list[PreparedFile]] = {}
    counts = list(tallies)
    if codes is not None:
        written, of_codes = write_shard(bank, slice_id, codes, replay_floors or {})
        files = {table: [file] for table, file in written.items()}
        counts += of_codes
    if dead_letters is not None:
        rows = dead_letter_rows(dead_letters, slice_id)
        files["dead_letter"] = [write_slice_rows(bank, "dead_letter", rows, slice_id)]
    return commit(bank, slice_id, files, counts, judged)


def dead_letter_rows(letters: DeadLetters, slice_id: SliceId) -> pa.Table:
    """Rows of the table ``dead_letter``, without ``added_at``."""
    table = pa.Table.from_batches([letters.rows]).drop_columns(["window"])
    names = pa.array([slice_id.ingest_id] * table.num_rows, pa.string())
    return table.append_column(TABLES["dead_letter"].field("ingest_id"), names)


def ledger_rows(tallies: Iterable[Tally], slice_id: SliceId) -> pa.Table:
    """One row a window, as the table ``ledger`` keeps them, without ``added_at``."""
    schema = pa.schema([one for one in LEDGER if one.name != "added_at"])
    rows = [
        {
            **asdict(one),
            "dead_letters": json.dumps(dict(one.dead_letters), sort_keys=True),
            "ingest_id": slice_id.ingest_id,
            "slice": slice_id.name,
            "pane": slice_id.pane,
        }
        for one in tallies
    ]
    return pa.Table.from_pylist(rows, schema)


def _shard_tallies(batch: CodeBatch) -> list[Tally]:
    documents = _counts(batch.documents)
    return [
        Tally(window, documents=documents.get(window, 0), passages=passages)
        for window, passages in _counts(batch.codes).items()
    ]


def _counts(rows: pa.RecordBatch) -> dict[str, int]:
    counted = rows["window"].value_counts()
    return {one["values"]: one["counts"] for one in counted.to_pylist()}
