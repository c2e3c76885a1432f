"""Pub/Sub, live: Beam's own reader on the local runner, against a service in this process."""

from __future__ import annotations

import json
import signal
import time
from datetime import UTC, datetime, timedelta

import pytest
from streaming_tools import World, adds_up, command, run_command, wait_for
from tiny import to_line

from mbc_core.bank import Bank
from mbc_core.errors import StorageError, UsageError
from schemas.document import Document

pytest.importorskip("google.cloud.pubsub", reason="the extra gcp")

import apache_beam as beam
import grpc
from apache_beam.options.pipeline_options import PipelineOptions
from fake_pubsub import SUBSCRIPTION, serve
from google.cloud import pubsub
from stream_run import new_bank, plan_of

from pipelines import pubsub_local
from pipelines.pubsub import ReadMessages, check_message, check_subscription, event_time_of, subscription_of
from pipelines.readers import Rejected
from pipelines.streaming import _build

SOURCE = f"pubsub://{SUBSCRIPTION}"
DAY = 86_400_000
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


@pytest.fixture
def service(monkeypatch):
    with serve() as found:
        monkeypatch.setenv("PUBSUB_EMULATOR_HOST", found.address)
        yield found


def message(name: str, text: str = "Some words.", **fields) -> bytes:
    return json.dumps({"id": name, "text": text, **fields}).encode()


def run(world, drive=None, **options):
    return world.run(drive, sources=[SOURCE], **options)


def test_event_time_comes_from_the_attribute_and_a_message_is_acknowledged_when_its_window_is_committed(world, service):
    service.publish(message("a"), published=str(3 * DAY + 5))
    service.publish(message("b", timestamp="2020-05-05"), published="1970-01-02T12:00:00Z")
    service.publish(message("c", timestamp="1970-01-09"))

    def drive():
        wait_for(lambda: len(world.visible()) == 3, "three windows")
        wait_for(lambda: len(service.acknowledged) == 3, "the acknowledgement")
        tomorrow = datetime.now(UTC) + timedelta(days=1)
        service.publish(message("open"), published=tomorrow.isoformat())
        wait_for(lambda: len(service.outstanding) == 1, "the message of a window that is still open")
        pulls = service.pulls
        wait_for(lambda: service.pulls >= pulls + 3)
        assert len(service.acknowledged) == 3, "acknowledged before it was committed"
        assert "open" not in world.visible()

    result = run(world, drive, event_time_attribute="published")
    times = {name: row["event_time"].isoformat() for name, row in world.visible().items() if name != "open"}
    assert times == {
        "a": "1970-01-04T00:00:00.005000+00:00",
        "b": "1970-01-02T12:00:00+00:00",
        "c": "1970-01-09T00:00:00+00:00",
    }
    assert {row["window"][:10] for row in world.ledger()} >= {"1970-01-04", "1970-01-02", "1970-01-09"}
    assert adds_up(result)
    assert (result["documents"], result["documents_in"]) == (4, 4)
    assert len(service.acknowledged) == 4, "the end commits every open window, and then acknowledges"
    assert len(service.renewed) >= 4, "every message was leased first"


def test_without_an_attribute_a_message_without_a_date_arrives_when_it_was_published(world, service):
    service.publish(message("undated"))
    service.publish(message("dated", timestamp="2001-01-01"))
    run(world)
    found = {name: row["event_time"].year for name, row in world.visible().items()}
    assert found == {"undated": 2027, "dated": 2001}


def test_a_message_that_is_delivered_again_is_a_duplicate(world, service):
    def drive():
        service.publish(message("a"), published=str(DAY))
        wait_for(lambda: len(world.visible()) == 1)
        service.publish(message("a"), published=str(DAY))
        wait_for(lambda: len(service.acknowledged) == 2, "the second delivery")

    result = run(world, drive, event_time_attribute="published")
    assert (result["documents"], result["duplicates"], result["documents_in"]) == (1, 1, 2)
    assert Bank.open(world.uri).read("codes").num_rows == 1


