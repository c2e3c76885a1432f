"""The manifest: round trip, refusals by name."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace

import pytest

from mbc_core.errors import DamagedFile, IncompatibleBank, UsageError
from schemas.manifest import PROFILES, Manifest, Profile

MANIFEST = Manifest("default", "e@1/float32/s", 24, 512, 16, 24, "r", "s", "l", key_salt="0123456789abcdef" * 2)


def test_profiles_are_those_of_the_design():
    assert {name: (one.slots, one.words) for name, one in PROFILES.items()} == {
        "paper": (12, 0),
        "compact": (24, 12),
        "default": (24, 24),
        "rich": (24, 41),
    }
    assert PROFILES["paper"] == Profile("paper", 12, 0)


def test_round_trip_and_salt():
    assert Manifest.from_json(MANIFEST.to_json(), "here") == MANIFEST
    assert MANIFEST.salt == bytes.fromhex("0123456789abcdef" * 2)
    fresh = [replace(MANIFEST, key_salt=Manifest("p", "e", 1, 1, 1, 1, "r").key_salt) for _ in range(2)]
    assert fresh[0].key_salt != fresh[1].key_salt and len(fresh[0].salt) == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": "24"}, r"holds a value of the wrong kind: \['slots'\]"),
        ({"words": True}, r"holds a value of the wrong kind: \['words'\]"),
        ({"encoder": None}, r"holds a value of the wrong kind: \['encoder'\]"),
        ({"key_salt": "xyz"}, "holds a value of the wrong kind: 'key_salt'"),
        ({"extra": 1}, r"manifest here has missing or unknown fields: \['extra'\]"),
    ],
)
def test_an_edited_manifest_is_refused(change, message):
    with pytest.raises(DamagedFile, match=message):
        Manifest.from_json(json.dumps(asdict(MANIFEST) | change), "here")


@pytest.mark.parametrize("text", ["", "[]", "3", '{"format_version"', "{}"])
def test_what_is_no_manifest_is_refused(text):
    with pytest.raises(DamagedFile, match="the bank's manifest here cannot be read"):
        Manifest.from_json(text, "here")


def test_another_format_is_refused():
    with pytest.raises(IncompatibleBank, match="another format version: 2"):
        Manifest.from_json(json.dumps({"format_version": 2}), "here")


def test_every_difference_but_the_salt_is_refused_by_name():
    for one in fields(Manifest):
        other = replace(MANIFEST, **{one.name: "x" if one.type == "str" else 99})
        if one.name == "key_salt":
            MANIFEST.require_same(other, "here")
            continue
        with pytest.raises(UsageError, match=f"the bank here was made with another {one.name}: .*this run would use"):
            MANIFEST.require_same(other, "here")
