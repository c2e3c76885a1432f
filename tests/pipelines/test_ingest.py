"""The whole job on a tiny encoder: equal to a plain loop, exactly once, nothing lost, errors that say what to do."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from oracle import empty_bank, held, plain_loop
from tiny import POISON, TinySpec, corpus, settings, to_line, write_corpus

from mbc_core.bank import Bank
from mbc_core.errors import DamagedFile, MbcError, ModelError, StorageError, UsageError
from pipelines import ingest as ingest_module
from pipelines import opening
from pipelines.ingest import main, run_ingest
from pipelines.progress import ENCODED
from schemas.document import Document
from schemas.results import IngestResult

DOCUMENTS = corpus(150)


def ingest(sources, bank, given, **options):
    return run_ingest([str(one) for one in sources], str(bank), given, show_progress=False, **options)


def adds_up(result) -> bool:
    counted = sum(result[name] for name in ("documents", "duplicates", "replaced", "dead_letters"))
    return result["documents_in"] == counted


@pytest.fixture(scope="module")
def expected():
    return plain_loop(DOCUMENTS)


@pytest.mark.parametrize(("slice_documents", "batch_documents"), [(1000, 512), (40, 7)])
def test_the_pipeline_is_the_plain_loop_bit_for_bit(tmp_path, expected, slice_documents, batch_documents):
    given = settings(tmp_path / "w", slice_documents=slice_documents, batch_documents=batch_documents)
    source = write_corpus(tmp_path / "a.jsonl", reversed(DOCUMENTS))
    bank = empty_bank(tmp_path / "bank", given)
    result = ingest([source], bank.uri, given)
    found = held(bank)
    assert found.codes == expected.codes
    assert found.digests == expected.digests
    assert len(found.digests) > 3, "the corpus must see several codebook versions"
    assert result["codebook_version"] == len(found.digests) - 1
    assert {row[4] for row in found.codes.values()} >= {0, 1, 2}
    assert result["slices"] == -(-len(DOCUMENTS) // slice_documents)
    assert set(IngestResult.__annotations__) <= set(result)
    assert (result["documents"], result["passages"]) == (150, len(expected.codes))
    assert result["windows"] == 10
    documents = bank.documents()
    assert {row["doc_id"] for row in documents.values()} == {one.doc_id for one in DOCUMENTS}
    assert all(row["text_zstd"] is None for row in documents.values())
    assert ENCODED.value == 150


def test_given_questions_go_into_replay_as_they_are(tmp_path):
    asked = Document("q", "A text about Paris and France.", event_time=0, qa=(("Capital of France?", "Paris"),))
    ingest([write_corpus(tmp_path / "a.jsonl", [asked])], tmp_path / "bank", settings(tmp_path / "w"))
    rows = Bank.open(tmp_path / "bank").read("replay").to_pylist()
    assert [(row["question"], row["answer"]) for row in rows] == [("Capital of France?", "Paris")]


def test_every_bad_record_is_a_dead_letter_with_its_reason_and_counts_add_up(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    newest = Document("twice", "Newest text of it.", event_time=2_000_000)
    bad = [
        b"not json\n",
        b'{"id": "u", "text": "\xff"}\n',
        b'{"text": "no id"}\n',
        b'{"id": "no-text"}\n',
        b'{"id": "big", "text": "' + b"x" * (10 << 20) + b'"}\n',
        b'{"id": "date", "text": "t", "timestamp": "soon"}\n',
        to_line(Document("twice", "Older text of it.", event_time=1_000_000)),
        to_line(newest),
        to_line(Document("poison", f"This {POISON} cannot be encoded.", event_time=0)),
    ]
    (folder / "bad.jsonl").write_bytes(b"".join(bad))
    (folder / "empty.jsonl").write_bytes(b"")
    write_corpus(folder / "good.jsonl", corpus(30))
    result = ingest([folder], tmp_path / "bank", settings(tmp_path / "w"))
    assert result["dead_letters_by_reason"] == {
        "not_json": 1, "not_utf8": 1, "no_id": 1, "no_text": 2, "text_too_long": 1, "bad_timestamp": 1,
        "encode_failed": 1,
    }  # fmt: skip
    assert (result["documents"], result["replaced"], result["dead_letters"]) == (31, 1, 8)
    assert result["documents_in"] == 40
    assert adds_up(result)
    bank = Bank.open(tmp_path / "bank")
    letters = {row["reason"]: row for row in bank.read("dead_letter").to_pylist()}
    assert letters["not_json"]["raw"] == b"not json\n"
    assert letters["not_json"]["source"].endswith("bad.jsonl")
    assert len(letters["text_too_long"]["raw"]) == 64 * 1024
    assert letters["encode_failed"]["key"] == Document("poison", "x").key(bank.manifest.salt)
    assert "ValueError: cannot encode" in letters["encode_failed"]["message"]
    kept = bank.documents([newest.key(bank.manifest.salt)])
    assert [row["content_hash"] for row in kept.values()] == [newest.content_hash(bank.manifest.salt)]


def test_an_encoder_that_fails_everywhere_stops_the_run(tmp_path):
    documents = [Document(str(number), f"{POISON} {number}", event_time=0) for number in range(20)]
    with pytest.raises(Exception, match="cannot encode"):
        ingest([write_corpus(tmp_path / "a.jsonl", documents)], tmp_path / "bank", settings(tmp_path / "w"))
    assert Bank.open(tmp_path / "bank").read("codes").num_rows == 0


def test_a_file_that_vanishes_while_others_are_read(tmp_path, monkeypatch):
    write_corpus(tmp_path / "a.jsonl", corpus(5))
    write_corpus(tmp_path / "b.jsonl", corpus(5, start=5))
    real = ingest_module.read_source

    def vanishing(source, stdin):
        if source.path.endswith("a.jsonl"):
            (tmp_path / "b.jsonl").unlink()
        return real(source, stdin)

    monkeypatch.setattr(ingest_module, "read_source", vanishing)
    result = ingest([tmp_path / "*.jsonl"], tmp_path / "bank", settings(tmp_path / "w"))
    assert (result["documents"], result["dead_letters_by_reason"]) == (5, {"source_vanished": 1})
    assert adds_up(result)


def test_the_same_run_again_does_nothing_and_says_the_same(tmp_path):
    given = settings(tmp_path / "w", slice_documents=20)
    source = write_corpus(tmp_path / "a.jsonl", corpus(50))
    first = ingest([source], tmp_path / "bank", given)
    moved = tmp_path / "other-name.jsonl"
    Path(source).rename(moved)
    second = ingest([moved], tmp_path / "bank", given)
    counts = ("ingest_id", "documents", "passages", "duplicates", "codebook_version", "windows", "slices")
    assert [first[name] for name in counts] == [second[name] for name in counts]
    assert (first["slices_skipped"], second["slices_skipped"]) == (0, 3)
    assert Bank.open(tmp_path / "bank").read("ledger").num_rows > 0
    assert second["documents_per_second"] == 0


def test_more_documents_later_only_the_new_ones_count(tmp_path):
    given = settings(tmp_path / "w")
    ingest([write_corpus(tmp_path / "a.jsonl", corpus(30))], tmp_path / "bank", given)
    revised = Document("doc-3", "Another text altogether.", event_time=5_000_000)
    more = [*corpus(30), revised, *corpus(4, start=100)]
    result = ingest([write_corpus(tmp_path / "a.jsonl", more)], tmp_path / "bank", given)
    # doc-3's old text has a later date than the revision, so within this run it wins, and is a duplicate
    newer = Document("doc-3", "Yet another text.", event_time=10**15)
    assert (result["documents"], result["duplicates"], result["replaced"]) == (4, 30, 1)
    result = ingest([write_corpus(tmp_path / "a.jsonl", [newer])], tmp_path / "bank", given)
    assert (result["documents"], result["duplicates"]) == (1, 0)
    bank = Bank.open(tmp_path / "bank")
    assert len(bank.documents()) == 34
    assert bank.documents([newer.key(bank.manifest.salt)])[newer.key(bank.manifest.salt)]["event_time"].year == 2001


def test_going_back_to_an_earlier_text_is_a_new_run(tmp_path):
    given = settings(tmp_path / "w")
    old, new = Document("x", "The old text.", event_time=0), Document("x", "The new text.", event_time=0)
    for number, one in enumerate((old, new, old, old, new)):
        result = ingest([write_corpus(tmp_path / "a.jsonl", [one])], tmp_path / "bank", given)
        bank = Bank.open(tmp_path / "bank")
        (shown,) = bank.documents().values()
        assert shown["content_hash"] == one.content_hash(bank.manifest.salt), number
        assert adds_up(result)
    assert bank.read("documents").num_rows == 4, "the fourth run repeats the third and adds nothing"
    assert result["ingest_id"].endswith("-2")


def test_a_revision_added_by_a_machine_whose_clock_is_behind_is_the_newest(tmp_path, monkeypatch):
    given = settings(tmp_path / "w")
    old, new = Document("x", "The old text.", event_time=0), Document("x", "The new text.", event_time=0)
    ingest([write_corpus(tmp_path / "a.jsonl", [old])], tmp_path / "bank", given)
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() - 3_600 * 10**9)
    result = ingest([write_corpus(tmp_path / "a.jsonl", [new])], tmp_path / "bank", given)
    bank = Bank.open(tmp_path / "bank")
    (shown,) = bank.documents().values()
    assert (result["documents"], shown["content_hash"]) == (1, new.content_hash(bank.manifest.salt))


def test_a_given_ingest_id_with_other_documents_still_drops_duplicates(tmp_path):
    given = settings(tmp_path / "w", ingest_id="nightly")
    ingest([write_corpus(tmp_path / "a.jsonl", corpus(10))], tmp_path / "bank", given)
    result = ingest([write_corpus(tmp_path / "a.jsonl", corpus(15))], tmp_path / "bank", given)
    assert (result["ingest_id"], result["documents"], result["duplicates"]) == ("nightly", 5, 10)
    assert len(Bank.open(tmp_path / "bank").documents()) == 15


def test_standard_input(tmp_path):
    stream = io.BytesIO(b"".join(to_line(one) for one in corpus(6)))
    result = ingest(["-"], tmp_path / "bank", settings(tmp_path / "w"), stdin=stream)
    assert result["documents"] == 6


def test_texts_are_kept_only_when_asked_for(tmp_path):
    import zstandard

    source = write_corpus(tmp_path / "a.jsonl", corpus(3))
    ingest([source], tmp_path / "bank", settings(tmp_path / "w", keep_text=True))
    rows = Bank.open(tmp_path / "bank").read("documents").to_pylist()
    texts = {row["doc_id"]: zstandard.ZstdDecompressor().decompress(row["text_zstd"]).decode() for row in rows}
    assert texts == {one.doc_id: one.text for one in corpus(3)}


def test_staging_is_empty_afterwards_also_after_an_error(tmp_path):
    given = settings(tmp_path / "w")
    ingest([write_corpus(tmp_path / "a.jsonl", corpus(3))], tmp_path / "bank", given)
    assert list(given.staging.iterdir()) == []
    documents = [Document(str(number), f"{POISON} {number}", event_time=0) for number in range(9)]
    with pytest.raises(Exception, match="cannot encode"):
        ingest([write_corpus(tmp_path / "a.jsonl", documents)], tmp_path / "bank", given)
    assert list(given.staging.iterdir()) == []


def test_a_bank_made_with_another_encoder_is_refused_by_name(tmp_path, monkeypatch):
    given = settings(tmp_path / "w")
    source = write_corpus(tmp_path / "a.jsonl", corpus(3))
    ingest([source], tmp_path / "bank", given)
    with pytest.raises(UsageError, match="was made with another window_seconds: 86400"):
        ingest([source], tmp_path / "bank", settings(tmp_path / "w", window_seconds=3600))
    monkeypatch.setattr("tiny.TinyEncoder.encoder_id", "other@1/float32/words-12")
    with pytest.raises(UsageError, match=r"was made with another encoder: 'tiny@000000000000/float32/words-12'"):
        ingest([source], tmp_path / "bank", settings(tmp_path / "w", encoder=TinySpec("again")))


def test_a_bank_keeps_its_profile_and_window_when_none_is_named(tmp_path):
    given = settings(tmp_path / "w", profile="rich", window_seconds=3600)
    source = write_corpus(tmp_path / "a.jsonl", corpus(3))
    ingest([source], tmp_path / "bank", given)
    ingest([source], tmp_path / "bank", settings(tmp_path / "w"))
    manifest = Bank.open(tmp_path / "bank").manifest
    assert (manifest.profile, manifest.words, manifest.window_seconds) == ("rich", 41, 3600)


def test_storage_errors_of_workers_keep_their_kind_and_words(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise StorageError("the bank's storage refused to write", value="x", cause="the disk or quota is full")

    monkeypatch.setattr("pipelines.sink.write_slice_rows", refuse)
    with pytest.raises(StorageError, match=r"refused to write: 'x'\. Likely cause: the disk or quota is full\.$"):
        ingest([write_corpus(tmp_path / "a.jsonl", corpus(3))], tmp_path / "bank", settings(tmp_path / "w"))


def test_counts_that_do_not_add_up_are_raised_and_nothing_becomes_visible(tmp_path, monkeypatch):
    """A step that loses a document must not pass: here the writer of shards forgets to count one."""
    from pipelines import sink
    from pipelines.records import Tally

    real = sink._shard_tallies
    monkeypatch.setattr(sink, "_shard_tallies", lambda batch: [*real(batch), Tally("undated", documents=-1)])
    with pytest.raises(MbcError, match="the counts of the window undated do not add up: '2 documents in, 1 of them"):
        ingest([write_corpus(tmp_path / "a.jsonl", corpus(8))], tmp_path / "bank", settings(tmp_path / "w"))
    assert Bank.open(tmp_path / "bank").read("codes").num_rows == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"profile": "tiny"}, "the profile is unknown: 'tiny'"),
        ({"slice_documents": 0}, "`slice_documents` must be at least 1: 0"),
        ({"shards": 0}, "`shards` must be at least 1: 0"),
    ],
)
def test_impossible_settings(tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        settings(tmp_path / "w", **changes)


def test_ingest_ids_that_name_no_folder(tmp_path):
    with pytest.raises(UsageError, match="the ingest id cannot be used: 'a/b'"):
        ingest(
            [write_corpus(tmp_path / "a.jsonl", corpus(2))],
            tmp_path / "bank",
            settings(tmp_path / "w", ingest_id="a/b"),
        )


def test_command_line_prints_json_and_exit_codes(tmp_path, monkeypatch, capsys):
    given = settings(tmp_path / "w")
    monkeypatch.setattr(opening, "encoder_of", lambda *args: TinySpec())
    monkeypatch.setattr(opening, "rotation_of", lambda *args: given.rotation)
    monkeypatch.setattr(opening, "codebook_of", lambda *args: given.codebook)
    source = write_corpus(tmp_path / "a.jsonl", corpus(4))
    arguments = [source, "--bank", str(tmp_path / "bank"), "--window=12h", "--ingest-id=cli", "--json"]
    assert main([*arguments, "--direct_num_workers=1"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["ingest_id"], result["documents"]) == ("cli", 4)
    assert Bank.open(tmp_path / "bank").manifest.window_seconds == 43_200
    assert main([str(tmp_path / "missing.jsonl"), "--bank", str(tmp_path / "bank")]) == 2
    assert "the source does not exist" in capsys.readouterr().err
    assert main([source, "--bank", str(tmp_path / "bank"), "--window=soon"]) == 2
    assert "the window length cannot be read: 'soon'" in capsys.readouterr().err


def test_an_interrupted_command_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(ingest_module, "run_ingest", interrupt)
    assert main(["a.jsonl", "--bank", str(tmp_path / "bank")]) == 1
    assert "interrupted: finished slices are kept; the same command goes on from here" in capsys.readouterr().err


def test_an_interrupt_inside_a_step_stays_an_interrupt(tmp_path, monkeypatch):
    def interrupt(self, texts, progress=None):
        raise KeyboardInterrupt

    monkeypatch.setattr("tiny.TinyEncoder.encode", interrupt)
    given = settings(tmp_path / "w")
    with pytest.raises(KeyboardInterrupt):
        ingest([write_corpus(tmp_path / "a.jsonl", corpus(3))], tmp_path / "bank", given)
    assert list(given.staging.iterdir()) == []


def test_weights_that_are_not_there(tmp_path):
    source = write_corpus(tmp_path / "a.jsonl", corpus(2))
    with pytest.raises(ModelError, match=r"a model or weight file is not there: '/nowhere/rotation'"):
        ingest([source], tmp_path / "bank", settings(tmp_path / "w", rotation="/nowhere/rotation"))
    damaged = tmp_path / "codebook"
    damaged.write_bytes(b"not safetensors")
    with pytest.raises(DamagedFile, match="codebook cannot be read"):
        ingest([source], tmp_path / "bank", settings(tmp_path / "w", codebook=str(damaged)))
    assert not (tmp_path / "bank").exists(), "nothing is made before everything is checked"


@pytest.mark.slow
def test_worker_processes_give_the_same_bank(tmp_path, expected):
    """``multi_processing`` pickles the whole graph: the local stand-in for distributed workers."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import tiny; from pathlib import Path\n"
        "from oracle import empty_bank; from pipelines.ingest import run_ingest\n"
        "given = tiny.settings(Path(sys.argv[2]) / 'w', slice_documents=1000, batch_documents=20)\n"
        "bank = empty_bank(sys.argv[2] + '/bank', given)\n"
        "source = tiny.write_corpus(Path(sys.argv[2]) / 'a.jsonl', tiny.corpus(150))\n"
        "args = ['--direct_running_mode=multi_processing', '--direct_num_workers=2']\n"
        "print(run_ingest([source], bank.uri, given, beam_args=args, show_progress=False))\n"
    )
    here = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([here, str(Path(here).parents[1])])}
    done = subprocess.run(
        [sys.executable, "-c", script, here, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = held(Bank.open(tmp_path / "bank"))
    assert found.codes == expected.codes
    assert found.digests == expected.digests
