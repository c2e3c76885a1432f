"""The live job on a watched folder: files come, change, break; old documents; restarts; the end."""

from __future__ import annotations

import json
import signal
import time

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from oracle import held
from streaming_tools import World, adds_up, command, finish, run_command, wait_for
from tiny import corpus, to_line

from mbc_core.bank import Bank
from mbc_core.errors import StorageError, UsageError
from pipelines import watch
from pipelines.ingest import main
from pipelines.live import STREAM_RUNNER, Drain, SourceCounts, Step, registered
from pipelines.options import StreamSettings, parse_arguments
from pipelines.stream_progress import FIGURES, status_line
from pipelines.streaming import stream
from schemas.document import Document
from schemas.results import IngestResult

DAY = 86_400_000_000
OLD = [Document(f"old-{number}", f"Words of day {number}.", event_time=number * 4000 * DAY) for number in range(4)]


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


class Counted:
    """A source of fixed steps that notes when it is asked."""

    def __init__(self, steps):
        self.steps, self.asked = list(steps), []

    def step(self):
        self.asked.append(time.monotonic())
        return self.steps.pop(0)


def test_the_hook_into_beams_runner_is_where_it_was():
    """If this fails after an upgrade of Beam, pipelines/live.py has to follow."""
    source = Counted([Step([(5, "a"), (7, "b")], 6), Step([], 8), Step([(9, "c")], done=True)])
    pipeline = beam.Pipeline(options=PipelineOptions([f"--runner={STREAM_RUNNER}", "--streaming"]))
    assert type(pipeline.runner).__name__ == "BundleBasedDirectRunner", "never the one that downloads another engine"
    _SEEN.clear()
    with registered(source) as read:
        _ = pipeline | "Read" >> read | "Note" >> beam.ParDo(_Note())
        pipeline.run().wait_until_finish()
    assert _SEEN == [("a", 5), ("b", 7), ("c", 9)]
    assert len(source.asked) == 3


_SEEN: list = []


class _Note(beam.DoFn):
    def process(self, element, moment=beam.DoFn.TimestampParam):
        _SEEN.append((element, moment.micros))


def test_files_that_come_and_change_while_it_runs(world):
    first = corpus(40)
    world.put("a.jsonl", first)
    revised = Document("doc-3", "A corrected text that keeps its date.", event_time=first[3].event_time)

    def drive():
        wait_for(lambda: len(world.visible()) >= 30, "the first commit")
        world.put("b.jsonl", corpus(20, start=40))
        wait_for(lambda: "doc-55" in world.visible(), "the second file")
        old = world.visible()["doc-3"]["content_hash"]
        world.put("a.jsonl", [*first[:3], revised, *first[4:]], age=1800)
        wait_for(lambda: world.visible()["doc-3"]["content_hash"] != old, "the revision")

    result = world.run(drive)
    assert adds_up(result)
    assert set(IngestResult.__annotations__) <= set(result)
    assert (result["documents"], result["documents_in"]) == (61, 100)
    again = result["duplicates"], result["replaced"]  # of the window that is still open a second copy is no duplicate
    assert again == (33, 6), "39 documents of the changed file had not changed"
    assert set(world.visible()) == {f"doc-{number}" for number in range(60)}
    assert result["windows"] == len({row["window"] for row in world.ledger() if row["documents"]})
    assert Bank.open(world.uri).inspect(verify=True)["problems"] == []


