"""Documents on S3 into a bank on S3, as moto plays it: read, commit once, rerun."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator

import pyarrow.fs as pafs
import pytest
from streaming_tools import wait_for
from tiny import corpus, settings, to_line

from mbc_core.bank import Bank, Storage
from mbc_core.errors import UsageError
from pipelines.ingest import run_ingest
from pipelines.live import Drain
from pipelines.options import StreamSettings
from pipelines.sources import find_sources
from pipelines.streaming import stream

pytest.importorskip("moto.server", reason="moto is in the extra dev")


@pytest.fixture
def bucket(monkeypatch) -> Iterator[str]:
    """An empty bucket; the server has a process of its own, since deltalake holds the interpreter's lock."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
    endpoint = f"http://127.0.0.1:{port}"
    for name, value in {**keys, "AWS_ENDPOINT_URL": endpoint, "AWS_EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(name, value)
    try:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/bucket", method="PUT"), timeout=20)
        yield "s3://bucket"
    finally:
        server.kill()
        server.wait()


def put(path: str, data: bytes) -> None:
    import os

    store = pafs.S3FileSystem(endpoint_override=os.environ["AWS_ENDPOINT_URL"], region="us-east-1")
    with store.open_output_stream(path) as stream:
        stream.write(data)


@pytest.mark.slow
def test_documents_and_bank_on_s3(tmp_path, bucket):
    documents = corpus(30)
    put("bucket/in/day=1/a.jsonl", b"".join(to_line(one) for one in documents[:20]))
    put("bucket/in/day=2/b.jsonl", b"".join(to_line(one) for one in documents[20:]))
    put("bucket/in/_SUCCESS", b"")
    assert [one.path for one in find_sources([f"{bucket}/in"]).sources] == [
        "s3://bucket/in/day=1/a.jsonl",
        "s3://bucket/in/day=2/b.jsonl",
    ]
    given = settings(tmp_path / "w", slice_documents=16)
    for skipped in (0, 2):
        result = run_ingest([f"{bucket}/in/day=*/*.jsonl"], f"{bucket}/bank", given, show_progress=False)
        assert (result["documents"], result["slices"], result["slices_skipped"]) == (30, 2, skipped)
    bank = Bank.open(f"{bucket}/bank")
    assert len(bank.documents()) == 30
    assert bank.inspect(verify=True)["problems"] == []
    with pytest.raises(UsageError, match=r"the source does not exist: 's3://missing-bucket/in'"):
        find_sources(["s3://missing-bucket/in"])


@pytest.mark.slow
def test_a_watched_prefix_reads_each_object_once_while_it_runs(tmp_path, bucket):
    documents, drain = corpus(40), Drain()
    put("bucket/in/day=1/a.jsonl", b"".join(to_line(one) for one in documents[:20]))
    put("bucket/in/day=1/b.jsonl.tmp", b"half a doc")

    def shown() -> int:
        return len(Bank.open(f"{bucket}/bank").documents()) if Storage(f"{bucket}/bank").exists("manifest.json") else 0

    def drive() -> None:
        try:
            wait_for(lambda: shown() >= 15, "the first object")
            put("bucket/in/day=2/c.jsonl", b"".join(to_line(one) for one in documents[20:]))
            wait_for(lambda: shown() >= 30, "the second object")
        finally:
            drain.ask()

    driver = threading.Thread(target=drive)
    driver.start()
    given, live = settings(tmp_path / "w"), StreamSettings(poll=0.5)
    options = {"show_progress": False, "drain": drain}
    result = stream([f"{bucket}/in/day=*/*.jsonl*"], f"{bucket}/bank", given, live, **options)
    driver.join()
    assert (result["documents"], result["documents_in"], result["dead_letters"]) == (40, 40, 0)
    again = stream(
        [f"{bucket}/in/day=*/*.jsonl*"], f"{bucket}/bank", given, StreamSettings(0.5, idle_exit=1), **options
    )
    assert (again["ingest_id"], again["documents_in"]) == (result["ingest_id"], 40)
    with pytest.raises(UsageError, match="the bucket does not exist: 's3://missing-bucket/in'"):
        stream(["s3://missing-bucket/in"], f"{bucket}/other", given, live)
