"""Damaged files, foreign banks, full disks and forbidden folders: a clear error each, and the bank stays whole."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bank_rows import codebook, make_bank, make_slice, manifest, numbered, shown

from mbc_core.bank import Bank, commit_slice
from mbc_core.errors import DamagedFile, IncompatibleBank, StorageError, UsageError


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    bank = make_bank(tmp_path / "bank")
    commit_slice(bank, make_slice("one", "0", numbered(0, 5)), "one", "0")
    return bank


def _shard(bank: Bank, table: str = "codes") -> Path:
    return Path(bank.uri) / table / bank.files(table)[0][0]


def _problems(bank: Bank) -> str:
    found = bank.inspect(verify=True)
    assert found["ok"] == (not found["problems"])
    return "\n".join(found["problems"])


def test_a_flipped_bit_in_a_shard(bank):
    data = bytearray(_shard(bank).read_bytes())
    data[len(data) // 2] ^= 1
    _shard(bank).write_bytes(bytes(data))
    with pytest.raises(
        DamagedFile, match=r"the bank's file .*codes/one/0.*parquet does not match its digest.*restore the file"
    ):
        bank.passages()
    with pytest.raises(DamagedFile, match="does not match its digest"):
        bank.visible()
    assert "does not match its digest" in _problems(bank)


def test_a_shard_cut_short(bank):
    data = _shard(bank).read_bytes()
    _shard(bank).write_bytes(data[:100])
    with pytest.raises(DamagedFile, match="100 bytes hash to"):
        bank.passages()
    assert f"has 100 bytes; the log of `codes` recorded {len(data)}" in _problems(bank)


def test_a_missing_shard(bank):
    _shard(bank, "documents").unlink()
    with pytest.raises(DamagedFile, match=r"the bank's file .*documents.*parquet is missing"):
        bank.documents()
    assert "parquet is missing" in _problems(bank)


def test_a_file_with_the_right_digest_that_is_not_parquet(bank):
    from mbc_core.bank import PreparedFile, commit_files
    from mbc_core.bank.parquet import digest

    path = f"one/x-{digest(b'junk')}.parquet"
    bank.storage.write_new(f"codes/{path}", b"junk")
    commit_files(bank, "codes", [PreparedFile(path, 4, 1, "{}")], "junk")
    with pytest.raises(DamagedFile, match="is not the Parquet it should be"):
        bank.read("codes")
    assert "is not the Parquet it should be" in _problems(bank)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"{", "the bank's manifest .* cannot be read.*not a manifest's JSON"),
        (b"[]", "the bank's manifest .* cannot be read"),
        (b"\xff\xfe", "the bank's manifest .*manifest.json cannot be read.*it is not UTF-8"),
        (b'{"format_version": 1, "profile": "default"}', "the bank's manifest .* has missing or unknown fields"),
        (b"", "the bank's manifest .* cannot be read"),
    ],
)
def test_a_damaged_manifest(bank, contents, message):
    (Path(bank.uri) / "manifest.json").write_bytes(contents)
    with pytest.raises(DamagedFile, match=message):
        Bank.open(bank.uri)


def test_another_format_version(bank):
    path = Path(bank.uri) / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 99'))
    with pytest.raises(IncompatibleBank, match=r"another format version: 99\. .*this release reads version 1"):
        Bank.open(bank.uri)


@pytest.mark.parametrize("field", ["encoder", "profile", "rotation", "lexicon", "salience"])
def test_a_bank_made_with_something_else(bank, field):
    with pytest.raises(UsageError, match=rf"was made with another {field}: .*this run would use 'another'"):
        Bank.open_or_create(bank.uri, manifest(**{field: "another"}), codebook())


def test_open_or_create_opens_an_equal_bank_with_its_own_salt(bank):
    again = Bank.open_or_create(bank.uri, manifest(key_salt="f" * 32), codebook())
    assert again.manifest == bank.manifest and len(shown(again)) == 5


def test_no_bank_and_a_bank_already(bank, tmp_path):
    with pytest.raises(UsageError, match=r"there is no bank here: '.*nowhere'"):
        Bank.open(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="a bank is here already"):
        Bank.create(bank.uri, manifest(), codebook())


def test_an_interrupted_creation_is_finished_with_its_first_salt(bank):
    (Path(bank.uri) / "manifest.json").unlink()
    with pytest.raises(UsageError, match="there is no bank here"):
        Bank.open(bank.uri)
    with pytest.raises(UsageError, match="was made with another profile: 'default'"):
        Bank.create(bank.uri, manifest(profile="rich"), codebook())
    again = Bank.open_or_create(bank.uri, manifest(key_salt="f" * 32), codebook())
    assert again.manifest == bank.manifest


def test_a_damaged_log(bank):
    log = Path(bank.uri) / "codes/_delta_log/00000000000000000001.json"
    log.write_text(log.read_text()[:40])
    with pytest.raises(DamagedFile, match=r"the log of the bank's table .*codes cannot be read") as caught:
        bank.passages()
    assert "unknown>" not in str(caught.value)
    assert "bank/codes cannot be read" in _problems(bank)


def test_a_lost_table(bank):
    log = Path(bank.uri) / "documents/_delta_log"
    for one in log.iterdir():
        one.unlink()
    with pytest.raises(DamagedFile, match=r"the bank's table .*documents is not there"):
        bank.documents()
    assert "documents is not there" in _problems(bank)


def test_a_table_with_other_columns(bank):
    from deltalake import DeltaTable, Field

    DeltaTable(f"{bank.uri}/replay").alter.add_columns([Field("mood", "string")])
    with pytest.raises(IncompatibleBank, match=r"the table `replay` has other columns.*mood"):
        bank.replay()


def test_verify_finds_what_does_not_add_up(bank):
    wrong = make_slice("two", "0", numbered(5, 3))
    ledger = wrong.ledger.set_column(
        wrong.ledger.column_names.index("passages"), wrong.ledger.schema.field("passages"), [[9]]
    )
    ledger = ledger.set_column(ledger.column_names.index("documents_in"), ledger.schema.field("documents_in"), [[4]])
    object.__setattr__(wrong, "ledger", ledger)
    object.__setattr__(wrong, "documents", wrong.documents.slice(0, 2))
    commit_slice(bank, wrong, "two", "0")
    found = _problems(bank)
    assert "4 documents in, but 3 accounted for" in found
    assert "slice 0 added 9 passages; codes hold 3" in found
    assert "1 rows of codes have no row in documents" in found


def test_verify_checks_payloads_and_whole_documents(bank):
    wrong = make_slice("two", "0", numbered(5, 2), passages=2, version=3)
    payloads = wrong.codes.to_pylist()
    payloads[0]["address"], payloads[1]["words"], payloads[3]["words"] = b"short", b"1234567", b"12" * 4
    payloads[2] = payloads[0]  # passage 0 of the second document gives way to a copy of another row
    object.__setattr__(wrong, "codes", type(wrong.codes).from_pylist(payloads, wrong.codes.schema))
    commit_slice(bank, wrong, "two", "0")
    found = _problems(bank)
    assert "2 addresses do not have 27 bytes" in found
    assert "2 passages have a broken word payload" in found
    assert "1 passages are there twice" in found
    assert "1 documents lack a passage" in found
    assert "codes name codebook version 3, which is not registered" in found


def _limited(megabytes: float) -> None:
    size = int(megabytes * 2**20)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


_ADD = """
import os, sys
from bank_rows import make_slice, numbered
from mbc_core.bank import Bank, commit_slice
from mbc_core.errors import MbcError
if "as nobody" in sys.argv and os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
try:
    print(commit_slice(Bank.open(sys.argv[1]), make_slice("two", "0", numbered(5, int(sys.argv[2]))), "two", "0"))
