"""The main job: documents → codes in a bank.

    python -m pipelines.ingest documents.jsonl --bank my-bank
    python -m pipelines.ingest 'gs://bucket/docs/*.jsonl' --bank gs://bucket/bank \\
        --runner=DataflowRunner --project=… --region=… --temp_location=gs://bucket/tmp

On one machine the sources are read once, dealt out into slices, and each slice runs through the graph and is
durable before the next one: memory stays bounded, and a run that died goes on where it stopped. Other runners take
the whole input as one slice and read it themselves.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import apache_beam as beam
from apache_beam.options.pipeline_options import StandardOptions

from mbc_core.bank import (
    Bank,
    SliceId,
    Status,
    VisibleKeys,
    begin_slice,
    drop_folded_statistics,
    finished_slices,
)
from mbc_core.bank.codebooks import version_rows
from mbc_core.bank.recheck import JudgedAt
from mbc_core.bank.replay import PER_WINDOW, KeptPriorities
from mbc_core.errors import DamagedFile, LostRace, MbcError, UsageError
from pipelines.graph import Job, Share, build_distributed, build_slice, options_of, run
from pipelines.memory import give_memory_back, keep_memory_flat
from pipelines.opening import Opened, job_of, open_bank
from pipelines.options import IngestSettings, parse_arguments
from pipelines.plan import Judged, Plan, Slice, Spill, deal_out, make_plan
from pipelines.progress import Report, report
from pipelines.read import StagedBatches, drop_duplicates
from pipelines.readers import Record, read_source
from pipelines.records import DeadLetters, Tally, require_whole
from pipelines.sink import write_slice
from pipelines.sources import STDIN, Found, Source, find_sources, open_store
from pipelines.staging import read_rows, staging_errors, staging_folder

_LOCAL_RUNNERS = ("fnapirunner", "directrunner", "bundlebaseddirectrunner")
_WHOLE = "all"
_ATTEMPTS = 6


def run_ingest(
    sources: Sequence[str],
    bank: str,
    settings: IngestSettings | None = None,
    *,
    beam_args: Sequence[str] = (),
    show_progress: bool | None = None,
    stdin: IO[bytes] | None = None,
    records: Iterable[Record] | None = None,
) -> dict[str, Any]:
    """Ingest documents into a bank, making the bank when there is none.

    Args:
        sources: files, folders, globs, ``s3://…``, ``gs://…``, or ``-`` for JSON Lines on standard input.
        bank: local path, ``s3://…`` or ``gs://…``.
        settings: everything else; the defaults when None.
        beam_args: Beam's options, for example ``["--direct_running_mode=multi_processing", …]``.
        show_progress: on standard error; None shows it on terminals only.
        stdin: read for ``-``.
        records: checked documents to ingest instead of sources, which then is empty; on this machine only.

    Returns:
        The keys of ``schemas.results.IngestResult`` (counts of this ingest id, in documents, from the ledger), and
        ``documents_in, dead_letters_by_reason, slices, slices_skipped, passed_over``.

    Raises:
        UsageError: sources or settings that cannot be, or a bank made with other settings.
        StorageError: a disk is full, or something may not be read or written.
        MbcError: counts that do not add up, and other errors of the family.
    """
    began = time.monotonic()
    keep_memory_flat()
    settings = settings or IngestSettings()
    found = find_sources(sources) if records is None else Found((), ())
    options = options_of(beam_args)
    opened = open_bank(bank, settings)
    read = records if records is not None else _read_all(found.sources, stdin)
    if (options.view_as(StandardOptions).runner or "").lower().rpartition(".")[2] in _LOCAL_RUNNERS:
        outcome = _run_slices(read, opened, settings, beam_args, show_progress)
    else:
        outcome = _run_distributed(found, opened, settings, beam_args)
    return _result(opened.bank, outcome, found, time.monotonic() - began)


# ------------------------------------------------------------------------------------------------------ local slices


@dataclass(frozen=True)
class _Outcome:
    """Which ledger rows make up the run, and how many records it saw (None: the workers counted)."""

    ingest_id: str
    names: frozenset[str] | None
    documents_in: int | None
    slices: int
    skipped: int
    finished_before: frozenset[str]


def _read_all(sources: Iterable[Source], stdin: IO[bytes] | None) -> Iterator[Record]:
    for source in sources:
        yield from read_source(source, stdin)


def _run_slices(
    records: Iterable[Record],
    opened: Opened,
    settings: IngestSettings,
    beam_args: Sequence[str],
    show_progress: bool | None,
) -> _Outcome:
    manifest = opened.bank.manifest
    with staging_folder(settings.staging) as folder, report(show_progress) as shown:
        spill = Spill(folder, manifest.salt, manifest.window_seconds)
        spill.read(records, shown.read)
        spill.finish()
        chosen = _choose_run(opened.bank, spill, settings)
        deal_out(spill, chosen.plan, chosen.finished)
        runner = _SliceRunner(job_of(opened, settings), chosen, settings, tuple(beam_args), shown)
        runner.run_all()
    plan, finished = chosen.plan, chosen.finished
    skipped = sum(one.name in finished for one in plan.slices)
    return _Outcome(
        chosen.ingest_id, frozenset(plan.names), plan.documents_in, len(plan.slices), skipped, frozenset(finished)
    )


@dataclass(frozen=True)
class _Chosen:
    """The run to do: its name and plan, its finished commits, and what the bank shows right now.

    ``judged`` names the moment of ``visible``: each commit looks again at what others have added since.
    """

    ingest_id: str
    plan: Plan
    finished: set[str]
    visible: VisibleKeys
    judged: JudgedAt


def _choose_run(bank: Bank, spill: Spill, settings: IngestSettings) -> _Chosen:
    """Name and plan the run.

    A derived name is the same for the same documents: an interrupted run is resumed, a finished one not repeated.
    But where newer revisions have replaced its documents since, ingesting them again must bring them back: that is
    another run, under the next name.
    """
    base = settings.ingest_id or _derived_id(spill.fingerprint, settings)
    judged = JudgedAt(bank.table("codes").version())  # before it is read: what comes between is looked at twice
    now = bank.visible()
    for generation in itertools.count(1):
        ingest_id = base if generation == 1 else f"{base}-{generation}"
        finished = finished_slices(bank, ingest_id)
        before = bank.visible(ignore_ingest=ingest_id) if finished else now
        plan = make_plan(spill, before, settings.slice_documents)
        chosen = _Chosen(ingest_id, plan, finished, now, judged)
        if settings.ingest_id or plan.names - finished:
            return chosen
        if (now.status(plan.keys, plan.hashes) == Status.DUPLICATE).all():
            return chosen  # all done before, and still what the bank shows
    raise AssertionError("itertools.count ends only by a return")


def _derived_id(fingerprint: str, settings: IngestSettings) -> str:
    replay = PER_WINDOW if settings.replay_per_window is None else settings.replay_per_window
    told = f"{fingerprint}/{settings.slice_documents}/{settings.keep_text}/{replay}"
    return f"run-{hashlib.blake2b(told.encode(), digest_size=8).hexdigest()}"


class _SliceRunner:
    """Runs the slices of one run, each durable before the next."""

    def __init__(
        self, job: Job, chosen: _Chosen, settings: IngestSettings, beam_args: tuple[str, ...], shown: Report
    ) -> None:
        self._job, self._chosen, self._settings = job, chosen, settings
        self._beam_args, self._shown = beam_args, shown
        self._head = -1

    def run_all(self) -> None:
        """Commit what the plan judged, then run slice after slice; finished ones are passed over."""
        plan, finished = self._chosen.plan, self._chosen.finished
        for judged in plan.judged:
            if judged.name not in finished:
                self._commit_judged(judged)
        done = sum(one.documents for one in plan.slices if one.name in finished)
        self._shown.start_encoding(sum(one.documents for one in plan.slices), done)
        for one in plan.slices:
            if one.name not in finished:
                self._run_slice(one)
                done += one.documents
                self._shown.slice_done(done)

    def _commit_judged(self, judged: Judged) -> None:
        letters = None if judged.path is None else DeadLetters(read_rows(judged.path))
        write_slice(self._job.bank, self._begin(judged.name), None, judged.tallies, letters)

    def _run_slice(self, one: Slice) -> None:
        rows, tallies = drop_duplicates(read_rows(one.path), self._chosen.visible)
        if rows.num_rows:
            path = one.path.with_suffix(".batches")
            with staging_errors(path):
                staged = StagedBatches.write(path, rows, self._settings.batch_documents)
            self._run_until_done(one, staged, tallies)
            staged.remove()
        else:
            write_slice(self._job.bank, self._begin(one.name), None, tallies)
        one.path.unlink()
        self._forget_folded()
        give_memory_back()

    def _run_until_done(self, one: Slice, staged: StagedBatches, tallies: Sequence[Tally]) -> None:
        """Run the graph again when another process came between; at most a few times."""
        for attempt in range(_ATTEMPTS):
            if one.name in finished_slices(self._job.bank, self._chosen.ingest_id):
                return  # by another process that runs the same command
            try:
                return self._run_graph(one, staged, tallies)
            except LostRace:
                if attempt == _ATTEMPTS - 1:
                    raise
                time.sleep(0.2 * 2**attempt)  # go on from the codebook version that the other run published
            except DamagedFile:
                # Files that were not committed yet are gone: `mbc forget` found a document of its own in them.
                if attempt:
                    raise

    def _run_graph(self, one: Slice, staged: StagedBatches, tallies: Sequence[Tally]) -> None:
        share = Share(self._begin(one.name), one.continues, self._replay_floors(one), self._chosen.judged)
        pipeline = beam.Pipeline(options=options_of(self._beam_args))
        build_slice(pipeline, staged, tallies, self._job, share)
        run(pipeline)

    def _begin(self, name: str) -> SliceId:
        return begin_slice(self._job.bank, self._chosen.ingest_id, name)

    def _replay_floors(self, one: Slice) -> Mapping[str, int]:
        """What the samples of this slice's windows can still take, after the slices before it."""
        if not self._job.rule.replay:
            return {}
        kept = KeptPriorities(self._job.bank.replay_policy().per_window)
        kept.load(self._job.bank, one.parts)
        return kept.floors()

    def _forget_folded(self) -> None:
        """Delete statistics files that a new codebook version has taken in."""
        head = max(version_rows(self._job.bank))
        if head != self._head:
            self._head = head
            drop_folded_statistics(self._job.bank, self._job.bank.codebook(head).last_window)


