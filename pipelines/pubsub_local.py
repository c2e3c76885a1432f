"""The local runner's Pub/Sub reader, made patient: in place of the one that the runner itself puts in.

The local runner replaces ``ReadFromPubSub`` by a reader of its own, which

- acknowledges messages when it pulls them: a crash would lose all that no window has committed yet;
- waits up to 30 seconds for a message, blocks every timer meanwhile, and fails on the fourth deadline in a row;
- ends the stream over one event-time attribute that is not a time;
- holds the watermark at the wall clock, so that whatever waited in the subscription is late;
- never ends.

Here a message is acknowledged when the window that holds it has been committed; until then its lease is renewed, and
after a crash it is delivered again. What was committed already is then a duplicate, so each document is stored once.
The pull and the parsing stay Beam's.
"""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import apache_beam as beam
from apache_beam.pipeline import PTransformOverride
from apache_beam.runners.direct.direct_runner import _DirectReadFromPubSub
from apache_beam.runners.direct.transform_evaluator import TransformEvaluatorRegistry, _PubSubReadEvaluator
from apache_beam.runners.direct.util import TransformResult
from apache_beam.runners.direct.watermark_manager import WatermarkManager
from google.api_core import exceptions
from google.pubsub_v1 import types

from mbc_core.errors import BadDocument
from pipelines.live import Drain, SourceCounts, timestamp
from pipelines.pubsub import BAD_TIME, check_message, event_time_of, refused
from pipelines.readers import Rejected

PULL_MESSAGES = 256
"""Most messages of one pull; Beam's ten would leave the encoder's batches almost empty."""

PULL_SECONDS = 2.0
SAMPLE_SECONDS = 60.0
"""The watermark of a busy subscription stands at the oldest event time of this long; Beam's Java reader does so too."""

LEASE_SECONDS, RENEW_SECONDS = 600, 60.0
"""How long a message is held at a time (the service's most), and how often that is asked for."""

_ACK_IDS = 1000
_MOMENT = 0.5
_PASSING = (
    exceptions.Aborted,
    exceptions.InternalServerError,
    exceptions.ResourceExhausted,
    exceptions.ServiceUnavailable,
    exceptions.TooManyRequests,
    exceptions.Unknown,
)
"""Trouble that passes by itself."""


