"""Committing a stream's panes: judged, quantized and made visible one after the other, in the order of the windows.

A pane is one commit: app id ``codes/<ingest id>/<window>``, version = number of the pane. After a restart under the
same ingest id the numbers begin again, and sources may show everything once more. So a number that was used before
does not mean that the pane is done: only those of its documents that the bank does not show are committed then, under
the next free number, and nothing is counted twice.
"""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mbc_core.bank import PreparedFile, SliceId, begin_slice
from mbc_core.bank.commit import settle
from mbc_core.bank.latest import LatestRevisions, Standing
from mbc_core.bank.recheck import JudgedAt
from mbc_core.bank.replay import KeptPriorities
from mbc_core.errors import DamagedFile, StorageError
from pipelines import sink
from pipelines.plain import deal_by_key, quantize_batch, sum_statistics
from pipelines.records import CodeBatch, DeadLetters, EncodedBatch, Tally, by_window, column, concat
from pipelines.refused import forgotten_rows, refuse_letters
from pipelines.stream_codebook import LiveCodebooks
from pipelines.stream_records import StreamPart, WindowPane, hashes_of, keys_of, times_of
from schemas.tables import FORGOTTEN

if TYPE_CHECKING:
    from pipelines.stream_graph import StreamPlan

_ATTEMPTS = 8


_MOST_OPEN = 4

_OPEN: dict[str, PaneCommitter] = {}
_OPENING = threading.Lock()


def opened(plan: StreamPlan, life: str) -> PaneCommitter:
    """The committer of one run of a stream in this process: runners make a step's objects anew for every bundle.

    Args:
        life: tells two runs under one plan apart.
    """
    with _OPENING:
        if life not in _OPEN:
            while len(_OPEN) >= _MOST_OPEN:
                del _OPEN[next(iter(_OPEN))]
            _OPEN[life] = PaneCommitter(plan)
        return _OPEN[life]


@dataclass
class _Judged:
    """What of a pane is to be committed, and how its documents count.

    Attributes:
        batches: encoded documents that are new, no id twice. letters: dead letters. tally: documents seen, and those
            that are not in ``batches`` or ``letters``.
    """

    batches: list[EncodedBatch]
    letters: DeadLetters | None
    tally: Tally

    def __bool__(self) -> bool:
        return bool(self.batches) or self.letters is not None or self.tally.documents_in > 0