# ------------------------------------------------------------------------------------------------------- distributed


def _run_distributed(found: Found, opened: Opened, settings: IngestSettings, beam_args: Sequence[str]) -> _Outcome:
    """One pipeline that reads its sources itself and makes one commit."""
    ingest_id = settings.ingest_id or _id_from_listing(found.sources, settings)
    judged = JudgedAt(opened.bank.table("codes").version())
    share = Share(begin_slice(opened.bank, ingest_id, _WHOLE), judged=judged)
    finished = finished_slices(opened.bank, ingest_id)
    if _WHOLE not in finished:
        pipeline = beam.Pipeline(options=options_of(beam_args))
        build_distributed(pipeline, found.sources, job_of(opened, settings), share)
        run(pipeline)
    return _Outcome(ingest_id, None, None, 1, int(_WHOLE in finished), frozenset(finished))


def _id_from_listing(sources: Iterable[Source], settings: IngestSettings) -> str:
    """Workers read the files, so the name comes from their paths, sizes and times of change."""
    told = []
    for one in sources:
        if one.path == STDIN:
            raise UsageError(
                "standard input cannot be read by distributed workers",
                value=one.path,
                cause="the runner runs on other machines",
                fix="write the documents to the store and name the file",
            )
        address = one.path if "://" in one.path else f"file://{Path(one.path).absolute()}"
        filesystem, inner = open_store(address)
        info = filesystem.get_file_info(inner)
        told.append(f"{one.path} {info.size} {info.mtime_ns}")
    return _derived_id(hashlib.blake2b("\n".join(told).encode()).hexdigest(), settings)


