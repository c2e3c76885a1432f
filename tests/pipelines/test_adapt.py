"""The adaptation job on tiny models: from ingested documents to a stored, judged and perhaps promoted candidate."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path

import pytest
import tiny_reader
from click.testing import CliRunner
from tiny import TinyEncoder, corpus, rotation, settings, write_corpus

from mbc_core.adapters import AdapterRegistry
from mbc_core.bank import Bank
from mbc_core.canary import load_canary
from mbc_core.errors import LostRace, UsageError
from mbc_core.lexicon import Lexicon
from mbc_core.training import adapt as core
from mbc_core.training import candidate as adding
from mbc_core.training.adapt import AdaptRun
from mbc_core.training.candidate import add_candidate
from mbc_core.training.gate import Decision, GateRule
from mbc_core.training.set_file import load_set
from pipelines import adapt as job
from pipelines.adapt import adapt_from_set, main, run_adapt, write_set
from pipelines.adapt_command import adapt as command
from pipelines.adapt_options import AdaptSettings, parse
from pipelines.adapt_start import live_beside
from pipelines.ingest import run_ingest
from schemas.results import AdaptResult, AddResult, SetResult

RUN = AdaptRun(steps=2, batch=4, patience=None)


@pytest.fixture(scope="module")
def bank(tmp_path_factory) -> Bank:
    folder = tmp_path_factory.mktemp("adapt")
    given = settings(folder / "w", replay_per_window=64)
    run_ingest([write_corpus(folder / "a.jsonl", corpus(100))], str(folder / "bank"), given, show_progress=False)
    return Bank.open(folder / "bank")


def bank_pieces():
    return {"encoder": TinyEncoder(), "lexicon": Lexicon([]), "rotation": rotation()}


def pieces():
    return {"language_model": tiny_reader.language_model(), **bank_pieces()}


def by_decree(monkeypatch, promote: bool) -> None:
    """The gate's word, whatever the scores."""
    reason = "promoted" if promote else "new not better"

    def decree(before, after, documents=None, rule=None):
        return Decision(promote, reason, f"{reason} by decree", {}, {}, rule or GateRule())

    monkeypatch.setattr(core, "decide", decree)
    monkeypatch.setattr(adding, "decide", decree)


@pytest.mark.slow
def test_a_candidate_is_stored_with_its_lineage_and_promoted_by_the_gate(bank, monkeypatch):
    told: list[str] = []
    by_decree(monkeypatch, True)
    result = run_adapt(bank, RUN, say=told.append, **pieces())
    assert set(AdaptResult.__annotations__) == set(result)
    assert (result["promoted"], result["passed"], result["reason"], result["steps"]) == (True, True, "promoted", 2)
    registry, digest = AdapterRegistry(bank), tiny_reader.language_model().digest
    assert registry.live(digest) == result["candidate"]
    card = registry.info(result["candidate"]).card
    assert (card["before"], card["after"], card["started_from"]) == (result["before"], result["after"], None)
    assert card["decision"]["sentence"] == "promoted by decree" and card["base_digest"] == digest
    assert (card["seed"], card["parent_sha256"], card["codebook_versions"][0]) == (0, None, 0)
    assert sum(card["replay"]["train"].values()) == result["held_out"]["train"] > 0
    assert datetime.fromisoformat(card["instant"]) <= datetime.now(UTC) and "+" in card["code_version"]
    assert any("questions from the bank's replay" in line for line in told)

    by_decree(monkeypatch, False)
    second = run_adapt(bank, RUN, **pieces())
    assert (second["promoted"], second["reason"]) == (False, "new not better")
    assert registry.live(digest) == result["candidate"], "a refused candidate stays a candidate"
    child = registry.info(second["candidate"]).card
    assert child["started_from"] == result["candidate"]
    assert child["parent_sha256"] == card["files"]["adapter_model.safetensors"]
    assert child["since"] == datetime.fromisoformat(card["instant"]).isoformat()