class MessageStream:
    """What the local reader needs to know between two pulls: watermark, leases, and when to end.

    Args:
        window_seconds: length of the graph's windows. idle_exit: seconds without a message after which the stream
            ends; None never. drain: how it is told to end. say: gets a line when the service is in trouble.
    """

    def __init__(
        self, window_seconds: int, idle_exit: float | None, drain: Drain, say: Callable[[str], None] = print
    ) -> None:
        self._window, self._idle_exit, self._drain, self._say = window_seconds * 1_000_000, idle_exit, drain, say
        self.counts = SourceCounts()
        self.name = uuid.uuid4().hex
        self._samples: deque[tuple[float, int]] = deque()
        self._began = time.monotonic()
        self._idle_since: float | None = None
        self._trouble = ""
        self.leases = Leases()

    def ended(self) -> bool:
        """Called when the pipeline is idle: everything pulled so far is in its window, closed windows are committed."""
        mark = self.counts.passed = self.counts.watermark
        if mark is not None:
            self.leases.release(mark)
        self.leases.renew()
        idle = None if self._idle_since is None else time.monotonic() - self._idle_since
        return self._drain.level > 0 or (self._idle_exit is not None and idle is not None and idle >= self._idle_exit)

    def pulled(self, times: Sequence[int], began: float) -> None:
        """Move the watermark after a pull that was answered.

        Args:
            times: event times of its messages, microseconds. began: seconds since the epoch at which it was sent.
        """
        self._trouble = ""
        now = time.monotonic()
        self.counts.records += len(times)
        if times:
            self._idle_since = None
            self._samples.append((now, min(times)))
            while now - self._samples[0][0] > SAMPLE_SECONDS:
                self._samples.popleft()
            if self.counts.watermark is not None or now - self._began > SAMPLE_SECONDS:
                self._advance(min(oldest for _, oldest in self._samples))
        else:  # nothing waits: what is published from now on is new
            self._idle_since = now if self._idle_since is None else self._idle_since
            self._samples.clear()
            self._advance(round(began * 1e6))

    def trouble(self, error: Exception) -> None:
        """The service did not answer; told once, tried again."""
        if str(error) != self._trouble:
            self._say(f"the subscription did not answer: {error}. It is asked again.")
        self._trouble = str(error)
        time.sleep(_MOMENT)

    def lease(self, ack_id: str, event_time: int) -> None:
        """A message stays ours until the window that holds ``event_time`` has been committed."""
        self.leases.add(ack_id, (event_time // self._window + 1) * self._window)

    def _advance(self, to: int) -> None:
        self.counts.watermark = to if self.counts.watermark is None else max(to, self.counts.watermark)


class Leases:
    """Messages that were pulled and must not be acknowledged yet. One thread at a time, and at the end another one."""

    def __init__(self) -> None:
        self._held: dict[str, int] = {}
        self._renewed = time.monotonic()
        self._client: Any = None
        self._subscription = ""

    def __len__(self) -> int:
        return len(self._held)

    def connect(self, client: Any, subscription: str) -> None:  # noqa: ANN401 - google.cloud.pubsub's client
        """How to acknowledge and renew."""
        self._client, self._subscription = client, subscription

    def add(self, ack_id: str, until: int) -> None:
        """Hold a message until the watermark has passed ``until`` (microseconds) and the pipeline was idle since."""
        self._held[ack_id] = until

    def release(self, watermark: int | None) -> None:
        """Acknowledge what ended at or before ``watermark``; None: everything."""
        done = [ack_id for ack_id, until in self._held.items() if watermark is None or until <= watermark]
        for some in _chunks(done):
            self._client.acknowledge(subscription=self._subscription, ack_ids=some)
            for ack_id in some:
                del self._held[ack_id]

    def renew(self) -> None:
        """Ask for more time for what is held, every minute or so."""
        if self._held and time.monotonic() - self._renewed >= RENEW_SECONDS:
            for some in _chunks(list(self._held)):
                self._client.modify_ack_deadline(
                    subscription=self._subscription, ack_ids=some, ack_deadline_seconds=LEASE_SECONDS
                )
            self._renewed = time.monotonic()

    def take(self, ack_ids: Sequence[str]) -> None:
        """The first lease of fresh messages: the subscription's own deadline may be ten seconds."""
        for some in _chunks(list(ack_ids)):
            self._client.modify_ack_deadline(
                subscription=self._subscription, ack_ids=some, ack_deadline_seconds=LEASE_SECONDS
            )


def _chunks(ack_ids: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(ack_ids), _ACK_IDS):
        yield ack_ids[start : start + _ACK_IDS]


class _PatientClient:
    """Beam's client: does not wait long, does not stumble over a bad event time, and leases instead of acknowledging.

    Args:
        client: google.cloud.pubsub's. stream: whom it tells. attribute: names the event time.
    """

    def __init__(self, client: Any, stream: MessageStream, attribute: str | None) -> None:  # noqa: ANN401
        self._client, self._stream, self._attribute = client, stream, attribute
        self.answered = False
        self.ack_ids: list[str] = []

    def pull(self, subscription: str, **_: object) -> Any:  # noqa: ANN401 - google.cloud.pubsub's response
        """Up to ``PULL_MESSAGES``; nothing after ``PULL_SECONDS``, or when the service is in trouble.

        Raises:
            StorageError: trouble that does not pass by itself.
        """
        self._stream.leases.connect(self._client, subscription)
        try:
            response = self._client.pull(
                subscription=subscription, max_messages=PULL_MESSAGES, timeout=PULL_SECONDS, retry=None
            )
        except exceptions.DeadlineExceeded:
            self.answered = True
            return types.PullResponse()
        except _PASSING as error:
            self._stream.trouble(error)
            return types.PullResponse()
        except exceptions.GoogleAPICallError as error:
            raise refused(subscription, error) from error
        self.answered = True
        for received in response.received_messages:
            _mend_event_time(received.message.attributes, self._attribute)
        return response

    def acknowledge(self, subscription: str, ack_ids: Sequence[str]) -> None:
        """The messages of the last pull are held until their windows are committed."""
        self._stream.leases.take(ack_ids)
        self.ack_ids = list(ack_ids)


def _mend_event_time(attributes: Any, attribute: str | None) -> None:  # noqa: ANN401 - a protobuf map
    """An event time as Beam's parser wants it; one that is none is kept under another name, for its dead letter."""
    if attribute is None or attribute not in attributes:
        return
    value = attributes[attribute]
    try:
        micros = event_time_of(value)
    except BadDocument:
        micros = None
    del attributes[attribute]
    if micros is None:
        attributes[BAD_TIME] = value
    else:
        attributes[attribute] = str(micros // 1000)


class _DrainableRead(_DirectReadFromPubSub):  # type: ignore[misc]
    """What the local runner reads instead of Beam's replacement for ReadFromPubSub."""

    def __init__(self, source: Any, name: str) -> None:  # noqa: ANN401 - Beam's _PubSubSource
        super().__init__(source)
        self.name = name

    def to_runner_api_parameter(self, context: object) -> tuple[str, Any]:
        found: tuple[str, Any] = self.to_runner_api_pickled(context)
        return found


class _DrainableEvaluator(_PubSubReadEvaluator):  # type: ignore[misc]
    """Beam's evaluator: the pull and the parsing are its own; watermark, leases and the end are ours."""

    def _get_subscriber_client(self, transform: object) -> _PatientClient:
        return self._patient

    def finish_bundle(self) -> TransformResult:
        stream = _STREAMS[self._applied_ptransform.transform.name]
        attribute = self.source.timestamp_attribute
        self._patient = _PatientClient(super()._get_subscriber_client(self._applied_ptransform), stream, attribute)
        if stream.ended():
            return TransformResult(self, [], [], None, {None: WatermarkManager.WATERMARK_POS_INF})
        began = time.time()
        result = super().finish_bundle()
        messages = [one for bundle in result.uncommitted_output_bundles for one in bundle.get_elements_iterable()]
        times = [_own_time(one.value, attribute, one.timestamp.micros) for one in messages]
        for ack_id, event_time in zip(self._patient.ack_ids, times, strict=True):
            stream.lease(ack_id, event_time)
        if self._patient.answered:
            stream.pulled(times, began)
        mark = stream.counts.watermark
        hold = WatermarkManager.WATERMARK_NEG_INF if mark is None else timestamp(mark)
        result.keyed_watermark_holds = {None: hold}
        return result


def _own_time(message: Any, attribute: str | None, moment: int) -> int:  # noqa: ANN401 - Beam's PubsubMessage
    """Event time of the document in a message, microseconds; ``moment`` where it has none."""
    record = check_message(message.data, message.attributes, attribute, "")
    return moment if isinstance(record, Rejected) or record.event_time is None else record.event_time


class _Override(PTransformOverride):  # type: ignore[misc]
    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def matches(self, applied_ptransform: Any) -> bool:  # noqa: ANN401 - Beam's node
        return isinstance(applied_ptransform.transform, beam.io.ReadFromPubSub)

    def get_replacement_transform_for_applied_ptransform(self, applied_ptransform: Any) -> beam.PTransform:  # noqa: ANN401
        return _DrainableRead(applied_ptransform.transform._source, self._name)


_STREAMS: dict[str, MessageStream] = {}
TransformEvaluatorRegistry._test_evaluators_overrides[_DrainableRead] = _DrainableEvaluator


@contextmanager
def drainable(pipeline: beam.Pipeline, stream: MessageStream) -> Iterator[None]:
    """Have the local runner read the pipeline's subscription as this module's text says, while the context lasts.

    When the context ends without an error everything has been committed, and what is held is acknowledged.
    """
    _STREAMS[stream.name] = stream
    try:
        pipeline.replace_all([_Override(stream.name)])
        yield
        stream.leases.release(None)
    finally:
        del _STREAMS[stream.name]