def test_bad_messages_are_dead_letters_and_the_stream_goes_on(world, service):
    for data, attributes in (
        (b"not json", {}),
        (b'{"text": "no id"}', {"published": "5"}),
        (message("when"), {"published": "yesterday"}),
        (message("far"), {"published": "99999999999999999"}),
        (b"", {"published": "5"}),
    ):
        service.publish(data, **attributes)

    def drive():
        wait_for(lambda: not service.waiting)
        service.publish(message("good"), published="5")
        wait_for(lambda: "good" in world.visible())

    result = run(world, drive, event_time_attribute="published")
    assert adds_up(result)
    assert result["dead_letters_by_reason"] == {"not_json": 2, "no_id": 1, "bad_timestamp": 2}
    rows = {row["raw"]: row for row in Bank.open(world.uri).read("dead_letter").to_pylist()}
    assert rows[b"not json"]["source"] == SOURCE
    assert "'yesterday'" in rows[message("when")]["message"]
    assert len(service.acknowledged) == 6


@pytest.mark.slow
def test_a_crash_loses_no_message(world, service):
    """Beam's local reader acknowledges what it pulls: everything in an open window would be gone."""
    for number in range(6):
        service.publish(message(f"m{number}", f"Message number {number}."))
    arguments = [SOURCE, "--bank", world.uri, "--streaming"]
    with command(world.folder, *arguments, PUBSUB_EMULATOR_HOST=service.address) as process:
        wait_for(lambda: len(service.outstanding) == 6, "the pull")
        pulls = service.pulls
        wait_for(lambda: service.pulls >= pulls + 2, "the next pulls")
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
    assert service.acknowledged == []
    assert world.visible() == {}
    service.redeliver()
    address = service.address
    code, result, err = run_command(world.folder, *arguments, "--idle-exit=1s", PUBSUB_EMULATOR_HOST=address)
    assert code == 0, err[-2000:]
    assert (result["documents"], result["documents_in"]) == (6, 6)
    assert len(world.visible()) == 6
    assert len(service.acknowledged) == 6


def test_a_service_in_trouble_or_silent_is_asked_again(world, service, monkeypatch):
    monkeypatch.setattr(pubsub_local, "PULL_SECONDS", 0.2)
    monkeypatch.setattr(pubsub_local, "_MOMENT", 0.01)
    service.failures = [grpc.StatusCode.UNAVAILABLE] * 6
    service.patience = 0.6  # every empty pull ends at the client's deadline; Beam's reader fails on the fourth

    def drive():
        wait_for(lambda: service.pulls > 12)
        service.publish(message("a"), published="5")
        wait_for(lambda: service.redeliver() or len(world.visible()) == 1)

    result = run(world, drive, event_time_attribute="published")
    assert result["documents"] == 1
    (said,) = world.said
    assert said.startswith("the subscription did not answer: ")


def test_a_service_that_refuses_ends_the_stream(world, service):
    service.failures = [grpc.StatusCode.PERMISSION_DENIED] * 40
    with pytest.raises(StorageError, match=f"the subscription cannot be read: '{SUBSCRIPTION}'"):
        run(world)


def test_the_real_publisher_reaches_the_stream(world, service):
    publisher = pubsub.PublisherClient()
    publisher.publish(
        "projects/some-project/topics/some-topic", to_line(Document("a", "Published.")), published="5"
    ).result(timeout=20)
    publisher.stop()
    assert run(world, event_time_attribute="published")["documents"] == 1


def test_leases_are_renewed_while_a_window_is_open(monkeypatch):
    calls = []

    class Client:
        def acknowledge(self, **request):
            calls.append(("acknowledge", request["ack_ids"]))

        def modify_ack_deadline(self, **request):
            calls.append((request["ack_deadline_seconds"], request["ack_ids"]))

    leases = pubsub_local.Leases()
    leases.connect(Client(), SUBSCRIPTION)
    leases.add("early", 10)
    leases.add("late", 20)
    leases.renew()
    assert calls == [], "not before it is time"
    later = time.monotonic() + 61
    monkeypatch.setattr(pubsub_local.time, "monotonic", lambda: later)
    leases.renew()
    leases.release(9)
    leases.release(10)
    leases.release(None)
    assert calls == [(600, ["early", "late"]), ("acknowledge", ["early"]), ("acknowledge", ["late"])]
    assert len(leases) == 0