@pytest.mark.slow
def test_two_steps_on_two_machines_give_the_same_as_one(bank, tmp_path, monkeypatch):
    by_decree(monkeypatch, True)
    live = run_adapt(bank, RUN, **pieces())["candidate"]
    asked = AdaptSettings(bank=bank.uri, write_set=tmp_path / "a" / "set.jsonl.gz", device="cpu")
    written = write_set(asked, **bank_pieces())
    assert set(SetResult.__annotations__) == set(written) and written["digest"] == load_set(asked.write_set).digest
    assert written["adapters"] == [str(tmp_path / "a" / "set.jsonl.gz.adapter" / live)]
    (tmp_path / "a").rename(tmp_path / "b")  # another machine
    second = AdaptSettings(from_set=tmp_path / "b" / "set.jsonl.gz", out=tmp_path / "out", steps=2, batch=4, patience=0)
    made = adapt_from_set(second, tiny_reader.language_model())
    assert (made["candidate"], made["promoted"], made["passed"]) == (str(tmp_path / "out"), False, True)
    added = add_candidate(bank, tmp_path / "out")
    assert set(AddResult.__annotations__) == set(added) and added["promoted"]
    registry = AdapterRegistry(bank)
    assert registry.info(added["candidate"]).card["started_from"] == live
    instant = datetime.fromisoformat(load_set(second.from_set).header.as_of)
    with pytest.raises(LostRace):  # the same again in one process: its parent is no longer live, but the weights agree
        run_adapt(bank, RUN, as_of=instant, **pieces())
    versions = registry.versions()
    assert registry.files(versions[-1]) == registry.files(added["candidate"])
    assert registry.live(tiny_reader.language_model().digest) == added["candidate"]


@pytest.mark.slow
def test_a_candidate_is_taken_in_only_by_its_bank_and_only_whole(bank, tmp_path, monkeypatch):
    asked = AdaptSettings(bank=bank.uri, write_set=tmp_path / "set.jsonl.gz", device="cpu")
    write_set(asked, **bank_pieces())
    second = AdaptSettings(from_set=asked.write_set, out=tmp_path / "out", steps=1, batch=4)
    adapt_from_set(second, tiny_reader.language_model())
    result = CliRunner().invoke(_adapters(), ["add", str(tmp_path / "out"), "--bank", bank.uri, "--json"])
    assert result.exit_code == 0 and json.loads(result.stdout)["reason"] == "too few"
    other = tmp_path / "other"
    run_ingest(
        [write_corpus(tmp_path / "a.jsonl", corpus(5))], str(other), settings(tmp_path / "w"), show_progress=False
    )
    with pytest.raises(UsageError, match="the candidate was trained for another bank"):
        add_candidate(Bank.open(other), tmp_path / "out")
    versions = AdapterRegistry(bank).versions()
    by_decree(monkeypatch, True)
    added = add_candidate(bank, tmp_path / "out", promote=False)
    assert not added["promoted"] and AdapterRegistry(bank).versions() == [*versions, added["candidate"]]
    scores = (tmp_path / "out" / "scores.json").read_text()
    (tmp_path / "out" / "scores.json").write_text(scores.replace("0.0", "9.9", 1))
    with pytest.raises(Exception, match=r"the candidate's folder cannot be used.*scores\.json does not match"):
        add_candidate(bank, tmp_path / "out")


class Stop(Exception):
    """The moment at which a job is cut off."""


@pytest.mark.slow
def test_a_job_that_was_cut_off_goes_on_with_the_set_it_had(bank, tmp_path, monkeypatch):
    run, work, said = AdaptRun(steps=6, batch=4, evaluate_every=2, patience=None), tmp_path / "work", []

    def cut(line: str) -> None:
        if "step 4, " in line:
            raise Stop

    with pytest.raises(Stop):
        run_adapt(bank, run, checkpoint=work, say=cut, **pieces())
    instant = load_set(work / "set.jsonl.gz").header.as_of
    result = run_adapt(bank, run, checkpoint=work, say=said.append, **pieces())
    assert f"taking up the unfinished run of {instant}" in said
    assert any(line.startswith("going on after step 2") for line in said) and list(work.iterdir()) == []
    assert AdapterRegistry(bank).info(result["candidate"]).card["instant"] == instant

    with pytest.raises(Stop):
        run_adapt(bank, run, checkpoint=work, say=cut, **pieces())
    with pytest.raises(UsageError, match="the checkpoint belongs to another run"):
        run_adapt(bank, AdaptRun(steps=6, batch=4, seed=9), checkpoint=work, **pieces())
    AdapterRegistry(bank).promote(result["candidate"], "by hand, meanwhile")
    said.clear()
    fresh = run_adapt(bank, run, checkpoint=work, say=said.append, **pieces())
    assert any("is given up: another adapter is live by now" in line for line in said)
    assert AdapterRegistry(bank).info(fresh["candidate"]).card["started_from"] == result["candidate"]


