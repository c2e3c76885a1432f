"""The adaptation job on tiny models: from ingested documents to a stored, judged and perhaps promoted candidate."""

from __future__ import annotations

import json

import pytest
import tiny_reader
from tiny import TinyEncoder, corpus, rotation, settings, write_corpus

from mbc_core.adapters import AdapterRegistry
from mbc_core.bank import Bank
from mbc_core.errors import UsageError
from mbc_core.lexicon import Lexicon
from mbc_core.training import adapt as core
from mbc_core.training.adapt import AdaptRun
from pipelines import adapt as job
from pipelines.adapt import main, run_adapt, run_of
from pipelines.ingest import run_ingest
from schemas.results import AdaptResult


@pytest.fixture(scope="module")
def bank(tmp_path_factory) -> Bank:
    folder = tmp_path_factory.mktemp("adapt")
    given = settings(folder / "w", replay_per_window=64)
    run_ingest([write_corpus(folder / "a.jsonl", corpus(100))], str(folder / "bank"), given, show_progress=False)
    return Bank.open(folder / "bank")


def pieces():
    return {
        "language_model": tiny_reader.language_model(),
        "encoder": TinyEncoder(),
        "lexicon": Lexicon([]),
        "rotation": rotation(),
    }


@pytest.mark.slow
def test_a_candidate_is_stored_with_its_figures_and_promoted_by_the_rule(bank, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr(core, "decide", lambda before, after: (True, "better by decree"))
    result = run_adapt(bank, AdaptRun(steps=2, batch=4), say=told.append, **pieces())
    assert set(AdaptResult.__annotations__) == set(result)
    assert (result["promoted"], result["reason"], result["steps"]) == (True, "better by decree", 2)
    registry, digest = AdapterRegistry(bank), tiny_reader.language_model().digest
    assert registry.live(digest) == result["candidate"]
    card = registry.info(result["candidate"]).card
    assert (card["before"], card["after"], card["started_from"]) == (result["before"], result["after"], None)
    assert any("questions from the bank's replay" in line for line in told)

    monkeypatch.setattr(core, "decide", lambda before, after: (False, "worse by decree"))
    second = run_adapt(bank, AdaptRun(steps=1, batch=4), **pieces())
    assert second["promoted"] is False
    assert registry.live(digest) == result["candidate"], "a refused candidate stays a candidate"
    assert registry.info(second["candidate"]).card["started_from"] == result["candidate"]
    assert job._last_adapted(registry, digest).isoformat() == card["created_at"]


def test_an_empty_bank_has_nothing_to_adapt_to(tmp_path):
    given = settings(tmp_path / "w", replay_per_window=0)
    run_ingest([write_corpus(tmp_path / "a.jsonl", corpus(5))], str(tmp_path / "bank"), given, show_progress=False)
    with pytest.raises(UsageError, match="the bank offers nothing to adapt to: '0 replay questions"):
        run_adapt(tmp_path / "bank", AdaptRun(steps=1), **pieces())


def test_steps_and_minutes():
    assert run_of(None, None) == AdaptRun()
    assert (run_of(7, None).steps, run_of(7, None).minutes) == (7, None)
    assert (run_of(None, 1.5).steps, run_of(None, 1.5).minutes) == (None, 1.5)


def test_command_line(bank, monkeypatch, capsys):
    seen = {}

    def fake(where, run, *, device, language_model, adapter, say):
        seen.update(where=where, run=run, device=device, language_model=language_model, adapter=adapter)
        say("training")
        return {"candidate": "0001-0123456789abcdef", "promoted": False}

    monkeypatch.setattr(job, "run_adapt", fake)
    assert main(["--bank", bank.uri, "--minutes", "2", "--json", "--runner=DataflowRunner"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["candidate"] == "0001-0123456789abcdef"
    assert printed.err == "training\n"
    assert (seen["where"], seen["run"].minutes, seen["run"].steps) == (bank.uri, 2.0, None)
    assert seen["language_model"] is seen["adapter"] is None
    monkeypatch.undo()
    assert main(["--bank", bank.uri + "-missing"]) == 2
    assert "there is no bank here" in capsys.readouterr().err
