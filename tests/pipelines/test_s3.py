"""A bank's whole life on S3, as moto plays it; gs:// is the same code, and was not run.

Sources on S3, ingest by two processes at once, a process killed and run again, recall, adapters, verify, compaction,
forgetting, export, migration, and what is said when the store cannot be used.
"""

from __future__ import annotations

import io
import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
from deltalake import DeltaTable
from test_ingest_s3 import bucket, put  # noqa: F401 - a fixture
from test_kill import Server, everything, runs_into, write_inputs
from tiny import TinyEncoder, corpus, rotation, settings, to_line

from mbc_core.adapters import AdapterRegistry
from mbc_core.bank import Bank, Storage
from mbc_core.bank.compact import compact
from mbc_core.bank.forget import forget
from mbc_core.bank.storage import as_storage_error
from mbc_core.errors import StorageError, UsageError
from mbc_core.lexicon import Lexicon
from mbc_core.memory import Memory
from pipelines.ingest import run_ingest
from pipelines.migrate import run_migrate
from schemas.document import document_key

DOCUMENTS = corpus(30)


def memory(bank: Bank, as_of: datetime | None = None) -> Memory:
    return Memory.open(bank, TinyEncoder(), as_of=as_of, lexicon=Lexicon([]), rotation=rotation())


@pytest.mark.slow
def test_the_life_of_a_bank(tmp_path, bucket):  # noqa: F811
    place, given = f"{bucket}/banks/one", settings(tmp_path / "w", slice_documents=10, keep_text=True)
    for part in range(3):
        put(f"bucket/in/{part}.jsonl", b"".join(to_line(one) for one in DOCUMENTS[part * 10 : part * 10 + 10]))
    result = run_ingest([f"{bucket}/in/*.jsonl"], place, given, show_progress=False)
    assert (result["documents"], result["slices"]) == (30, 3)
    bank = Bank.open(place)
    assert bank.inspect(verify=True)["problems"] == []

    found = {one.doc_id: one for one in memory(bank).recall([DOCUMENTS[4].text], 200)[0]}
    assert len(found) == 30 and found["doc-4"].event_time is not None
    moment = datetime.now(UTC)
    put("bucket/in/new.jsonl", b'{"id": "doc-4", "text": "Nothing of what it said before."}\n')
    run_ingest([f"{bucket}/in/new.jsonl"], place, given, show_progress=False)
    words = [
        {one.doc_id: one.words for one in memory(bank, as_of).recall(["Word1"], 200)[0]}["doc-4"]
        for as_of in (None, moment)
    ]
    assert "Nothing" in words[0] and "Nothing" not in words[1]

    registry = AdapterRegistry(bank)
    files = {"adapter_model.safetensors": b"w", "adapter_config.json": b"{}"}
    first, second = (registry.save_candidate(files, {"number": number}, "base") for number in range(2))
    registry.promote(first, "good")
    registry.promote(second, "better")
    assert registry.rollback("base", "not so good") == first == registry.live("base")
    assert (registry.load(first, tmp_path) / "adapter_model.safetensors").read_bytes() == b"w"

    before = sorted(bank.documents())
    done = compact(bank, history=0)
    assert done["after"]["files"] < done["before"]["files"]
    assert sorted(bank.documents()) == before and bank.inspect(verify=True)["problems"] == []
    assert forget(bank, ["doc-7"])["forgotten"] == 1
    assert document_key("doc-7", bank.manifest.salt) not in bank.documents()
    assert bank.inspect(verify=True)["problems"] == []
    again = run_ingest([f"{bucket}/in/0.jsonl"], place, given, show_progress=False)
    assert again["dead_letters_by_reason"] == {"forgotten": 1}

    out = io.BytesIO()
    rows = bank.export(out, "jsonl", Lexicon([]))
    assert rows == len(out.getvalue().splitlines()) > 0 and "doc-7" not in out.getvalue().decode()
    moved = run_migrate(place, f"{bucket}/banks/two", [], given, show_progress=False)
    assert (moved["from_text"], moved["tombstones"]) == (29, 1)
    assert Bank.open(f"{bucket}/banks/two").inspect(verify=True)["problems"] == []
    assert json.dumps(bank.inspect())


@pytest.fixture
def servers(tmp_path, bucket):  # noqa: F811 - processes that know the store
    both = []
    for number in range(2):
        (tmp_path / f"server-{number}").mkdir()
        both.append(Server(tmp_path / f"server-{number}"))
    yield both
    for one in both:
        one.close()