def test_the_live_adapter_must_be_beside_the_set(bank, tmp_path, monkeypatch):
    source = tmp_path / "set.jsonl.gz"
    write_set(AdaptSettings(bank=bank.uri, write_set=source, device="cpu"), **bank_pieces())
    found = load_set(source)
    header = type(found.header)(live={"d" * 64: {"version": "0001-x", "weights_sha256": "0" * 64}})
    with pytest.raises(UsageError, match="the live adapter is not beside the training set"):
        live_beside(source, header, "d" * 64)
    assert live_beside(source, header, "e" * 64) is None
    folder = tmp_path / "set.jsonl.gz.adapter" / "0001-x"
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"abc")
    with pytest.raises(Exception, match="is not the one that the set names"):
        live_beside(source, header, "d" * 64)
    header.live["d" * 64]["weights_sha256"] = hashlib.sha256(b"abc").hexdigest()
    assert live_beside(source, header, "d" * 64) == folder


def test_an_empty_bank_has_nothing_to_adapt_to(tmp_path):
    given = settings(tmp_path / "w", replay_per_window=0)
    run_ingest([write_corpus(tmp_path / "a.jsonl", corpus(5))], str(tmp_path / "bank"), given, show_progress=False)
    with pytest.raises(UsageError, match="the bank offers nothing to adapt to: '0 replay questions"):
        run_adapt(tmp_path / "bank", AdaptRun(steps=1), **pieces())


def test_a_small_bank_gets_no_canary_set(bank):
    assert load_canary(bank) is None


# ---------------------------------------------------------------------------------------------------------- options


def test_options_become_the_run_and_the_rule():
    assert AdaptSettings().run() == AdaptRun() and AdaptSettings().rule() == GateRule()
    run = AdaptSettings(steps=7, seed=3, batch=2, patience=0, evaluate_every=5).run()
    assert (run.steps, run.minutes, run.seed, run.batch, run.patience, run.evaluate_every) == (7, None, 3, 2, None, 5)
    assert (AdaptSettings(minutes=1.5).run().steps, AdaptSettings(minutes=1.5).run().minutes) == (None, 1.5)
    assert AdaptSettings(min_questions=4).rule().min_questions == 4
    assert AdaptSettings(questions=5, new_share=1.0).of_set() == {"train": 5, "new_share": 1.0}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "give either --bank or --from-set"),
        (["--bank", "b", "--from-set", "f", "--out", "o"], "give either --bank or --from-set"),
        (["--from-set", "f"], "--from-set and --out go together"),
        (["--bank", "b", "--out", "o"], "--from-set and --out go together"),
        (["--from-set", "f", "--out", "o", "--as-of", "2024-07-01"], "--as-of cannot be given with --from-set"),
        (["--bank", "b", "--write-set", "f", "--steps", "3"], "--steps cannot be given with --write-set"),
    ],
)
def test_options_that_do_not_belong_together_are_told(given, told, capsys):
    assert main(given) == 2
    assert told in capsys.readouterr().err
    result = CliRunner().invoke(command, given)
    assert isinstance(result.exception, UsageError) and told in str(result.exception)


def test_both_command_lines_take_the_same_options():
    by_click = {one.name for one in command.params} - {"as_json"}
    assert by_click == {one.name for one in fields(AdaptSettings)}
    words = ["--bank", "b", "--as-of", "2024-07-01T02:00:00+02:00", "--minutes", "2", "--checkpoint", "c", "--json"]
    found, as_json = parse([*words, "--runner=DataflowRunner"])
    assert as_json and found.as_of == datetime(2024, 7, 1, tzinfo=UTC)
    assert (found.bank, found.minutes, found.steps, found.checkpoint) == ("b", 2.0, None, Path("c"))
    seen = {}

    def noting(settings, say):
        seen["click"] = settings
        return {"set": "x", "questions": {}, "as_of": "", "adapters": [], "seconds": 0.0}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "run_job", noting)
        assert CliRunner().invoke(command, words).exit_code == 0
    assert seen["click"] == found


def test_command_line(bank, monkeypatch, capsys):
    seen = {}

    def fake(where, run, *, say, **given):
        seen.update(given, where=where, run=run)
        say("training")
        return {"candidate": "0001-0123456789abcdef", "promoted": False}

    monkeypatch.setattr(job, "run_adapt", fake)
    assert main(["--bank", bank.uri, "--minutes", "2", "--json", "--runner=DataflowRunner"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["candidate"] == "0001-0123456789abcdef"
    assert printed.err == "training\n"
    assert (seen["where"], seen["run"].minutes, seen["run"].steps) == (bank.uri, 2.0, None)
    assert seen["language_model"] is seen["adapter"] is seen["as_of"] is seen["checkpoint"] is None
    monkeypatch.undo()
    assert main(["--bank", bank.uri + "-missing"]) == 2
    assert "there is no bank here" in capsys.readouterr().err


def _adapters():
    from mbc_core.cli.adapters import adapters

    return adapters