class PaneCommitter:
    """Commits the panes of one stream, from its start to its end in this process. One pane at a time.

    Args:
        plan: of the stream.
    """

    def __init__(self, plan: StreamPlan) -> None:
        self._plan, self._bank = plan, plan.job.bank
        self.latest = LatestRevisions(self._bank, plan.ingest_id)
        self.latest.refresh()
        self._codebooks = LiveCodebooks(self._bank, plan.ingest_id, plan.job.update_rule)
        self._letters = _StoredLetters(self)
        self._mine: dict[str, int] = {}
        self._done: set[tuple[str, int, int]] = set()
        self._replay = KeptPriorities(self._bank.replay_policy().per_window)
        self._unsettled = False
        self._on_way: Counter[int] = Counter()
        self._lock, self._way_lock = threading.Lock(), threading.Lock()

    @property
    def plan(self) -> StreamPlan:
        """What it was made for."""
        return self._plan

    def judge_arrived(self, rows: pa.RecordBatch) -> npt.NDArray[np.int8]:
        """Standing of documents that arrive, rows of ``STAGED``; none is a duplicate while its id is under way.

        What the bank shows now may be replaced by what is under way before this document's window is committed.
        """
        keys = keys_of(rows)
        standing = self.latest.standing(keys, hashes_of(rows), times_of(rows))
        with self._way_lock:
            under_way = np.array([key in self._on_way for key in keys.tolist()], bool)
            standing[under_way & (standing == Standing.DUPLICATE)] = Standing.REVISION
            passed = (standing != Standing.DUPLICATE) & (standing != Standing.FORGOTTEN)
            self._on_way.update(keys[passed].tolist())
        return standing

    def _arrived(self, part: StreamPart) -> None:
        """What was under way is committed."""
        with self._way_lock:
            for key in (key for batch in part.batches for key in keys_of(batch.documents).tolist()):
                if self._on_way[key] <= 1:
                    del self._on_way[key]
                else:
                    self._on_way[key] -= 1

    def commit_window(self, panes: Sequence[WindowPane]) -> list[str]:
        """Commit what one window has given up to now: the first panes of its shards together, each later one by itself.

        Returns:
            Names of the commits; panes that add nothing make none.
        """
        with self._lock:
            waiting = [one for one in panes if (one.window, one.shard, one.pane) not in self._done]
            first = [one for one in waiting if one.pane == 0]
            later = sorted((one for one in waiting if one.pane), key=lambda one: (one.pane, one.shard))
            names = []
            for together in ([first] if first else []) + [[one] for one in later]:
                part = StreamPart.concat(one.part for one in together)
                number = self._commit(together[0].window, together[0].pane, part)
                self._done.update((one.window, one.shard, one.pane) for one in together)
                self._arrived(part)
                if number is not None:
                    names.append(f"{together[0].window} pane {number}")
            return names

    def _commit(self, window: str, pane: int, part: StreamPart) -> int | None:
        app_id = SliceId(self._plan.ingest_id, window, 0, 0).app_id("codes")
        for _ in range(_ATTEMPTS):
            if self._unsettled:
                settle(self._bank, self._plan.ingest_id)
                self._unsettled = False
            shown = self.latest.refresh()
            found = shown.transaction_version(app_id)
            last = -1 if found is None else int(found)
            again = last >= pane and self._mine.get(window) != last
            judged = self._judge(window, part, again)
            if not judged:
                return None
            slice_id = begin_slice(self._bank, self._plan.ingest_id, window, max(pane, last + 1))
            try:
                written = self._write(slice_id, window, judged, JudgedAt(shown.version(), own=True))
            except DamagedFile:
                # Files that were not committed yet are gone: `mbc forget` found a document of its own in them.
                self._doubt()
                continue
            except BaseException:
                self._doubt()
                raise
            if written:
                self._mine[window] = slice_id.pane
                return slice_id.pane
            self._doubt()
        raise StorageError(
            f"the window {window} could not be committed",
            value=f"{_ATTEMPTS} attempts",
            cause=f"another process streams into this bank under the ingest id {self._plan.ingest_id} too",
            fix="end one of them, or give each its own --ingest-id",
        )

    def _doubt(self) -> None:
        """Nobody knows how far the last commit came: look at the bank before the next."""
        self._codebooks.doubt()
        self._unsettled = True

    # ------------------------------------------------------------------------------------------------------- judging

    def _judge(self, window: str, part: StreamPart, again: bool) -> _Judged:
        """Of one id the newest; then against what the bank shows.

        Args:
            again: a pane of this number was committed before this process began: what the bank shows was counted then.
        """
        rows = [batch.documents for batch in part.batches] + list(part.known)
        keys, times = _joined([keys_of(one) for one in rows]), _joined([times_of(one) for one in rows])
        hashes = np.concatenate([np.zeros((0, 16), np.uint8), *(hashes_of(one) for one in rows)])
        wins = _newest(keys, times, hashes)
        standing = self.latest.standing(keys, hashes, times)
        shown = np.arange(len(keys)) >= len(keys) - sum(one.num_rows for one in part.known)
        standing[shown & (standing != Standing.FORGOTTEN)] = Standing.DUPLICATE  # as it was when they came
        gone = wins & (standing == Standing.FORGOTTEN)
        known = wins & ~gone & (standing == Standing.DUPLICATE)
        fresh = wins & ~gone & ~known & (standing != Standing.OLDER)
        batches, start = [], 0
        for batch in part.batches:
            keep = fresh[start : start + batch.documents.num_rows]
            start += len(keep)
            if keep.any():
                batches.append(_rows_where(batch, keep))
        letters, repeated = self._letters.new(part.letters, again)
        tally = Tally(window, documents_in=int(fresh.sum()))
        if not again:
            letters = _with_forgotten(letters, window, int(gone.sum()))
            replaced = int(len(keys) - (fresh | known | gone).sum())
            seen = len(keys) - int(gone.sum()) + repeated
            tally = replace(tally, documents_in=seen, duplicates=int(known.sum()) + repeated, replaced=replaced)
        return _Judged(batches, letters, tally)

    # ------------------------------------------------------------------------------------------------------- writing

    def _write(self, slice_id: SliceId, window: str, judged: _Judged, judged_at: JudgedAt) -> bool:
        files: dict[str, list[PreparedFile]] = {}
        tallies, version = [judged.tally] if judged.tally.documents_in else [], None
        if judged.batches:
            codes, tally = self._quantize(slice_id, window, judged.batches)
            version = tally.codebook_version
            tallies.append(tally)
            floors = self._replay_floors(slice_id)
            for shard, batch in deal_by_key(codes, self._plan.job.shards):
                written, counts = sink.write_shard(self._bank, slice_id, batch, floors, shard)
                tallies += counts
                for table, file in written.items():
                    files.setdefault(table, []).append(file)
        if judged.letters is not None:
            rows = sink.dead_letter_rows(judged.letters, slice_id)
            files["dead_letter"] = [sink.write_slice_rows(self._bank, "dead_letter", rows, slice_id)]
            tallies += judged.letters.tallies(documents_in=True)
        if not sink.commit(self._bank, slice_id, files, tallies, judged_at):
            return False
        if judged.batches and codes.replay.num_rows:
            self._replay.add(window, column(codes.replay, "priority").astype(np.uint64))
        self._codebooks.committed(window, version)
        self._letters.committed(judged.letters)
        return True

    def _quantize(self, slice_id: SliceId, window: str, batches: list[EncodedBatch]) -> tuple[CodeBatch, Tally]:
        """Codes with the window's version; what they show goes into the next one."""
        job = self._plan.job
        slots = self._bank.manifest.slots
        book = self._codebooks.version_for(window)
        codes = CodeBatch.concat([quantize_batch(one, lambda _: book, job.rotation, slots) for one in batches])
        vectors = (part for one in batches for _, part in by_window(one.passages))
        statistics = sum_statistics(book, vectors, job.rotation, slots)
        path = self._codebooks.learn(slice_id, window, statistics)
        return codes, Tally(window, codebook_version=book.version, statistics=path)

    def _replay_floors(self, slice_id: SliceId) -> Mapping[str, int]:
        """What the window's sample can still take, after its panes before this one, also those of an earlier life."""
        if slice_id.pane and self._plan.job.rule.replay:
            self._replay.load(self._bank, [slice_id.name])
        return self._replay.floors()