def test_a_file_that_is_still_being_written_is_left_alone(world):
    lines = b"".join(to_line(one) for one in corpus(6))

    def drive():
        with (world.inbox / "slow.jsonl").open("wb") as file:
            for place in range(0, len(lines), len(lines) // 12):
                file.write(lines[place : place + len(lines) // 12])
                file.flush()
                assert world.visible() == {}, "half a file was read"
                time.sleep(0.25)
        wait_for(lambda: len(world.visible()) >= 5, "the file, now whole")

    result = world.run(drive, poll=2.0)
    assert (result["documents"], result["dead_letters"]) == (6, 0)


@pytest.mark.parametrize("lateness", [None, 0])
def test_old_documents_are_not_lost_and_late_only_where_a_limit_was_asked_for(world, lateness):
    """The watermark of a folder is not the wall clock: a first file of any date is on time. Later ones are late."""
    world.put("a.jsonl", OLD)

    def drive():
        wait_for(lambda: len(world.visible()) == 4, "documents of 1970 to 2002")
        world.put("b.jsonl", [Document("later", "Older than what was committed.", event_time=100 * DAY)])
        wait_for(lambda: len(world.visible()) == 5 or (lateness == 0 and len(world.ledger()) == 5), "the late one")

    result = world.run(drive, allowed_lateness=lateness)
    assert adds_up(result)
    assert result["documents_in"] == 5
    assert result["dead_letters_by_reason"] == ({} if lateness is None else {"too_late": 1})
    assert ("later" in world.visible()) is (lateness is None)
    if lateness is None:
        assert world.visible()["later"]["event_time"].isoformat() == "1970-04-11T00:00:00+00:00"


def test_a_broken_file_does_not_end_the_stream(world):
    world.put("bad.jsonl", [b"not json\n", to_line(OLD[0]), b'{"id": "x"}\n'])
    world.put("cut.csv", [b'id,text\n1,"never closed\n'])
    world.put("empty.jsonl", [])

    def drive():
        wait_for(lambda: "old-0" in world.visible())
        world.put("later.jsonl", OLD[1:])
        wait_for(lambda: len(world.visible()) == 4, "the file after the broken ones")

    result = world.run(drive)
    assert adds_up(result)
    assert result["dead_letters_by_reason"] == {"not_json": 1, "no_text": 2, "source_unreadable": 1}
    assert world.reasons() == ["no_text", "no_text", "not_json", "source_unreadable"]


def test_a_file_with_a_bad_line_may_grow(world):
    """Its bad line is read again with the rest: a dead letter once, counted each time that it was read."""
    lines = [to_line(OLD[0]), b"not json\n"]
    world.put("a.jsonl", lines, age=3 * 86_400)

    def drive():
        wait_for(lambda: "old-0" in world.visible(), "the file")
        wait_for(lambda: world.reasons() == ["not_json"], "its bad line")
        world.put("a.jsonl", [*lines, to_line(OLD[1])], age=2 * 86_400)
        wait_for(lambda: "old-1" in world.visible(), "the new line")

    result = world.run(drive)
    assert adds_up(result)
    counts = [result[name] for name in ("documents_in", "documents", "duplicates", "dead_letters")]
    assert counts == [5, 2, 2, 1]
    assert world.reasons() == ["not_json"]


def test_a_restart_reads_everything_and_adds_nothing_and_a_drained_window_takes_more(world):
    world.put("a.jsonl", [*OLD, Document("undated", "Arrived today."), b"broken\n"], age=5)
    first = world.run()
    shown = held(Bank.open(world.uri)).codes
    assert (first["documents"], first["dead_letters"], first["windows"]) == (5, 1, 5)
    second = world.run()
    counts = ("ingest_id", "documents", "duplicates", "dead_letters", "documents_in", "windows")
    assert [first[name] for name in counts] == [second[name] for name in counts]
    assert held(Bank.open(world.uri)).codes == shown
    assert world.reasons() == ["not_json"]
    # The window of today was drained before its end, as pane 0: what comes afterwards is another pane of it.
    world.put("b.jsonl", [Document("undated-2", "Arrived today, later.")], age=5)
    third = world.run()
    assert (third["documents"], third["windows"]) == (6, 5)
    panes = {row["pane"] for row in world.ledger() if row["window"] == max(one["window"] for one in world.ledger())}
    assert panes == {0, 1}


def test_two_streams_of_other_folders_into_one_bank_have_other_names(world):
    world.put("a.jsonl", OLD[:2])
    (world.inbox / "sub").mkdir()
    (world.inbox / "sub" / "c.jsonl").write_bytes(to_line(OLD[3]))
    first, second = world.run(), world.run(sources=[str(world.inbox / "sub")], poll=0.1)
    assert first["ingest_id"] != second["ingest_id"]
    assert (first["documents"], second["duplicates"]) == (3, 1)
    assert world.run(given=None, sources=[f"{world.inbox}/*.jsonl"])["duplicates"] == 2


def test_an_error_of_the_store_ends_the_stream_with_its_message(world, monkeypatch):
    world.put("a.jsonl", OLD)

    def refuse(self, batch):
        raise StorageError("the documents cannot be staged", value="disk", cause="the disk is full", fix="free some")

    monkeypatch.setattr(watch.Backlog, "take", refuse)
    with pytest.raises(StorageError, match=r"the documents cannot be staged: 'disk'\. Likely cause: the disk is full"):
        world.run()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_commits_everything_and_exits_with_0(world, number):
    undated = [Document(f"undated-{place}", f"Given today, number {place}.") for place in range(5)]
    world.put("a.jsonl", corpus(30))
    arguments = [str(world.inbox), "--bank", world.uri, "--streaming", "--poll=1s"]
    with command(world.folder, *arguments) as process:
        wait_for(lambda: len(world.visible()) >= 20, "the first commits")
        world.put("b.jsonl", undated)  # their window is open until midnight
        time.sleep(0.1)
        process.send_signal(number)
        code, result, err = finish(process)
    assert code == 0, err[-2000:]
    assert "asked to end" in err
    assert adds_up(result)
    assert (result["documents"], result["duplicates"], result["left"]) == (35, 0, [])
    assert len(world.visible()) == 35
    before = held(Bank.open(world.uri)).codes
    code, again, err = run_command(world.folder, *arguments, "--idle-exit=1s")
    assert code == 0, err[-2000:]
    assert (again["ingest_id"], again["documents"], again["documents_in"]) == (result["ingest_id"], 35, 35)
    assert held(Bank.open(world.uri)).codes == before


def test_people_see_where_it_stands(world, capsys):
    world.put("a.jsonl", OLD)
    world.run()
    result = stream([str(world.inbox)], world.uri, _settings(world), StreamSettings(poll=0.1, idle_exit=0.3))
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = [one for one in shown.err.splitlines() if "watermark" in one]
    assert line.startswith("4 read · 0 encoded (0.0 documents/s) · 0 open windows · 0 commits · watermark 20")
    assert result["documents"] == 4


def test_a_window_is_open_until_the_pipeline_has_passed_its_end():
    FIGURES.reset()
    for end in (2_000_000, 4_000_000):
        FIGURES.saw(end)
    counts = SourceCounts(records=10, waiting=3, open_files=1, watermark=5_000_000, passed=3_000_000)
    shown = status_line(counts, 0, 10)
    assert " · 3 waiting · 1 files open · 1 open windows · " in shown
    assert shown.endswith("watermark 1970-01-01T00:00:05Z")


def test_a_stream_that_is_asked_to_end_before_it_began_still_takes_what_is_there(world):
    world.put("a.jsonl", OLD)
    drain = Drain()
    drain.ask()
    result = stream([str(world.inbox)], world.uri, _settings(world), show_progress=False, drain=drain)
    assert result["documents"] == 4


def _settings(world):
    from tiny import settings

    return settings(world.folder / "w")


# ------------------------------------------------------------------------------------------------------- wrong use


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{in}", "--streaming", "--poll=often"], "--poll cannot be read: 'often'"),
        (["{in}", "--streaming", "--idle-exit=0s"], "--idle-exit cannot be read: '0s'"),
        (["{in}", "--streaming", "--allowed-lateness=-1h"], "--allowed-lateness cannot be read: '-1h'"),
        (["{in}", "--poll=5s"], "--poll does nothing without --streaming: '5s'"),
        (["{in}", "--event-time-attribute=t", "--streaming"], "files have no event-time attribute: 't'"),
        (["-", "--streaming"], "standard input cannot be watched: '-'"),
        (["{in}/none", "--streaming"], "the watched folder does not exist"),
        (
            ["pubsub://projects/some-project/topics/some-topic", "--streaming"],
            "the Pub/Sub source is not a subscription",
        ),
        (["pubsub://projects/some-project/subscriptions/some-name", "{in}", "--streaming"], "must be the only source"),
        (["{in}", "--streaming", "--runner=FnApiRunner"], "this runner cannot run this stream: 'FnApiRunner'"),
        (["{in}", "--streaming", "--runner=DataflowRunner"], "this runner cannot run this stream: 'DataflowRunner'"),
    ],
)
def test_bad_options_stop_before_any_work(world, capsys, arguments, message):
    given = [one.replace("{in}", str(world.inbox)) for one in arguments]
    assert main([*given, "--bank", world.uri]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Likely cause: " in shown
    assert "Fix: " in shown
    assert world.visible() == {}
    assert not (world.folder / "bank").exists()


def test_options_reach_the_settings():
    given = parse_arguments(
        ["in", "--bank=b", "--streaming", "--poll=10s", "--allowed-lateness=1h", "--idle-exit=2m", "--window=6h"]
    )
    assert given.streaming == StreamSettings(poll=10, allowed_lateness=3600, idle_exit=120)
    assert given.settings.window_seconds == 21_600
    assert parse_arguments(["in", "--bank=b", "--streaming", "--allowed-lateness=0"]).streaming.allowed_lateness == 0
    assert parse_arguments(["in", "--bank=b"]).streaming is None
    with pytest.raises(UsageError, match="`poll` is too small: -1"):
        StreamSettings(poll=-1)


def test_the_console_command_takes_the_same_options(world, monkeypatch, capsys):
    from pipelines import streaming
    from pipelines.main import main as mbc

    seen = {}

    def fake(sources, bank, settings, given, *, say):
        seen.update(sources=sources, given=given)
        print("what a library prints")
        return {"documents": 1}

    monkeypatch.setattr(streaming, "stream", fake)
    arguments = [
        "ingest",
        "pubsub://projects/some-project/subscriptions/some-name",
        "--bank",
        world.uri,
        "--streaming",
        "--json",
    ]
    assert mbc([*arguments, "--event-time-attribute", "published", "--idle-exit", "30s"]) == 0
    assert json.loads(capsys.readouterr().out) == {"documents": 1}
    assert seen["sources"] == ("pubsub://projects/some-project/subscriptions/some-name",)
    assert seen["given"] == StreamSettings(idle_exit=30, event_time_attribute="published")
    assert mbc(["ingest", str(world.inbox), "--bank", world.uri, "--idle-exit", "30s"]) == 2
    assert "--idle-exit does nothing without --streaming" in capsys.readouterr().err
