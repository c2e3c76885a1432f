"""The one graph of every ingest: encode → quantize → codebook-update → write, whoever reads and whoever runs it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.runner import PipelineResult

from mbc_core import errors
from mbc_core.bank import Bank, SliceId
from mbc_core.bank.recheck import JudgedAt
from mbc_core.codebook.update import UpdateRule
from mbc_core.codes import Rotation
from mbc_core.errors import MbcError
from pipelines.codebook_store import BankCodebooks
from pipelines.encoding import EncoderSource
from pipelines.plain import EncodeRule
from pipelines.read import Read, ReadDocuments, ReadStaged, StagedBatches
from pipelines.records import Tally
from pipelines.sources import Source
from pipelines.spill import Spill
from pipelines.transforms import Encode, Quantize, UpdateCodebook, WriteCodes

LOCAL_RUNNER = "FnApiRunner"
"""Pinned: plain DirectRunner would try to download another engine first."""


_STEP = re.compile(r" \[while running '[^']*'\]\.?")
"""What Beam appends to a worker's message."""


@dataclass(frozen=True)
class Job:
    """What the graph needs to know, the same for every slice of a run.

    Attributes:
        bank: opened. encoder: loaded by the workers. rotation: R.
        rule: what is kept of a document. update_rule: when the codebook is updated; the default when None.
        shards: files a table and commit.
    """

    bank: Bank
    encoder: EncoderSource
    rotation: Rotation
    rule: EncodeRule
    update_rule: UpdateRule | None = None
    shards: int = 1


@dataclass(frozen=True)
class Share:
    """What the graph commits: one slice (or, in a stream, one window and pane).

    Attributes:
        slice_id: its name. continues: the window that goes on in the next slice.
        replay_floors: window → the greatest priority of replay rows that its sample can still take.
        judged: what its duplicates were judged against.
    """

    slice_id: SliceId
    continues: str | None = None
    replay_floors: Mapping[str, int] = field(default_factory=dict)
    judged: JudgedAt | None = None


def build(read: Read, job: Job, share: Share, spill_folder: Path | None = None) -> beam.PCollection[str]:
    """Wire the transforms behind ``read``; returns the committed slice's name.

    Args:
        spill_folder: on a disk that every worker sees: the embeddings wait there between the two passes over them.
    """
    slots = job.bank.manifest.slots
    encoded = read.batches | "Encode" >> Encode(job.encoder, job.rule)
    # From here on every step sees the same embeddings, also when a worker is lost and its bundle encoded again.
    batches = encoded.batches | "Settle" >> (beam.Reshuffle() if spill_folder is None else Spill(spill_folder))
    store = BankCodebooks(job.bank, share.slice_id, job.update_rule)
    codebooks = batches | "UpdateCodebook" >> UpdateCodebook(store, job.rotation, slots, share.continues)
    codes = batches | "Quantize" >> Quantize(codebooks, job.rotation, slots)
    letters = (read.dead_letters, encoded.dead_letters) | "DeadLetters" >> beam.Flatten()
    tallies = (read.tallies, codebooks.tallies) | "Tallies" >> beam.Flatten()
    parts = {"codes": codes, "dead_letters": letters, "tallies": tallies}
    return parts | "WriteCodes" >> WriteCodes(job.bank, share.slice_id, job.shards, share.replay_floors, share.judged)


def build_slice(
    pipeline: beam.Pipeline, staged: StagedBatches, tallies: Iterable[Tally], job: Job, share: Share
) -> beam.PCollection[str]:
    """The graph over a staged slice of a local run."""
    from pipelines.records import DeadLetters

    counted = [one.to_bytes() for one in tallies]
    read = Read(
        pipeline | "ReadStaged" >> ReadStaged(staged),
        pipeline | "NoDeadLetters" >> beam.Create([]).with_output_types(DeadLetters),
        pipeline
        | "PlanTallies" >> beam.Create(counted, reshuffle=False).with_output_types(bytes)
        | "ParseTallies" >> beam.Map(Tally.from_bytes).with_output_types(Tally),
    )
    return build(read, job, share, staged.spill_folder)


def build_distributed(
    pipeline: beam.Pipeline, sources: Sequence[Source], job: Job, share: Share
) -> beam.PCollection[str]:
    """The graph that reads its sources itself, for runners with many workers: one slice, one commit."""
    read = pipeline | "ReadDocuments" >> ReadDocuments(sources, job.bank, share.slice_id.ingest_id)
    return build(read, job, share)


def options_of(beam_args: Sequence[str]) -> PipelineOptions:
    """Beam's options; the local runner is pinned when no runner is named."""
    named = any(one == "--runner" or one.startswith("--runner=") for one in beam_args)
    return PipelineOptions([*beam_args, *([] if named else [f"--runner={LOCAL_RUNNER}"])])


def run(pipeline: beam.Pipeline) -> PipelineResult:
    """Run to the end; a dry run returns at once.

    Raises:
        MbcError: of the kind a worker raised, with its message; anything else as it comes.
        KeyboardInterrupt: the user stopped it; Beam reports that as an error of the step that ran.
    """
    try:
        result = pipeline.run()
        result.wait_until_finish()
    except MbcError as error:
        raise _with_message(type(error), _STEP.sub("", str(error))) from error
    except Exception as error:
        if _STEP.sub("", str(error)) == "KeyboardInterrupt":
            raise KeyboardInterrupt from None
        found = error_of(str(error))
        if found is None:
            raise
        raise found from error
    return result


class _NoExpectedTracebacks(logging.Filter):
    """Our own errors are raised with all they have to say; Beam need not print their tracebacks too."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], MbcError | KeyboardInterrupt))


logging.getLogger("apache_beam.runners.common").addFilter(_NoExpectedTracebacks())


def error_of(traceback: str) -> MbcError | None:
    """The error of our family that a worker's traceback ends with: runners pass on nothing but text."""
    found = re.findall(r"^mbc_core\.errors\.(\w+): (.*)$", traceback, re.MULTILINE)
    if not found:
        return None
    name, message = found[-1]
    return _with_message(getattr(errors, name, MbcError), _STEP.sub("", message))


def _with_message(kind: type[MbcError], message: str) -> MbcError:
    """An error whose message is complete already."""
    rebuilt = kind.__new__(kind)
    Exception.__init__(rebuilt, message)
    rebuilt.thing, rebuilt.value, rebuilt.cause, rebuilt.fix = message, None, "", ""
    return rebuilt
