"""The weights that come with the release: each is what its card says, or refused."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest

from mbc_core import defaults, weights
from mbc_core.errors import DamagedFile, ModelError

FILES = [
    defaults.LEXICON,
    defaults.SALIENCE,
    defaults.ROTATION,
    "codebook_t12.safetensors",
    "codebook_t24.safetensors",
    "query_map_t12.safetensors",
    "query_map_t24.safetensors",
]


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of the shipped weights that a test may damage."""
    folder = shutil.copytree(weights.path(""), tmp_path / "weights")
    monkeypatch.setattr(weights, "path", lambda name: folder / name)
    return folder


def flip(path):
    data = bytearray(path.read_bytes())
    data[-10] ^= 1  # inside the last tensor: still well-formed safetensors
    path.write_bytes(data)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_in_a_shipped_file_is_refused(copied, name):
    assert defaults.shipped(name) == copied / name
    flip(copied / name)
    with pytest.raises(DamagedFile, match=rf"the weight file .*{name} does not match its card.*reinstall mbc"):
        defaults.shipped(name)


def test_a_flipped_bit_in_the_shipped_adapter_is_refused(copied):
    assert defaults.reader_adapter() == copied / "reader"
    flip(copied / "reader" / "adapter_model.safetensors")
    with pytest.raises(DamagedFile, match=r"adapter_model.safetensors does not match its card"):
        defaults.reader_adapter()


@pytest.mark.parametrize("name", ["projector.safetensors", "adapter_model.safetensors"])
def test_a_flipped_bit_in_the_weights_of_attend_is_refused(copied, name):
    folder = copied / "attend"
    shutil.rmtree(folder, ignore_errors=True)
    assert defaults.attend_weights() is None, "this installation has none"
    folder.mkdir()
    names = ("projector.safetensors", "adapter_model.safetensors")
    for number, one in enumerate(names):
        (folder / one).write_bytes(bytes([number]) * 20)
    files = {one: hashlib.sha256((folder / one).read_bytes()).hexdigest() for one in names}
    (folder / "card.json").write_text(json.dumps({"files": files}))
    assert defaults.attend_weights() == folder
    flip(folder / name)
    with pytest.raises(DamagedFile, match=rf"{name} does not match its card"):
        defaults.attend_weights()
    assert defaults.attend_weights(given=folder) == folder, "a folder that was named has a card of its own"


def test_codebook_and_rotation_are_read_through_the_check(copied):
    flip(copied / "codebook_t24.safetensors")
    flip(copied / "rotation.safetensors")
    with pytest.raises(DamagedFile, match=r"codebook_t24\.safetensors does not match its card"):
        defaults.codebook(24)
    with pytest.raises(DamagedFile, match=r"rotation\.safetensors does not match its card"):
        defaults.rotation()


def test_a_missing_file_or_card_is_named(copied):
    (copied / "rotation.json").unlink()
    with pytest.raises(DamagedFile, match=r"cannot be compared with its card.*rotation.json"):
        defaults.shipped(defaults.ROTATION)
    (copied / "salience.safetensors").unlink()
    with pytest.raises(ModelError, match="the installation lacks a weight file"):
        defaults.shipped(defaults.SALIENCE)


@pytest.mark.parametrize("slots", [12, 24])
def test_the_shipped_query_map_belongs_to_the_shipped_codes_and_its_card_says_what_it_brought(slots):
    found = defaults.query_map(defaults.rotation(), slots)
    card = json.loads(weights.path(f"query_map_t{slots}.json").read_text("utf-8"))
    assert found is not None and found.digest == card["digest"]
    assert (card["rotation"], card["codebook"]) == (defaults.rotation().digest, defaults.codebook(slots).digest)
    assert card["held_out"]["gain_at_1"][1] > 0, "the interval of the gain on held-out passages lies above zero"
    assert defaults.query_map(defaults.rotation(), 48) is None
