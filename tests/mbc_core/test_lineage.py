"""An adapter's card tells where it comes from; one that was judged must."""

from __future__ import annotations

import json

import pytest
from adapter_cards import BASE, files_of, full_card, save
from bank_rows import make_bank

from mbc_core.adapters import AdapterRegistry
from mbc_core.cli import cli, run
from mbc_core.errors import LostRace, UsageError
from mbc_core.lineage import Lineage, problems_of


@pytest.fixture
def registry(tmp_path) -> AdapterRegistry:
    return AdapterRegistry(make_bank(tmp_path / "bank"))


def test_lineage_is_read_back_from_the_card_of_a_version(registry):
    lineage = registry.info(save(registry, "one")).lineage
    assert (lineage.parent, lineage.seed, lineage.base_digest) == ("shipped", 7, BASE)
    assert (lineage.instant, lineage.codebook_versions) == ("2026-01-02T03:04:05+00:00", (0, 3))
    assert lineage.questions == {"train": 42, "new": 9}
    assert (lineage.promote, lineage.reason, lineage.sentence) == (True, "promoted", "new +5.5, old -0.2")
    told = json.loads(json.dumps(lineage.to_json()))
    assert told["before"] == {"new_f1": 30.5, "old_f1": 41.25} and "replay" not in told


WRONG = {
    "started_from": 3,
    "base_model": "",
    "instant": "2026-01-02T03:04:05",
    "codebook_versions": [],
    "replay": {"train": {"w": -1}},
    "seed": "7",
    "code_version": None,
    "before": {"new_f1": 1.0},
    "after": {"new_f1": "1", "old_f1": 2.0},
    "decision": {"promote": "yes", "reason": "promoted"},
}


@pytest.mark.parametrize("name", sorted(WRONG))
def test_a_judged_adapter_without_its_origin_is_refused_by_name(registry, name):
    with pytest.raises(UsageError, match=rf"does not tell where it comes from: .{name} is "):
        save(registry, "one", **{name: WRONG[name]})
    card = full_card()
    del card[name]
    if name == "decision":
        registry.save_candidate(files_of("one"), card, BASE)  # nobody judged it: imported by hand
        return
    with pytest.raises(UsageError, match=f"{name} is missing"):
        registry.save_candidate(files_of("one"), card, BASE)
    assert registry.versions() == []


def test_a_whole_card_has_no_problems_and_an_earlier_releases_card_is_shown_as_it_is():
    assert problems_of(full_card() | {"base_digest": BASE}) == []
    old = Lineage.of({"decision": "F1 +1.0: no better", "before": {"new_f1": 1.0, "old_f1": 2.0}, "replay": None})
    assert (old.reason, old.sentence, old.promote) == (None, "F1 +1.0: no better", None)
    assert old.before == {"new_f1": 1.0, "old_f1": 2.0} and old.after == {"new_f1": None, "old_f1": None}


def test_ancestors_go_back_to_what_training_began_with(registry, tmp_path):
    first = save(registry, "one", None)
    second = save(registry, "two", first)
    third = save(registry, "three", second)
    assert registry.ancestors(third) == [second, first]
    assert registry.ancestors(first) == [] and registry.ancestors(save(registry, "four")) == ["shipped"]
    for path in (tmp_path / "bank" / "adapters" / first).iterdir():
        path.unlink()
    assert registry.ancestors(third) == [second, first]
    assert f"adapter {second} descends from {first}, whose folder is gone." in registry.problems()


def test_a_promotion_that_expects_another_live_adapter_is_refused(registry):
    one, two = save(registry, "one"), save(registry, "two")
    registry.promote(one, "better", expected=None)
    for expected in (None, two):
        with pytest.raises(LostRace, match="was not compared with the adapter that is live"):
            registry.promote(two, "better", expected=expected)
    assert registry.live(BASE) == one
    registry.promote(two, "better", expected=one)
    assert registry.live(BASE) == two


def test_states_tell_what_became_of_each_version(registry):
    one, two, three, four = (save(registry, text) for text in ("one", "two", "three", "four"))
    for version in (one, two, three):
        registry.promote(version, "better")
    registry.rollback(BASE, "worse")
    assert {info.version: info.state for info in registry.list()} == {
        one: "earlier", two: "live", three: "rolled back", four: "candidate",
    }  # fmt: skip
    assert registry.info(three).state == "rolled back"


def test_the_list_shows_parent_decision_and_scores_to_a_person(registry, capsys):
    first = save(registry, "one")
    registry.promote(first, "better")
    refused = {"promote": False, "reason": "old worse", "sentence": "old -3.0"}
    save(registry, "two", first, decision=refused)
    assert run(cli, ["adapters", "list", "--bank", registry._bank.uri]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "000" in line]
    assert all(word in lines[0] for word in ("live", "shipped", "promoted", "30.5 → 36.0", "41.2 → 41.0"))
    assert all(word in lines[1] for word in ("0001", "old worse"))
    assert run(cli, ["adapters", "show", first, "--bank", registry._bank.uri]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("instant", "codebook_versions", "[0, 3]", "descends from", "code_version"))


def test_json_tells_lineage_state_and_seconds(registry, capsys):
    first = save(registry, "one")
    where = ["--bank", registry._bank.uri, "--json"]
    assert run(cli, ["adapters", "promote", first, *where]) == 0
    assert json.loads(capsys.readouterr().out)["seconds"] >= 0
    assert run(cli, ["adapters", "show", first, *where]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["state"], shown["ancestors"], shown["lineage"]["seed"]) == ("live", ["shipped"], 7)
    assert run(cli, ["adapters", "rollback", *where]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["live"] is None and told["seconds"] >= 0