except MbcError as error:
    print(type(error).__name__, error)
"""


def _add(bank: Bank, count: int, *arguments: str, **options: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _ADD, bank.uri, str(count), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
        **options,
    )
    return done.stdout


@pytest.mark.parametrize("megabytes", [0.001, 0.0001], ids=["the shard does not fit", "not even the log fits"])
def test_a_full_disk_stops_clearly_and_a_rerun_goes_on(bank, megabytes):
    message = _add(bank, 2000 if megabytes == 0.001 else 1, preexec_fn=lambda: _limited(megabytes))
    assert message.startswith("StorageError the bank's storage refused to write"), message
    assert "the disk or quota is full. Fix: free some space and run the same command again" in message
    assert len(shown(bank)) == 5
    assert not list(Path(bank.uri).rglob(".tmp-*"))
    assert _add(bank, 20) == "True\n"
    assert len(shown(bank)) == 25 and _problems(bank) == ""


def test_a_disk_that_fills_up_between_the_files_and_the_log(bank, monkeypatch):
    """The files fit, the Delta log does not: nothing becomes visible, and the rerun continues."""
    from mbc_core.bank import commit as commit_module

    script = _ADD.replace(
        "try:",
        "import resource\nfrom mbc_core.bank import commit as c\nreal = c.commit_files\n"
        "def full(*a):\n    resource.setrlimit(resource.RLIMIT_FSIZE, (60, resource.RLIM_INFINITY))\n"
        "    return real(*a)\n"
        "c.commit_files = full\ntry:",
    )
    monkeypatch.setattr(sys.modules[__name__], "_ADD", script)
    message = _add(bank, 20)
    assert message.startswith(f"StorageError the bank's storage refused to commit to the table {bank.uri}/replay"), (
        message
    )
    assert "the disk or quota is full" in message
    assert len(shown(bank)) == 5
    assert commit_slice(bank, make_slice("two", "0", numbered(5, 20)), "two", "0") is True
    assert len(shown(bank)) == 25 and commit_module.finished_slices(bank, "two") == {"0"}


@pytest.fixture
def small_disk(tmp_path):
    """A real full disk where this user may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this user may not mount a small tmpfs; RLIMIT_FSIZE stands in above")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_real_full_disk(small_disk):
    bank = make_bank(small_disk / "bank")
    with pytest.raises(StorageError, match=r"refused to .*the disk or quota is full"):
        for number in range(100):
            commit_slice(bank, make_slice("one", str(number), numbered(200 * number, 200)), "one", str(number))
    count = len(shown(bank))
    assert count == 200 * number > 0
    (small_disk / "bank" / "index").mkdir()
    subprocess.run(["mount", "-o", "remount,size=2m", str(small_disk)], check=True)
    assert commit_slice(bank, make_slice("one", str(number), numbered(200 * number, 200)), "one", str(number))
    assert len(shown(bank)) == count + 200 and _problems(bank) == ""


@pytest.mark.parametrize("forbidden", ["documents", "codes/_delta_log"])
def test_no_permission(bank, forbidden):
    root = Path(bank.uri)
    for one in root.parents:  # let another user reach the bank
        if one.stat().st_uid == os.getuid() and one != Path("/"):
            one.chmod(0o755)
    _allow(root, True)
    _allow(root / forbidden, False)
    message = _add(bank, 3, "as nobody")
    _allow(root / forbidden, True)
    assert message.startswith("StorageError the bank's storage refused to"), message
    assert "this user may not touch it. Fix: change its owner or mode" in message
    assert len(shown(bank)) == 5
    assert _add(bank, 3, "as nobody") == "True\n"
    assert len(shown(bank)) == 8


def _allow(root: Path, writing: bool) -> None:
    for one in [root, *root.rglob("*")]:
        one.chmod((0o777 if writing else 0o555) if one.is_dir() else (0o666 if writing else 0o444))
