"""One store behind one interface: names, create-only writing, and what a refusing store is told to mean."""

from __future__ import annotations

import errno
import pickle
from pathlib import Path

import pytest

from mbc_core.bank.storage import Storage, StoredFile, as_storage_error, is_refusal, plain_cause
from mbc_core.errors import StorageError, UsageError


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "root"))


def test_write_read_size_list_delete(storage):
    assert storage.write_new("a/b/one.bin", b"123") is True
    assert storage.write_new("two.bin", b"") is True
    assert storage.read_bytes("a/b/one.bin") == b"123"
    assert [storage.size("a/b/one.bin"), storage.size("two.bin"), storage.size("a"), storage.size("no")] == [
        3,
        0,
        None,
        None,
    ]
    assert storage.list() == [StoredFile("a/b/one.bin", 3), StoredFile("two.bin", 0)]
    assert storage.list("a") == [StoredFile("a/b/one.bin", 3)]
    assert storage.list("nothing/here") == []
    storage.delete("two.bin")
    storage.delete("two.bin")
    assert not storage.exists("two.bin")


def test_a_file_is_never_overwritten(storage):
    storage.write_new("one", b"first")
    assert storage.write_new("one", b"first") is False
    with pytest.raises(StorageError, match="would be overwritten with other contents"):
        storage.write_new("one", b"second")
    assert storage.read_bytes("one") == b"first"
    assert [one.name for one in Path(storage.uri).iterdir()] == ["one"]  # no temporary file is left


def test_without_hard_links_a_file_is_renamed_into_place(storage, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    assert storage.write_new("one", b"first") is True
    assert storage.write_new("one", b"first") is False
    with pytest.raises(StorageError, match="would be overwritten"):
        storage.write_new("one", b"second")
    assert storage.read_bytes("one") == b"first"
    assert [one.name for one in Path(storage.uri).iterdir()] == ["one"]


def test_unfinished_files_are_not_listed(storage):
    storage.write_new("one", b"1")
    (Path(storage.uri) / ".tmp-77-abc").write_bytes(b"half")
    assert storage.list() == [StoredFile("one", 1)]


def test_reading_what_is_not_there(storage):
    with pytest.raises(StorageError, match=r"refused to read .*root/gone\. Likely cause: it is not there"):
        storage.read_bytes("gone")


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="refused to write"):
        Storage(str(tmp_path / "file")).write_new("a", b"")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("s3://bucket/some/prefix/", "s3://bucket/some/prefix"),
        ("gs://bucket", "gs://bucket"),
        ("file:///data/bank/", "/data/bank"),
        ("/data/./bank/", "/data/bank"),
    ],
)
def test_addresses_have_one_form(given, expected):
    assert Storage(given).uri == expected
    assert Storage(given).locate("codes") == f"{expected}/codes"


def test_a_relative_path_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Storage("bank").uri == str(tmp_path / "bank")
    assert Storage("bank").is_local and not Storage("s3://bucket").is_local


@pytest.mark.parametrize("bad", ["http://host/bank", "s3://", "s3:///", "hdfs://x/y"])
def test_other_places_are_refused(bad):
    with pytest.raises(UsageError, match="the bank's place is not understood"):
        Storage(bad)


def test_storage_pickles_to_its_address(storage):
    storage.write_new("one", b"1")
    again = pickle.loads(pickle.dumps(storage))
    assert again == storage and again.read_bytes("one") == b"1"


def test_endpoint_of_s3_reaches_delta(monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9000")
    assert Storage("s3://bucket/b").delta_options() == {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9000",
        "AWS_ALLOW_HTTP": "true",
    }
    assert Storage("/local").delta_options() == {}
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    assert Storage("s3://bucket/b").delta_options() == {}


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk or quota is full"),
        (OSError(errno.EFBIG, "File too large"), "the disk or quota is full"),
        (OSError("Generic LocalFileSystem error\n  \x1b[31m↳\x1b[0m copy (os error 28)"), "the disk or quota is full"),
        (PermissionError(errno.EACCES, "Permission denied"), "this user may not touch it"),
        (OSError("When reading: AWS Error ACCESS_DENIED: Access Denied."), "this user may not touch it"),
        (FileNotFoundError(errno.ENOENT, "gone"), "it is not there, or was removed meanwhile"),
        (OSError("the network is\n   down"), "the network is down"),
    ],
)
def test_causes_are_recognised_by_number_or_text(error, cause):
    found = as_storage_error(error, "write", "somewhere")
    assert f"refused to write somewhere. Likely cause: {cause}. Fix: " in str(found)
    assert is_refusal(error) == (cause != "the network is down")


def test_plain_cause_drops_colours_and_stack_frames():
    text = "Generic error\n  \x1b[31m↳\x1b[0m Truncated record\n   0: <unknown>\n   1: start_thread"
    assert plain_cause(OSError(text)) == "Generic error : Truncated record"
