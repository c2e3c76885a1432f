"""`mbc migrate`: the same documents in a new bank, from sources or stored texts, or a refusal by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import POISON, RULE, SLOTS, codebook, corpus, settings, to_line, write_corpus

from mbc_core.bank import Bank, register_codebook
from mbc_core.bank.forget import forget
from mbc_core.canary import CanaryRow, canary_files, load_canary, save_canary
from mbc_core.errors import UsageError
from pipelines import migrate as migrate_module
from pipelines.ingest import run_ingest
from pipelines.main import main
from pipelines.migrate import MigrateResult, run_migrate
from schemas.document import document_key

DOCUMENTS = corpus(24)


def make(tmp_path: Path, documents=DOCUMENTS, **changes) -> Bank:
    given = settings(tmp_path / "w", **changes)
    run_ingest(
        [write_corpus(tmp_path / "a.jsonl", documents)], str(tmp_path / "old"), given, show_progress=False
    )  # fmt: skip
    return Bank.open(tmp_path / "old")


def move(tmp_path: Path, *sources: str, **changes) -> tuple[MigrateResult, Bank]:
    given = settings(tmp_path / "w", **changes)
    old, new = str(tmp_path / "old"), str(tmp_path / "new")
    result = run_migrate(old, new, list(sources), given, show_progress=False)
    bank = Bank.open(new)
    assert bank.inspect(verify=True)["problems"] == []
    parts = ("from_sources", "changed", "from_text")
    assert result["documents"] == sum(result[name] for name in parts)
    return result, bank


def contents(bank: Bank) -> list[tuple[object, ...]]:
    names = ("key", "doc_id", "title", "uri", "content_hash", "event_time")
    return sorted(tuple(row[name] for name in names) for row in bank.documents().values())


def passages(bank: Bank) -> list[tuple[object, ...]]:
    names = ("key", "passage", "event_time", "window", "address", "words", "codebook_version")
    return [tuple(row[name] for name in names) for row in bank.passages().to_pylist()]


def test_the_canary_set_that_counts_goes_with_the_bank(tmp_path):
    old = make(tmp_path)
    for number in range(2):
        save_canary(old, [CanaryRow(f"Who is {number}?", "N", ("words",), (7,), 0, 7)])
    _, new = move(tmp_path, str(tmp_path / "a.jsonl"))
    assert canary_files(new) == canary_files(old)[-1:] and load_canary(new) == load_canary(old)


def test_from_sources_the_new_bank_is_the_old_one_anew(tmp_path):
    old = make(tmp_path)
    result, new = move(tmp_path, str(tmp_path / "a.jsonl"))
    assert (result["from_sources"], result["not_in_bank"], result["dead_letters"]) == (24, 0, 0)
    assert contents(new) == contents(old)
    assert passages(new) == passages(old)
    assert new.manifest.key_salt == old.manifest.key_salt


def test_from_stored_texts(tmp_path):
    with_questions = [replace(one, qa=((f"What is {one.doc_id}?", "a word"),)) for one in DOCUMENTS[:5]]
    old = make(tmp_path, with_questions + DOCUMENTS[5:], keep_text=True, replay_per_window=1000)
    (tmp_path / "a.jsonl").unlink()
    result, new = move(tmp_path, replay_per_window=1000)
    assert (result["from_text"], result["from_sources"]) == (24, 0)
    assert contents(new) == contents(old) and passages(new) == passages(old)
    texts = {row["doc_id"]: row["text_zstd"] for row in new.documents().values()}
    assert texts == {row["doc_id"]: row["text_zstd"] for row in old.documents().values()}
    asked = [
        sorted(zip(*(one.replay()[name].to_pylist() for name in ("question", "answer")), strict=True))
        for one in (old, new)
    ]
    assert asked[0] == asked[1]
    again = run_ingest(
        [write_corpus(tmp_path / "b.jsonl", with_questions + DOCUMENTS[5:])], new.uri, settings(tmp_path / "w"),
        show_progress=False,
    )  # fmt: skip
    assert (again["duplicates"], again["documents"]) == (24, 0), "the sources are known to the new bank"


def test_texts_that_are_nowhere_are_refused_by_name_before_anything_is_written(tmp_path):
    make(tmp_path)
    some = write_corpus(tmp_path / "some.jsonl", DOCUMENTS[:20])
    with pytest.raises(UsageError, match=r"the texts of 4 of 24 documents are not known: \['doc-2.*'…'\].*--source"):
        move(tmp_path, some)
    with pytest.raises(UsageError, match=r"the texts of 24 of 24 documents are not known.*without --keep-text"):
        move(tmp_path)
    assert not (tmp_path / "new").exists()


def test_sources_and_stored_texts_together(tmp_path):
    make(tmp_path, DOCUMENTS[:10], keep_text=True)
    run_ingest(
        [write_corpus(tmp_path / "b.jsonl", DOCUMENTS[10:])], str(tmp_path / "old"), settings(tmp_path / "w"),
        show_progress=False,
    )  # fmt: skip
    changed = [replace(one, text=f"{one.text} Changed since.") for one in DOCUMENTS[8:12]]
    lines = [to_line(one) for one in changed + DOCUMENTS[12:] + corpus(26)[24:]] + [b"not json\n"]
    (tmp_path / "c.jsonl").write_bytes(b"".join(lines))
    result, new = move(tmp_path, str(tmp_path / "c.jsonl"))
    assert (result["from_text"], result["from_sources"], result["changed"], result["not_in_bank"]) == (10, 12, 2, 3)
    assert {one for one, *_ in contents(new)} == {one for one, *_ in contents(Bank.open(tmp_path / "old"))}
    kept = {row["doc_id"]: row["content_hash"] for row in Bank.open(tmp_path / "old").documents().values()}
    differ = {row["doc_id"] for row in new.documents().values() if kept[row["doc_id"]] != row["content_hash"]}
    assert differ == {"doc-10", "doc-11"}, "where the bank has no text of its own, the source's is taken"


def test_of_several_records_the_one_that_the_bank_shows_is_taken(tmp_path):
    old = make(tmp_path)
    later = [replace(one, text="Newer text.", event_time=4_000_000_000_000_000) for one in DOCUMENTS]
    both = write_corpus(tmp_path / "both.jsonl", later + DOCUMENTS)
    result, new = move(tmp_path, both)
    assert (result["from_sources"], result["changed"]) == (24, 0) and contents(new) == contents(old)


def test_only_the_newest_revision_moves_and_what_was_forgotten_stays_forgotten(tmp_path):
    old = make(tmp_path)
    revised = [replace(DOCUMENTS[3], text="A revised text of few words.")]
    run_ingest([write_corpus(tmp_path / "b.jsonl", revised)], old.uri, settings(tmp_path / "w"), show_progress=False)
    forget(old, ["doc-5"])
    result, new = move(tmp_path, str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    assert (result["documents"], result["tombstones"], result["not_in_bank"]) == (23, 1, 1)
    assert contents(new) == contents(old)
    again = run_ingest([str(tmp_path / "a.jsonl")], new.uri, settings(tmp_path / "w"), show_progress=False)
    assert document_key("doc-5", new.manifest.salt) not in new.documents()
    assert again["dead_letters_by_reason"] == {"forgotten": 1}


def test_another_profile_and_a_window_length_of_its_own(tmp_path):
    make(tmp_path, window_seconds=3_600)
    _, new = move(tmp_path, str(tmp_path / "a.jsonl"), profile="rich")
    assert (new.manifest.profile, new.manifest.words, new.manifest.window_seconds) == ("rich", 41, 3_600)
    assert new.inspect()["documents"] == 24


def test_a_bank_whose_codebook_versions_are_used_up_learns_again(tmp_path):
    old = make(tmp_path, corpus(60))
    learned = len(old.codebooks().versions)
    assert learned > 1
    for version in range(learned, 64):
        head = old.codebook(version - 1)
        register_codebook(old, replace(head, version=version, parent=version - 1))
    assert any(line.startswith("64 codebook versions are used up") for line in old.inspect(verify=True)["information"])
    result, new = move(tmp_path, str(tmp_path / "a.jsonl"))
    assert result["codebook_version"] == len(new.codebooks().versions) - 1 == learned - 1
    assert new.codebook(0).digest == codebook().digest and RULE.min_vectors == 40 * SLOTS


def test_documents_that_cannot_be_encoded_any_more_are_counted(tmp_path, monkeypatch):
    make(tmp_path)
    monkeypatch.setattr("tiny.TinyEncoder.encode", refusing("Word61"))
    result, new = move(tmp_path, str(tmp_path / "a.jsonl"))
    assert result["dead_letters"] > 0
    assert new.inspect()["documents"] == 24 - result["dead_letters"]


def refusing(word):
    from tiny import TinyEncoder

    encode = TinyEncoder.encode

    def refuse(self, texts, progress=None):
        return encode(self, [text.replace(word, POISON) for text in texts], progress)

    return refuse


def test_an_interrupted_migration_goes_on_with_the_same_command(tmp_path, monkeypatch):
    old = make(tmp_path, slice_documents=8)

    class Died(BaseException):
        pass

    from pipelines import sink

    real, seen = sink.commit, []

    def commit(bank, slice_id, *arguments):
        seen.append(slice_id.name)
        if len(seen) == 2:
            raise Died
        return real(bank, slice_id, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(sink, "commit", commit)
        with pytest.raises(RuntimeError, match="Died"):
            move(tmp_path, str(tmp_path / "a.jsonl"), slice_documents=8)
    assert 0 < Bank.open(tmp_path / "new").inspect()["documents"] < 24
    result, new = move(tmp_path, str(tmp_path / "a.jsonl"), slice_documents=8)
    assert (result["documents"], result["from_sources"]) == (24, 24)
    assert contents(new) == contents(old) and passages(new) == passages(old)
    assert move(tmp_path, str(tmp_path / "a.jsonl"), slice_documents=8)[0]["passages"] == result["passages"]


def test_a_place_that_holds_something_else_is_refused(tmp_path):
    old = make(tmp_path)
    source = str(tmp_path / "a.jsonl")
    with pytest.raises(UsageError, match=r"a bank cannot be migrated onto itself"):
        run_migrate(old.uri, old.uri, [source], settings(tmp_path / "w"))
    run_ingest([source], str(tmp_path / "new"), settings(tmp_path / "w"), show_progress=False)
    with pytest.raises(UsageError, match=r"another bank is there already: .*name a new place with --to"):
        move(tmp_path, source)
    with pytest.raises(UsageError, match=r"standard input cannot be a source of a migration"):
        run_migrate(old.uri, str(tmp_path / "other"), ["-"], settings(tmp_path / "w"))
    with pytest.raises(UsageError, match="there is no bank here"):
        run_migrate(str(tmp_path / "nowhere"), str(tmp_path / "other"), [source], settings(tmp_path / "w"))


def test_the_command(tmp_path, monkeypatch, capsys):
    make(tmp_path)
    real = migrate_module.run_migrate

    def run_migrate(bank, to, sources, given):
        return real(bank, to, sources, settings(tmp_path / "w", profile=given.profile), show_progress=False)

    monkeypatch.setattr(migrate_module, "run_migrate", run_migrate)
    words = ["migrate", "--bank", str(tmp_path / "old"), "--to", str(tmp_path / "new")]
    assert main([*words, "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "the texts of 24 of 24 documents are not known" in captured.err
    assert main([*words, "--source", str(tmp_path / "a.jsonl"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == set(MigrateResult.__annotations__) and found["from_sources"] == 24
    assert main([*words, "--source", str(tmp_path / "a.jsonl")]) == 0
    assert "24 documents = 24 from their sources + 0 whose source has changed" in capsys.readouterr().out
