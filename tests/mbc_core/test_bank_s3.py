"""The same bank on S3, as moto plays it: create, add, rerun, read, verify."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

import pyarrow as pa
import pytest
from bank_rows import codebook, key_of, make_slice, manifest, numbered, shown

from mbc_core.adapters import AdapterRegistry
from mbc_core.bank import Bank, commit_slice, finished_slices
from mbc_core.bank.storage import Storage
from mbc_core.errors import DamagedFile, StorageError, UsageError

pytest.importorskip("moto.server", reason="moto is in the extra dev")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """A server in a process of its own: deltalake holds the interpreter's lock while it waits for an answer."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(port, server)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert server.poll() is None, "the S3 server ended by itself"
        time.sleep(0.1)
    pytest.fail("the S3 server did not start within 30 s")


@pytest.fixture
def place(endpoint, monkeypatch) -> str:
    """An empty bucket's prefix."""
    settings = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/moto-api/reset", method="POST"), timeout=10)
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/bucket", method="PUT"), timeout=10)
    return "s3://bucket/some/bank"


def test_a_bank_on_s3_behaves_like_a_local_one(place):
    bank = Bank.create(place, manifest(), codebook())
    rows = make_slice("run", "0", numbered(0, 5), passages=2, dead=1)
    assert commit_slice(bank, rows, "run", "0") is True
    assert commit_slice(bank, rows, "run", "0") is False
    again = Bank.open_or_create(place, manifest(key_salt="f" * 32), codebook())
    assert again.manifest == bank.manifest
    assert shown(again) == [(doc_id, passage) for doc_id, _ in numbered(0, 5) for passage in range(2)]
    assert finished_slices(again, "run") == {"0"} and again.codebook(0).digest == codebook().digest
    registry = AdapterRegistry(again)
    version = registry.save_candidate({"adapter_model.safetensors": b"w", "adapter_config.json": b"{}"}, {}, "base")
    registry.promote(version, "better")
    found = again.inspect(verify=True)
    assert (found["documents"], found["dead_letters"], found["adapter"], found["problems"]) == (5, 1, version, [])
    assert json.dumps(found["bytes"])


def test_files_on_s3_are_never_overwritten_and_damage_is_found(place):
    storage = Storage(place)
    assert storage.write_new("a/b", b"first") is True and storage.write_new("a/b", b"first") is False
    with pytest.raises(StorageError, match="s3://bucket/some/bank/a/b would be overwritten with other contents"):
        storage.write_new("a/b", b"second")
    assert [(one.path, one.size) for one in storage.list()] == [("a/b", 5)]
    storage.delete("a/b")
    assert storage.list() == [] and storage.size("a/b") is None
    bank = Bank.create(place, manifest(), codebook())
    commit_slice(bank, make_slice("run", "0", numbered(0, 2)), "run", "0")
    bank.storage.delete(f"codes/{bank.files('codes')[0][0]}")
    with pytest.raises(DamagedFile, match=r"the bank's file s3://bucket/some/bank/codes/run/0-.* is missing"):
        bank.passages()


def test_no_bank_or_no_bucket_on_s3(place):
    with pytest.raises(UsageError, match="there is no bank here: 's3://bucket/some/bank'"):
        Bank.open(place)
    with pytest.raises(StorageError, match="the bank's storage refused to"):
        Bank.create("s3://no-such-bucket/bank", manifest(), codebook())


def test_compact_and_forget_on_s3(place):
    bank = Bank.create(place, manifest(), codebook())
    for number in range(4):
        rows = make_slice(f"r{number}", "0", numbered(3 * number, 3), passages=2, dead=1)
        commit_slice(bank, rows, f"r{number}", "0")
    commit_slice(bank, make_slice("again", "0", numbered(3, 2, "other"), passages=2), "again", "0")
    before = bank.passages().to_pylist()
    first = bank.read("codes")["added_at"].cast(pa.int64()).to_pylist()[0]
    then = bank.passages(first).to_pylist()
    result = bank.compact()
    assert (result["merged"], result["swept"]) == (5 + 5 + 5 + 4 + 5, 0)
    assert len(bank.files("codes")) == 1
    assert (bank.passages().to_pylist(), bank.passages(first).to_pylist()) == (before, then)
    told = bank.forget(["x0004", "nobody"])
    assert (told["forgotten"], told["not_found"]) == (1, 1)
    key = str(key_of("x0004")).encode()
    for one in bank.storage.list():
        data = bank.storage.read_bytes(one.path)
        assert b"x0004" not in data and key not in data, one.path
    assert {name for name, _ in shown(bank)} == {f"x{number:04d}" for number in range(12) if number != 4}
    commit_slice(bank, make_slice("back", "0", numbered(4, 1)), "back", "0")
    assert "x0004" not in {name for name, _ in shown(bank)}
    assert bank.inspect(verify=True)["problems"] == []
    assert json.loads(bank.storage.read_bytes(told["receipt"].removeprefix(f"{bank.uri}/")))["forgotten"] == 1
