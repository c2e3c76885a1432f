"""The same graph on runners with many workers: it reads its own sources, and Dataflow's translation accepts it."""

from __future__ import annotations

import json

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import GoogleCloudOptions, StandardOptions, WorkerOptions
from apache_beam.portability.api import beam_runner_api_pb2
from oracle import empty_bank, held, plain_loop
from tiny import POISON, RULE, TinySpec, corpus, rotation, settings, to_line, write_corpus

from mbc_core.bank import SliceId
from mbc_core.errors import UsageError
from pipelines import ingest as ingest_module
from pipelines.graph import Job, Share, build_distributed, options_of, run
from pipelines.ingest import run_ingest
from pipelines.plain import EncodeRule
from pipelines.sources import find_sources
from pipelines.stream_graph import StreamIngest, StreamPlan
from schemas.document import Document, document_from_bytes

DATAFLOW = [
    "--runner=DataflowRunner",
    "--dry_run=True",
    "--project=some-project",
    "--region=europe-west4",
    "--temp_location=gs://some-bucket/tmp",
    "--staging_location=gs://some-bucket/staging",
    "--job_name=mbc-ingest",
    "--sdk_container_image=gcr.io/some-project/mbc:1",
    "--sdk_location=container",
    "--max_num_workers=7",
    "--dataflow_service_options=worker_accelerator=type:nvidia-tesla-t4;count:1;install-nvidia-driver",
]


def job_of(bank, shards=2) -> Job:
    return Job(bank, TinySpec(), rotation(), EncodeRule(words=24), RULE, shards)


def distributed(bank, sources, ingest_id="far"):
    with_options = beam.Pipeline(options=options_of([]))
    share = Share(SliceId.begin(ingest_id, "all"))
    build_distributed(with_options, find_sources([str(one) for one in sources]).sources, job_of(bank), share)
    run(with_options)


def test_reading_by_workers_gives_the_plain_loops_bank(tmp_path):
    documents = corpus(120)
    write_corpus(tmp_path / "a.jsonl", documents[:50])
    write_corpus(tmp_path / "b.jsonl", documents[50:])
    bank = empty_bank(tmp_path / "bank", settings(tmp_path / "w"))
    distributed(bank, [tmp_path / "*.jsonl"])
    expected = plain_loop(documents)
    found = held(bank)
    assert found.codes == expected.codes
    assert found.digests == expected.digests
    assert len(bank.files("codes")) == 2, "two shards, one commit"
    assert bank.table("codes").version() == 1


def test_workers_refuse_what_was_to_be_forgotten(tmp_path):
    bank = empty_bank(tmp_path / "bank", settings(tmp_path / "w"))
    bank.forget(["doc-3", "bad"])
    lines = [*map(to_line, corpus(6)), b'{"id": "bad", "text": ""}\n', b'{"id": "other", "text": ""}\n']
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    distributed(bank, [tmp_path / "a.jsonl"])
    assert set(bank.passages()["doc_id"].to_pylist()) == {f"doc-{number}" for number in range(6) if number != 3}
    ledger = bank.read("ledger").to_pylist()
    assert sum(row["documents_in"] for row in ledger) == 8 and sum(row["documents"] for row in ledger) == 5
    letters = bank.read("dead_letter").to_pylist()
    assert sorted((row["reason"], row["raw"] is None, row["key"] is None) for row in letters) == [
        ("forgotten", True, True),
        ("no_text", False, False),
        ("no_text", True, True),
    ]
    stored = b"".join(bank.storage.read_bytes(one.path) for one in bank.storage.list())
    assert b"doc-3" not in stored and b'"bad"' not in stored
    assert bank.inspect(verify=True)["problems"] == []


def test_counts_add_up_when_workers_judge(tmp_path):
    known, newest = corpus(10), Document("twice", "Newest.", event_time=9_000_000)
    bank = empty_bank(tmp_path / "bank", settings(tmp_path / "w"))
    distributed(bank, [write_corpus(tmp_path / "known.jsonl", known)], "first")
    lines = [
        *map(to_line, known),
        to_line(Document("twice", "Older.", event_time=1_000_000)),
        to_line(newest),
        to_line(Document("twice", "Oldest, undated.")),
        to_line(Document("bad", POISON, event_time=0)),
        b"no json\n",
        b'{"id": "x"}\n',
    ]
    (tmp_path / "more.jsonl").write_bytes(b"".join(lines))
    distributed(bank, [tmp_path / "more.jsonl"], "second")
    rows = [row for row in bank.read("ledger").to_pylist() if row["ingest_id"] == "second"]
    total = {name: sum(row[name] for row in rows) for name in ("documents_in", "documents", "duplicates", "replaced")}
    assert total == {"documents_in": 16, "documents": 1, "duplicates": 10, "replaced": 2}
    letters = [json.loads(row["dead_letters"]) for row in rows]
    assert sorted(reason for one in letters for reason in one) == ["encode_failed", "no_text", "not_json"]
    shown = bank.documents([newest.key(bank.manifest.salt)])
    assert [row["content_hash"] for row in shown.values()] == [newest.content_hash(bank.manifest.salt)]
    assert bank.read("dead_letter").num_rows == 3