def test_the_watermark_waits_for_the_backlog_then_follows_the_clock_or_the_oldest_of_a_minute(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(pubsub_local.time, "monotonic", lambda: clock[0])
    stream = pubsub_local.MessageStream(86_400, None, pubsub_local.Drain())
    stream.pulled([500], 90.0)
    stream.pulled([100], 91.0)
    assert stream.counts.watermark is None, "older ones may still wait"
    stream.pulled([], 92.0)
    assert stream.counts.watermark == 92_000_000
    stream.pulled([7, 95_000_000], 93.0)
    assert stream.counts.watermark == 92_000_000, "never back"
    for _ in range(5):
        clock[0] += 30
        stream.pulled([99_000_000], 99.0)
    assert stream.counts.watermark == 99_000_000, "busy, but nothing older came for a minute"


@pytest.mark.parametrize(
    ("value", "micros"),
    [
        ("5", 5000),
        ("-1000", -1_000_000),
        ("1970-01-01T00:00:01Z", 1_000_000),
        ("1970-01-02", 86_400_000_000),
        (None, None),
    ],
)
def test_event_times_are_milliseconds_or_iso_8601(value, micros):
    assert event_time_of(value) == micros


def test_one_message_is_one_checked_document():
    document = check_message(message("a", timestamp="1970-01-01"), {"t": "7"}, "t", "x")
    assert document == Document("a", "Some words.", event_time=7000)
    assert check_message(message("a"), {"t": "7"}, None, "x").event_time is None
    rejected = check_message(b"\xff", {}, None, "pubsub://x")
    assert isinstance(rejected, Rejected)
    assert (rejected.reason, rejected.source, rejected.position, rejected.raw) == ("not_utf8", "pubsub://x", 0, b"\xff")


def test_what_is_no_subscription_is_refused_before_any_work(world, service):
    assert subscription_of(SOURCE) == SUBSCRIPTION
    for wrong in ("pubsub://projects/some-project/topics/some-topic", "pubsub://some-name", f"{SOURCE}/more"):
        with pytest.raises(UsageError, match="is not a subscription") as caught:
            subscription_of(wrong)
        assert wrong in str(caught.value)
    with pytest.raises(UsageError, match=r"the subscription does not exist: 'projects/.*/wrong-name'"):
        world.run(sources=["pubsub://projects/some-project/subscriptions/wrong-name"])
    assert not (world.folder / "bank").exists()
    check_subscription(SUBSCRIPTION)


def test_dataflow_gets_beams_own_reader(tmp_path):
    """Built with Dataflow's own overrides; it shows the graph and its options, not that Google runs the job."""
    arguments = [
        "--runner=DataflowRunner",
        "--dry_run=True",
        "--project=some-project",
        "--region=europe-west4",
        "--temp_location=gs://some-bucket/tmp",
        "--streaming",
    ]
    pipeline = beam.Pipeline(options=PipelineOptions(arguments))
    _build(pipeline, ReadMessages(SUBSCRIPTION, "published"), plan_of(new_bank(tmp_path)))
    proto = pipeline.run().job.proto_pipeline
    names = {one.unique_name for one in proto.components.transforms.values()}
    for label in ("ReadStream/ReadFromPubSub/Read", "ReadStream/CheckMessage", "StreamIngest/CommitWindows"):
        assert any(one.startswith(label) for one in names), label
    (read,) = [one for one in proto.components.transforms.values() if one.unique_name.endswith("ReadFromPubSub/Read")]
    payload = read.spec.payload.decode("utf-8", "replace")
    assert SUBSCRIPTION in payload
    assert "published" in payload