# ----------------------------------------------------------------------------------------------------------- results


def _result(bank: Bank, outcome: _Outcome, found: Found, seconds: float) -> dict[str, Any]:
    """The counts of this run, from the ledger; they must add up to what was read."""
    rows = [
        row
        for row in bank.read("ledger").to_pylist()
        if row["ingest_id"] == outcome.ingest_id and (outcome.names is None or row["slice"] in outcome.names)
    ]
    total = total_of(rows)
    if outcome.documents_in is not None and total.documents_in != outcome.documents_in:
        raise not_all_in_the_ledger(outcome.documents_in, total.documents_in)
    return {
        **counted(bank, outcome.ingest_id, rows, total, _encoded_now(outcome, rows), seconds),
        "slices": outcome.slices,
        "slices_skipped": outcome.skipped,
        "passed_over": list(found.passed_over),
    }


def counted(
    bank: Bank, ingest_id: str, rows: Sequence[Mapping[str, Any]], total: Tally, encoded: int, seconds: float
) -> dict[str, Any]:
    """What every ingest tells, batch or stream, from its rows of the ledger; ``encoded``: documents of this process."""
    return {
        "ingest_id": ingest_id,
        "documents": total.documents,
        "passages": total.passages,
        "duplicates": total.duplicates,
        "replaced": total.replaced,
        "dead_letters": sum(total.dead_letters.values()),
        "windows": len({row["window"] for row in rows if row["documents"]}),
        "codebook_version": max(version_rows(bank)),
        "seconds": round(seconds, 3),
        "documents_per_second": round(encoded / max(seconds, 1e-9), 2),
        "documents_in": total.documents_in,
        "dead_letters_by_reason": dict(total.dead_letters),
    }


