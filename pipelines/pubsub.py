"""Documents from a Pub/Sub subscription: one message, one JSON document, with its event time in an attribute.

On Dataflow this is Beam's ``ReadFromPubSub`` as it is; locally :mod:`pipelines.pubsub_local` reads for it. The extra
``mbc[gcp]`` is needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import apache_beam as beam
from apache_beam import pvalue
from apache_beam.io.gcp.pubsub import parse_subscription
from apache_beam.transforms.window import TimestampedValue

from mbc_core.errors import BadDocument, StorageError, UsageError
from pipelines.live import timestamp
from pipelines.readers import MAX_RAW_BYTES, Record, Rejected
from schemas.document import document_from_bytes, parse_timestamp

SCHEME = "pubsub://"

_YEAR_1, _YEAR_10000 = -62_135_596_800_000, 253_402_300_800_000
BAD_TIME = "mbc-bad-event-time"
"""Attribute that carries an event time which is not one, past Beam's parser, to its dead letter."""


def subscription_of(source: str) -> str:
    """``pubsub://projects/P/subscriptions/S`` → ``projects/P/subscriptions/S``.

    Raises:
        UsageError: anything else.
    """
    path = source.removeprefix(SCHEME)
    cause = "a topic keeps nothing for a reader that is not there; a subscription does"
    try:
        parse_subscription(path)
        if path.count("/") == 3:
            return path
    except ValueError as error:
        cause = cause if "/topics/" in path else str(error)
    raise UsageError(
        "the Pub/Sub source is not a subscription",
        value=source,
        cause=cause,
        fix="make one (gcloud pubsub subscriptions create S --topic T) and write pubsub://projects/P/subscriptions/S",
    )


class ReadMessages(beam.PTransform):
    """A subscription → records with event timestamps, the same records that files give.

    Args:
        subscription: ``projects/P/subscriptions/S``.
        event_time_attribute: attribute that holds the event time (RFC 3339, or milliseconds since the epoch). It
            counts before a document's own ``timestamp``; without it, and without one of the document's own, a
            document arrives when it was published.
    """

    def __init__(self, subscription: str, event_time_attribute: str | None = None) -> None:
        super().__init__()
        self.subscription, self.event_time_attribute = subscription, event_time_attribute

    def expand(self, pbegin: pvalue.PBegin) -> beam.PCollection[Record]:
        """Beam's reader, then one DoFn."""
        read = beam.io.ReadFromPubSub(
            subscription=self.subscription, with_attributes=True, timestamp_attribute=self.event_time_attribute
        )
        return (
            pbegin
            | "ReadFromPubSub" >> read
            | "CheckMessage" >> beam.ParDo(_CheckMessageDoFn(f"{SCHEME}{self.subscription}", self.event_time_attribute))
        )


class _CheckMessageDoFn(beam.DoFn):
    def __init__(self, source: str, attribute: str | None) -> None:
        self._source, self._attribute = source, attribute

    def process(self, element: Any, moment: Any = beam.DoFn.TimestampParam) -> Iterator[Any]:  # noqa: ANN401
        record = check_message(element.data, element.attributes or {}, self._attribute, self._source)
        own = None if isinstance(record, Rejected) else record.event_time
        yield TimestampedValue(record, moment if own is None else timestamp(own))


def check_message(data: bytes, attributes: dict[str, str], attribute: str | None, source: str) -> Record:
    """One message → a checked document, or why it is none.

    Args:
        attribute: names the event time; source: for the dead letter.
    """
    try:
        document = document_from_bytes(data or b"")
        if BAD_TIME in attributes:
            parse_timestamp(attributes[BAD_TIME] or "(empty)")
        event_time = event_time_of(attributes.get(attribute)) if attribute is not None else None
        return document if event_time is None else replace(document, event_time=event_time)
    except BadDocument as error:
        return Rejected(error.reason, str(error), source, 0, (data or b"")[:MAX_RAW_BYTES])


def event_time_of(value: str | None) -> int | None:
    """Milliseconds since the epoch, or ISO 8601 → microseconds.

    Raises:
        BadDocument: neither, or outside the years 1 to 9999.
    """
    if value is None or not re.fullmatch(r"-?[0-9]+", value):
        return parse_timestamp(value)
    if not _YEAR_1 <= int(value) < _YEAR_10000:
        raise BadDocument(
            "bad_timestamp",
            "the event time is outside the years 1 to 9999",
            value=value,
            cause="it is not in milliseconds since 1970",
            fix="publish milliseconds, or 2024-07-01T09:30:00Z",
        )
    return int(value) * 1000


def check_subscription(subscription: str) -> None:
    """Ask for the subscription before any work is done.

    Raises:
        UsageError: there is none of that name. StorageError: the service cannot be reached or refuses.
    """
    try:
        from google.api_core import exceptions
        from google.cloud import pubsub
    except ImportError as error:
        raise UsageError(
            "Pub/Sub cannot be read here",
            value=subscription,
            cause=f"its client is not installed ({error})",
            fix="pip install 'mbc[gcp]'",
        ) from error
    with pubsub.SubscriberClient() as client:
        try:
            client.get_subscription(subscription=subscription, timeout=20.0)
        except exceptions.NotFound as error:
            raise UsageError(
                "the subscription does not exist",
                value=subscription,
                cause="a misspelt name, or another project",
                fix="gcloud pubsub subscriptions create …, or check the name",
            ) from error
        except exceptions.PermissionDenied:
            return  # a subscriber may pull without being allowed to look; the first pull will tell
        except (exceptions.GoogleAPICallError, exceptions.RetryError) as error:
            raise refused(subscription, error) from error


def refused(subscription: str, error: Exception) -> StorageError:
    """The service said no."""
    return StorageError(
        "the subscription cannot be read",
        value=subscription,
        cause=str(error),
        fix="check the network, GOOGLE_APPLICATION_CREDENTIALS and the role roles/pubsub.subscriber",
    )
