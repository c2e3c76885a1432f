"""A live source for the local streaming runner that sets its own watermark and can be asked to end.

The runner offers none: it reads a splittable DoFn with the watermark at minus infinity until the DoFn ends (every
window would fire at the end of the stream) and without pause, rejects PeriodicImpulse, and holds the watermark of its
Pub/Sub reader at the wall clock, so that every document with a date would be late. ``MatchContinuously`` polls once
with deduplication, and emits every file at each poll without. So :class:`ReadLive` is a primitive of its own, with an
evaluator registered beside the runner's own ones: at each call the source says what is new, up to when everything
has been said, and whether it has ended. When it has, the watermark goes to the end of time, every open window fires,
and the pipeline is done.

Beam is pinned exactly, and ``tests/pipelines/test_streaming_live.py`` fails if the hook moves.
"""

from __future__ import annotations

import logging
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import apache_beam as beam
from apache_beam import pvalue
from apache_beam.runners.direct.transform_evaluator import TransformEvaluatorRegistry, _TransformEvaluator
from apache_beam.runners.direct.util import TransformResult
from apache_beam.runners.direct.watermark_manager import WatermarkManager
from apache_beam.transforms.window import GlobalWindows
from apache_beam.utils.timestamp import MAX_TIMESTAMP, MIN_TIMESTAMP, Timestamp

from mbc_core.errors import MbcError

STREAM_RUNNER = "BundleBasedDirectRunner"
"""Pinned: it is what ``DirectRunner --streaming`` runs on, without first trying to download another engine."""


@dataclass(frozen=True, slots=True)
class Step:
    """What a source says at one call.

    Attributes:
        elements: (event time in microseconds, element), all from now on downstream's.
        watermark: microseconds; nothing older will follow. None: nothing is promised yet.
        done: nothing at all will follow.
    """

    elements: Sequence[tuple[int, Any]] = ()
    watermark: int | None = None
    done: bool = False


class LiveSource(Protocol):
    """Where the elements of :class:`ReadLive` come from, in the process that runs the pipeline."""

    def step(self) -> Step:
        """Called whenever the pipeline has nothing else to do, by one thread; waits a moment when nothing is new."""
        ...


class Drain:
    """How a running stream is asked to end: first gently, then at once. Safe to use in signal handlers.

    Attributes:
        level: 0 goes on; 1 looks a last time and finishes what was found; 2 leaves what is not on its way yet.
    """

    def __init__(self) -> None:
        self.level = 0

    def ask(self) -> int:
        """Ask to end, or to end sooner; returns the level. No lock is taken: a signal may interrupt another one."""
        self.level = min(self.level + 1, 2)
        return self.level


@dataclass
class SourceCounts:
    """What a source has done so far, for the progress line and the last check.

    Attributes:
        files: read, changed ones again. records: handed on. waiting: read, not handed on yet. open_files: found, but
            not read yet. left: files that the end left for the next run. watermark: microseconds, None before the
            first look. passed: the watermark that everything handed on before has reached.
    """

    files: int = 0
    records: int = 0
    waiting: int = 0
    open_files: int = 0
    left: tuple[str, ...] = ()
    watermark: int | None = None
    passed: int | None = None


class _Once:
    """A source that failed stays failed: the runner tries a bundle four times, and a source has moved on by then."""

    def __init__(self, source: LiveSource) -> None:
        self._source = source
        self._failed: Exception | None = None

    def step(self) -> Step:
        if self._failed is not None:
            raise self._failed
        try:
            return self._source.step()
        except Exception as error:
            self._failed = error
            raise


_SOURCES: dict[str, LiveSource] = {}


class ReadLive(beam.PTransform):
    """Elements of a registered source, unbounded, with the timestamps and the watermark that it sets.

    Args:
        name: as :func:`registered` gave it; the transform itself may be pickled, the source stays where it is.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def expand(self, pbegin: pvalue.PBegin) -> beam.PCollection[Any]:
        """A primitive: evaluated below."""
        return beam.PCollection(pbegin.pipeline, is_bounded=False)

    def get_windowing(self, inputs: object) -> beam.Windowing:
        """The global window."""
        return beam.Windowing(GlobalWindows())

    def to_runner_api_parameter(self, context: object) -> tuple[str, Any]:
        """Pickled, as Beam's own ReadFromPubSub is: the runner knows it by its class."""
        found: tuple[str, Any] = self.to_runner_api_pickled(context)
        return found


@contextmanager
def registered(source: LiveSource) -> Iterator[ReadLive]:
    """The transform that reads ``source`` while the context lasts."""
    name = uuid.uuid4().hex
    _SOURCES[name] = _Once(source)
    try:
        yield ReadLive(name)
    finally:
        del _SOURCES[name]


def timestamp(microseconds: int) -> Timestamp:
    """Beam's time, kept inside what its windows can hold."""
    inside = Timestamp(micros=microseconds)
    return min(max(inside, MIN_TIMESTAMP + _DAY), MAX_TIMESTAMP - _DAY)


_DAY = 86_400


class _ReadLiveEvaluator(_TransformEvaluator):  # type: ignore[misc]
    """Asks the source once; the empty bundle left over makes the runner come back when it is idle."""

    def process_element(self, element: object) -> None:
        """The bundles of this transform are empty."""

    def finish_bundle(self) -> TransformResult:
        step = _SOURCES[self._applied_ptransform.transform.name].step()
        bundles = []
        if step.elements:
            bundles = [self._evaluation_context.create_bundle(next(iter(self._outputs)))]
            for time, element in step.elements:
                bundles[0].output(GlobalWindows.windowed_value(element, timestamp=timestamp(time)))
        if step.done:
            return TransformResult(self, bundles, [], None, {None: WatermarkManager.WATERMARK_POS_INF})
        again = self._evaluation_context.create_bundle(pvalue.PBegin(self._applied_ptransform.transform.pipeline))
        hold = WatermarkManager.WATERMARK_NEG_INF if step.watermark is None else timestamp(step.watermark)
        return TransformResult(self, bundles, [again], None, {None: hold})


TransformEvaluatorRegistry._test_evaluators_overrides[ReadLive] = _ReadLiveEvaluator


class _NoExpectedTracebacks(logging.Filter):
    """The runner prints a traceback at each of four attempts; our own errors are raised with all they have to say."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not isinstance(sys.exc_info()[1], MbcError) and "A task failed with exception" not in record.msg


logging.getLogger("apache_beam.runners.direct.executor").addFilter(_NoExpectedTracebacks())