def not_all_in_the_ledger(read: int, held: int) -> MbcError:
    """Documents were read that no row of the ledger counts, or counted twice."""
    return MbcError(
        "the ledger does not hold every document that was read",
        value=f"{read} read, {held} in the ledger",
        cause="a commit is missing or was made twice: this is a defect of the program",
        fix="run the same command again, and report it with this message",
    )


def total_of(rows: Iterable[Mapping[str, Any]]) -> Tally:
    """The sum of some rows of the ledger.

    Raises:
        MbcError: documents seen are not all accounted for.
    """
    total = Tally("")
    for row in rows:
        counts = {name: row[name] for name in ("documents_in", "documents", "passages", "duplicates", "replaced")}
        total += Tally("", **counts, dead_letters=json.loads(row["dead_letters"]))
    require_whole([total])
    return total


def _encoded_now(outcome: _Outcome, rows: Iterable[dict[str, Any]]) -> int:
    """Documents that this very process made visible."""
    return sum(row["documents"] for row in rows if row["slice"] not in outcome.finished_before)


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m pipelines.ingest``: 0 done, 1 failed, 2 wrong use."""
    try:
        given = parse_arguments(sys.argv[1:] if argv is None else argv)
        if given.streaming is None:
            result = run_ingest(given.sources, given.bank, given.settings, beam_args=given.beam_args)
        else:
            from pipelines.streaming import stream

            result = stream(given.sources, given.bank, given.settings, given.streaming, beam_args=given.beam_args)
    except MbcError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted: finished slices are kept; the same command goes on from here", file=sys.stderr)
        return 1
    shown = json.dumps(result) if given.as_json else "\n".join(f"{name}: {value}" for name, value in result.items())
    print(shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