def test_a_distributed_run_that_is_finished_is_not_started_again(tmp_path, monkeypatch):
    given = settings(tmp_path / "w", ingest_id="once")
    bank = empty_bank(tmp_path / "bank", given)
    source = write_corpus(tmp_path / "a.jsonl", corpus(10))
    monkeypatch.setattr(ingest_module, "_LOCAL_RUNNERS", ())
    results = [run_ingest([source], bank.uri, given, show_progress=False) for _ in range(2)]
    assert [one["documents"] for one in results] == [10, 10]
    assert [one["slices_skipped"] for one in results] == [0, 1]
    assert bank.table("codes").version() == 1
    with pytest.raises(UsageError, match="standard input cannot be read by distributed workers"):
        run_ingest(["-"], bank.uri, settings(tmp_path / "w"), show_progress=False)


def test_the_name_of_a_distributed_run_follows_its_files(tmp_path):
    given = settings(tmp_path / "w")
    sources = find_sources([write_corpus(tmp_path / "a.jsonl", corpus(3))]).sources
    first = ingest_module._id_from_listing(sources, given)
    assert ingest_module._id_from_listing(sources, given) == first
    write_corpus(tmp_path / "a.jsonl", corpus(4))
    assert ingest_module._id_from_listing(sources, given) != first


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_dataflow_accepts_the_graph_in_a_dry_run(tmp_path):
    """Built with Dataflow's own overrides; it shows the graph and its options, not that Google runs the job."""
    bank = empty_bank(tmp_path / "bank", settings(tmp_path / "w"))
    write_corpus(tmp_path / "a.jsonl", corpus(5))
    options = options_of(DATAFLOW)
    assert options.view_as(StandardOptions).runner == "DataflowRunner"
    pipeline = beam.Pipeline(options=options)
    share = Share(SliceId.begin("far", "all"))
    build_distributed(pipeline, find_sources([str(tmp_path / "a.jsonl")]).sources, job_of(bank), share)
    job = run(pipeline).job
    cloud, workers = job.options.view_as(GoogleCloudOptions), job.options.view_as(WorkerOptions)
    assert (cloud.project, cloud.region) == ("some-project", "europe-west4")
    assert cloud.temp_location.startswith("gs://some-bucket/tmp/mbc-ingest")
    assert "worker_accelerator=type:nvidia-tesla-t4;count:1;install-nvidia-driver" in cloud.dataflow_service_options
    assert workers.sdk_container_image == "gcr.io/some-project/mbc:1"
    assert workers.max_num_workers == 7
    proto = job.proto_pipeline
    images = [one.payload.decode("utf-8", "replace") for one in proto.components.environments.values()]
    assert any("gcr.io/some-project/mbc:1" in one for one in images)
    names = {one.unique_name for one in proto.components.transforms.values()}
    for label in (
        "ReadDocuments/MeetByKey",
        "Encode/EncodeBatch",
        "Settle",
        "UpdateCodebook/WalkWindows",
        "Quantize/QuantizeBatch",
        "WriteCodes/GatherShard",
        "WriteCodes/CommitSlice",
    ):
        assert any(one.startswith(label) for one in names), label


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_dataflow_accepts_the_streaming_graph_in_a_dry_run(tmp_path):
    bank = empty_bank(tmp_path / "bank", settings(tmp_path / "w"))
    pipeline = beam.Pipeline(options=options_of([*DATAFLOW, "--streaming", "--enable_streaming_engine"]))
    messages = pipeline | "ReadFromPubSub" >> beam.io.ReadFromPubSub(
        subscription="projects/some-project/subscriptions/documents", timestamp_attribute="event_time"
    )
    records = messages | "Parse" >> beam.Map(document_from_bytes).with_output_types(Document)
    _ = records | "StreamIngest" >> StreamIngest(StreamPlan(job_of(bank), "far", 3_600))
    job = run(pipeline).job
    assert job.options.view_as(StandardOptions).streaming
    proto = job.proto_pipeline
    transforms = {one.unique_name: one for one in proto.components.transforms.values()}
    for label in (
        "StreamIngest/JudgeLateness/CompareWithWatermark",
        "StreamIngest/Encode/EncodeBatch",
        "StreamIngest/GatherPane",
        "StreamIngest/CommitWindows",
    ):
        assert any(one.startswith(label) for one in transforms), label
    gather = next(one for name, one in transforms.items() if name == "StreamIngest/GatherPane")
    (taken,) = gather.inputs.values()
    windowing = proto.components.windowing_strategies[proto.components.pcollections[taken].windowing_strategy_id]
    assert windowing.trigger.WhichOneof("trigger") == "after_end_of_window"
    assert windowing.allowed_lateness > 50 * 365 * 86_400_000, "the grouping drops nothing: lateness is judged before"
    stateful = [name for name, one in transforms.items() if _has_state(one)]
    assert {name.split("/")[1] for name in stateful} >= {"JudgeLateness", "CommitWindows"}


def _has_state(transform) -> bool:
    if transform.spec.urn != "beam:transform:pardo:v1":
        return False
    payload = beam_runner_api_pb2.ParDoPayload.FromString(transform.spec.payload)
    return bool(payload.state_specs) and bool(payload.timer_family_specs)
