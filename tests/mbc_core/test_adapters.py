"""The adapter registry: candidates, promotion, rollback, digests."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from bank_rows import make_bank
from hypothesis import given
from hypothesis import strategies as st

from mbc_core.adapters import AdapterRegistry, _stack
from mbc_core.bank import Bank
from mbc_core.errors import DamagedFile, StorageError, UsageError

BASE = "f" * 64


@pytest.fixture
def registry(tmp_path: Path) -> AdapterRegistry:
    return AdapterRegistry(make_bank(tmp_path / "bank"))


def _files(text: str) -> dict[str, bytes]:
    return {"adapter_model.safetensors": text.encode(), "adapter_config.json": b'{"r": 32}'}


def _save(registry: AdapterRegistry, text: str, base: str = BASE) -> str:
    return registry.save_candidate(_files(text), {"after": {"new_f1": 1.5}}, base)


def test_a_candidate_is_saved_but_not_live(registry):
    version = _save(registry, "one")
    assert version.startswith("0001-") and registry.versions() == [version]
    assert registry.live(BASE) is None and registry.newest_live() is None
    [info] = registry.list()
    assert (info.version, info.base_digest, info.live) == (version, BASE, False)
    assert info.card["after"] == {"new_f1": 1.5} and set(info.card["files"]) == set(_files(""))


def test_versions_are_numbered_in_order(registry):
    assert [_save(registry, text)[:5] for text in "abc"] == ["0001-", "0002-", "0003-"]


def test_promotions_stack_and_roll_back_one_by_one(registry):
    one, two, three = (_save(registry, text) for text in ("one", "two", "three"))
    for version in (one, two):
        registry.promote(version, "better")
    assert registry.live(BASE) == two
    assert registry.rollback(BASE, "worse") == one
    registry.promote(three, "better")
    assert [info.live for info in registry.list()] == [False, False, True]
    assert registry.rollback(BASE, "worse") == one
    assert registry.rollback(BASE, "worse") is None
    assert registry.live(BASE) is None
    with pytest.raises(UsageError, match="there is no adapter to roll back: 'ffffffffffff'"):
        registry.rollback(BASE, "worse")


def test_live_is_kept_apart_by_base_model(registry):
    mine, theirs = _save(registry, "one"), _save(registry, "two", base="e" * 64)
    registry.promote(mine, "better")
    registry.promote(theirs, "better")
    assert (registry.live(BASE), registry.live("e" * 64), registry.live("d" * 64)) == (mine, theirs, None)
    assert registry.newest_live() == theirs


def test_as_of_shows_what_was_live_then(registry):
    version = _save(registry, "one")
    before = time.time_ns() // 1000
    registry.promote(version, "better")
    after = time.time_ns() // 1000
    registry.rollback(BASE, "worse")
    assert [registry.live(BASE, moment) for moment in (before - 1, after)] == [None, version]
    assert registry.live(BASE) is None


def test_load_copies_checked_files(registry, tmp_path):
    version = _save(registry, "one")
    folder = registry.load(version, tmp_path / "local")
    assert folder == tmp_path / "local" / version
    assert {one.name: one.read_bytes() for one in folder.iterdir()} == _files("one")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_damaged_files_are_never_loaded_nor_promoted(registry, tmp_path, name):
    version = _save(registry, "one")
    path = tmp_path / "bank" / "adapters" / version / name
    path.write_bytes(b"other")
    with pytest.raises(DamagedFile, match=f"{name} does not match its digest"):
        registry.load(version, tmp_path / "local")
    path.unlink()
    with pytest.raises(DamagedFile, match=f"{name} does not match its digest"):
        registry.promote(version, "better")
    assert registry.live(BASE) is None


def test_an_edited_card_is_refused(registry, tmp_path):
    version = _save(registry, "one")
    path = tmp_path / "bank" / "adapters" / version / "card.json"
    card = json.loads(path.read_text())
    path.write_text(json.dumps(card | {"base_digest": "e" * 64}))
    with pytest.raises(DamagedFile, match=r"card\.json does not match its digest"):
        registry.promote(version, "better")
    assert "card.json does not match its digest" in "".join(registry.problems())


def test_a_live_adapter_whose_folder_is_gone_is_a_problem(registry, tmp_path):
    version = _save(registry, "one")
    registry.promote(version, "better")
    for path in (tmp_path / "bank" / "adapters" / version).iterdir():
        path.unlink()
    assert registry.problems() == [f"adapter {version} was made live, but its folder is gone."]


def test_unknown_versions_and_incomplete_folders_are_refused(registry, tmp_path):
    for name in ("0009-0123456789abcdef", "../live", "live"):
        with pytest.raises(UsageError, match="the bank has no such adapter"):
            registry.promote(name, "better")
    with pytest.raises(UsageError, match="this is not an adapter's folder"):
        registry.save_candidate({"adapter_model.safetensors": b""}, {}, BASE)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"lacks a file: \['adapter_model.safetensors'\]"):
        registry.save_candidate_folder(tmp_path, {}, BASE)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    (tmp_path / "README.md").write_text("left out")
    assert set(registry.files(registry.save_candidate_folder(tmp_path, {}, BASE))) == set(_files(""))


def test_two_promotions_at_once_do_not_both_count(registry, tmp_path):
    one, two = _save(registry, "one"), _save(registry, "two")
    other = AdapterRegistry(Bank.open(tmp_path / "bank"))
    stale = other._rows(BASE, None)
    registry.promote(one, "better")
    other._rows = lambda *_: stale  # what the other process had read before
    with pytest.raises(StorageError, match="the live adapter was changed by someone else at the same moment"):
        other.promote(two, "better")
    assert registry.live(BASE) == one


@given(st.lists(st.sampled_from(["a", "b", "c", "rollback"]), max_size=12))
def test_stack_against_a_plain_loop(actions):
    expected: list[str] = []
    rows = []
    for action in actions:
        if action == "rollback":
            expected = expected[:-1]
            rows.append({"action": "rollback", "version": expected[-1] if expected else None})
        else:
            expected = [*expected, action]
            rows.append({"action": "promote", "version": action})
    assert _stack(rows) == expected