@pytest.mark.slow
def test_two_processes_at_once(tmp_path, bucket, servers):  # noqa: F811
    inputs = write_inputs(tmp_path)
    runs = [{**run, "bank": f"{bucket}/bank"} for run in runs_into(tmp_path, inputs)]
    with ThreadPoolExecutor(2) as threads:
        asked = [
            threads.submit(server.attempt, tmp_path / f"work-{number}", [runs[number]])
            for number, server in enumerate(servers)
        ]
        answers = [one.result() for one in asked]
    assert [one["exit"] for one in answers] == [0, 0]
    bank = Bank.open(f"{bucket}/bank")
    assert bank.inspect(verify=True)["problems"] == []
    results = [one["result"][0] for one in answers]
    assert sum(one["documents"] + one["duplicates"] for one in results) == 95
    stored = bank.read("codes", ["key", "passage", "added_at"]).to_pylist()
    assert len({tuple(row.values()) for row in stored}) == len(stored)
    revisions = {(row["key"], row["added_at"]) for row in stored}
    assert sum(one["documents"] for one in results) == len(revisions) and len(bank.documents()) == 85


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_killed_then_the_same_command(tmp_path, bucket, servers, share):  # noqa: F811
    inputs = write_inputs(tmp_path)[:1]
    alone = servers[0].attempt(tmp_path / "work-0", runs_into(tmp_path / "alone", inputs))
    steps = sum(not one.startswith("run ") for one in alone["marks"])
    runs = [{**run, "bank": f"{bucket}/bank"} for run in runs_into(tmp_path, inputs)]
    killed = servers[1].attempt(tmp_path / "work-1", runs, (round(share * steps), 0.01))
    assert killed["signal"] == 9
    done = servers[1].attempt(tmp_path / "work-1", runs)
    assert done["result"][0]["documents"] == 60
    bank = Bank.open(f"{bucket}/bank")
    assert everything(bank) == everything(Bank.open(tmp_path / "alone"))
    assert bank.inspect(verify=True)["problems"] == []


def test_a_store_that_cannot_be_used_says_what_to_do(tmp_path, bucket, monkeypatch):  # noqa: F811
    given = settings(tmp_path / "w")
    source = tmp_path / "a.jsonl"
    source.write_bytes(to_line(DOCUMENTS[1]))
    with pytest.raises(StorageError, match=r"there is no such bucket\. Fix: check the bucket's name and the region"):
        run_ingest([str(source)], "s3://nowhere/bank", given, show_progress=False)
    with pytest.raises(UsageError, match=r"the source does not exist: 's3://nowhere/a.jsonl'.*there is no such bucket"):
        run_ingest(["s3://nowhere/a.jsonl"], str(tmp_path / "bank"), given, show_progress=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"the store does not answer\. Fix: check the network and.*AWS_ENDPOINT_URL"):
        run_ingest([str(source)], "s3://bucket/bank", given, show_progress=False)


def test_no_credentials_are_named(monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(OSError) as caught:
        DeltaTable.is_deltatable("s3://bucket/bank/codes")
    told = str(as_storage_error(caught.value, "look at", "s3://bucket/bank/codes"))
    assert "no credentials were found, or the store does not know them. Fix: set AWS_ACCESS_KEY_ID" in told


def test_the_options_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9000")
    assert Storage("s3://bucket/a").delta_options() == {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9000",
        "AWS_ALLOW_HTTP": "true",
    }
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://s3.example.org")
    assert Storage("s3://bucket/a").delta_options() == {"AWS_ENDPOINT_URL": "https://s3.example.org"}
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    assert Storage("s3://bucket/a").delta_options() == {}
    assert Storage("gs://bucket/a").delta_options() == Storage(str(Path.cwd())).delta_options() == {}


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("The specified bucket does not exist (NoSuchBucket)", "there is no such bucket"),
        ("AWS Error ACCESS_DENIED during HeadObject operation", "these credentials may not touch it"),
        ("<Code>InvalidAccessKeyId</Code>", "no credentials were found, or the store does not know them"),
        ("error sending request for url", "the store does not answer"),
    ],
)
def test_what_stores_answer_is_put_plainly(text, cause):
    for place, names in (("s3://b/x", "AWS_ACCESS_KEY_ID"), ("gs://b/x", "GOOGLE_APPLICATION_CREDENTIALS")):
        told = str(as_storage_error(OSError(text), "read", place))
        assert f"the bank's storage refused to read {place}. Likely cause: {cause}. Fix: " in told
        assert "credentials" not in cause or names in told