@dataclass
class _StoredLetters:
    """The dead letters that this ingest has stored, by what they say: sources may show them again.

    One that is shown again is not stored again; it counts as a duplicate.
    """

    committer: PaneCommitter
    _stored: set[bytes] | None = field(default=None, init=False)

    def new(self, letters: Sequence[DeadLetters], again: bool) -> tuple[DeadLetters | None, int]:
        """Those to commit. A record of a file has its place there: it is the same one when it comes again.

        Args:
            again: all that are stored were counted before, whatever their source.

        Returns:
            The new ones, and how many were left out because they are stored already.
        """
        if not letters:
            return None, 0
        plan = self.committer.plan
        rows = concat([one.rows for one in letters])
        rows = refuse_letters(rows, self.committer.latest, plan.job.bank.manifest.salt)
        stored = self._load()
        known = [
            name in stored and (again or row["position"] > 0 or not (row["raw"] or row["reason"] == FORGOTTEN))
            for name, row in zip(_letter_names(rows), rows.to_pylist(), strict=True)
        ]
        rows = rows.filter(pa.array([not one for one in known], pa.bool_()))
        return (DeadLetters(rows) if rows.num_rows else None), sum(known)

    def committed(self, letters: DeadLetters | None) -> None:
        """Remember what was stored now."""
        if letters is not None:
            self._load().update(_letter_names(letters.rows))

    def _load(self) -> set[bytes]:
        if self._stored is None:
            plan = self.committer.plan
            rows = plan.job.bank.read("dead_letter").to_batches()
            names = (_letter_names(one) for one in rows if one.num_rows)
            ids = (one["ingest_id"].to_pylist() for one in rows if one.num_rows)
            self._stored = {
                name
                for found, owners in zip(names, ids, strict=True)
                for name, owner in zip(found, owners, strict=True)
                if owner == plan.ingest_id
            }
        return self._stored


def _with_forgotten(letters: DeadLetters | None, window: str, count: int) -> DeadLetters | None:
    """Documents that the bank was told to forget are refused, and counted."""
    if not count:
        return letters
    rows = forgotten_rows([window] * count)
    return DeadLetters(rows if letters is None else concat([letters.rows, rows]))


def _letter_names(rows: pa.RecordBatch) -> list[bytes]:
    parts = zip(*(rows[name].to_pylist() for name in ("reason", "source", "position", "raw")), strict=True)
    return [hashlib.blake2b(repr(one).encode(), digest_size=12).digest() for one in parts]


def _newest(
    keys: npt.NDArray[np.int64], times: npt.NDArray[np.int64], hashes: npt.NDArray[np.uint8]
) -> npt.NDArray[np.bool_]:
    """Mask of the documents that stand for their id, as ``pipelines.plan.newest`` has it."""
    halves = np.ascontiguousarray(hashes).view(">u8").reshape(-1, 2)
    order = np.lexsort((halves[:, 1], halves[:, 0], times, keys))
    wins = np.zeros(len(keys), bool)
    wins[order[np.append(keys[order][1:] != keys[order][:-1], True)[: len(order)]]] = True
    return wins


def _joined(columns: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    return np.concatenate([np.zeros(0, np.int64), *columns])


def _rows_where(batch: EncodedBatch, keep: npt.NDArray[np.bool_]) -> EncodedBatch:
    """The rows of the documents where ``keep`` (one flag a document) is set; no id is twice in a batch."""
    if keep.all():
        return batch
    keys = column(batch.documents, "key")[keep]
    parts = [getattr(batch, part) for part in batch.parts]
    return EncodedBatch(*(part.filter(pa.array(np.isin(column(part, "key"), keys))) for part in parts))
