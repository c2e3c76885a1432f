"""A large corpus through the batch pipeline: is its rate flat, is its memory flat, and does a killed run go on?

    python -m tests.bench.bench_large --documents 50000 --encoder memo --work DIR
    python -m tests.bench.bench_large --documents 200000 --encoder memo --work DIR --kill-after 0.5
    python -m tests.bench.bench_large --documents 10000 --encoder real --work DIR --plain

The corpus is the demo's 10,033 lead sections, repeated with other ids and later dates. ``--encoder memo`` takes the
encoder's output from memory (see ``memo_encoder``): the rate is then that of everything else, not of an ingest.
``--encoder real`` encodes every passage. The run is a process of its own; its memory and processor time are sampled
from outside, its slices are timed by the commits of the ledger. ``--plain`` instead runs a plain loop over the same
core, then the pipeline, on the same documents in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from mbc_core.assets import Assets
from mbc_core.bank import Bank, SliceId, register_codebook
from mbc_core.corpus import DAYS, demo_documents, load_articles
from mbc_core.defaults import LEXICON, SALIENCE
from pipelines.encoding import MINILM, SHIPPED, EncoderSpec, acquire
from pipelines.ingest import run_ingest
from pipelines.opening import open_bank
from pipelines.options import IngestSettings
from pipelines.plain import EncodeRule, assign_codebooks, encode_documents, quantize_batch
from pipelines.readers import read_source
from pipelines.records import DocumentBatch, Tally, WindowVectors
from pipelines.sink import write_slice
from pipelines.sources import Source
from tests.bench.memo_encoder import MemoEncoder, MemoSource

MEMO = "wikipedia.memo.parquet"
_SAMPLE_SECONDS = 0.2
_PAGE, _TICK = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")


# ----------------------------------------------------------------------------------------------------- the corpus


def repeated(documents: Sequence[dict[str, str]], count: int) -> Iterator[dict[str, str]]:
    """The first ``count`` of the documents over and over: round r has other ids and lies 10 days · r later."""
    for number in range(count):
        turn, place = divmod(number, len(documents))
        one = documents[place]
        moment = datetime.fromisoformat(one["timestamp"]) + timedelta(days=DAYS * turn)
        yield one | {"id": f"{one['id']} #{turn}", "timestamp": moment.isoformat()}


def write_corpus(path: Path, count: int) -> None:
    """JSON Lines of :func:`repeated` over the demo corpus."""
    documents = list(demo_documents(load_articles(Assets.ensure().wiki)))
    with path.open("w", encoding="utf-8") as out:
        for one in repeated(documents, count):
            out.write(json.dumps(one, ensure_ascii=False) + "\n")


# -------------------------------------------------------------------------------------------------------- one run


def settings_of(options: argparse.Namespace) -> IngestSettings:
    """The product's defaults, but for the encoder."""
    real = EncoderSpec(MINILM, f"{SHIPPED}{SALIENCE}", f"{SHIPPED}{LEXICON}")
    source = MemoSource(real, None if options.encoder == "real" else str(options.cache / MEMO))
    return IngestSettings(profile="default", encoder=source, staging=options.work / "staging")


def ingest(corpus: Path, bank: Path, settings: IngestSettings) -> dict[str, Any]:
    """What the child process does: the product's ingest, unchanged but for the encoder it is given."""
    source = settings.encoder
    result = run_ingest([str(corpus)], str(bank), settings, show_progress=False)
    asked: MemoEncoder = acquire(source).encoder
    return result | {"passages_encoded_by_this_process": asked.asked, "not_from_memory": asked.encoded}


def plain_loop(corpus: Path, bank: Path, settings: IngestSettings) -> int:
    """What the pipeline does, slice by slice, with nothing between the steps and nothing kept for a crash."""
    opened = open_bank(str(bank), settings)
    manifest, loaded, rule = opened.bank.manifest, acquire(opened.encoder), EncodeRule(opened.bank.manifest.words)
    chain, recorded, done = opened.bank.codebooks(), {}, 0
    records = read_source(Source(str(corpus), "jsonl"))
    while chunk := list(islice(records, settings.slice_documents)):
        encoded = encode_documents(loaded, DocumentBatch.of(chunk, manifest.salt, manifest.window_seconds), rule)
        vectors: dict[str, list[WindowVectors]] = {}
        for window, part in encoded.by_window():
            vectors.setdefault(window, []).append(part)
        made = assign_codebooks(chain, vectors, vectors.__getitem__, opened.rotation, manifest.slots, recorded=recorded)
        recorded.update(made.versions)
        for update in made.published:
            register_codebook(opened.bank, update.codebook, update)
        books = {window: made.codebooks[version] for window, version in made.versions.items()}
        codes = quantize_batch(encoded, books.__getitem__, opened.rotation, manifest.slots)
        counts = codes.documents["window"].value_counts().to_pylist()
        tallies = [Tally(one["values"], documents_in=one["counts"]) for one in counts]
        write_slice(opened.bank, SliceId.begin("plain", f"{done:08d}"), codes, tallies)
        done += len(chunk)
    return done


def beside_a_plain_loop(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of both on the same documents, one after the other in this process, the encoder loaded before."""
    options.work.mkdir(parents=True, exist_ok=True)
    corpus, settings = options.work / "corpus.jsonl", settings_of(options)
    write_corpus(corpus, options.documents)
    acquire(settings.encoder)
    found: dict[str, Any] = {"documents": options.documents, "encoder": options.encoder}
    runs: dict[str, Callable[[Path], object]] = {
        "plain loop": lambda bank: plain_loop(corpus, bank, settings),
        "pipeline": lambda bank: ingest(corpus, bank, settings),
    }
    for name, run in runs.items():
        wall, processor = time.perf_counter(), time.process_time()
        run(options.work / name.replace(" ", "-"))
        found[name] = {"seconds": time.perf_counter() - wall, "processor_seconds": time.process_time() - processor}
    for kind in ("seconds", "processor_seconds"):
        loop, pipeline = (found[name][kind] for name in runs)
        told = (
            f"{options.documents} documents, encoder {options.encoder}, {kind.replace('_', ' ')}: plain loop {loop:.1f}"
        )
        print(
            f"{told}, pipeline {pipeline:.1f}; the pipeline runs at {loop / pipeline:.3f} of the loop", file=sys.stderr
        )
    return found


@dataclass
class Watched:
    """A child process seen from outside.

    Attributes:
        killed: whether it was killed on purpose. result: what it printed, unless it was.
        samples: (time, resident bytes, processor seconds), every fifth of a second.
    """

    killed: bool = False
    result: dict[str, Any] = field(default_factory=dict)
    samples: list[tuple[float, int, float]] = field(default_factory=list)


def watch(command: Sequence[str], bank: Path, kill_after_slices: int | None) -> Watched:
    """Run ``command``; SIGKILL it once so many slices are durable."""
    seen = Watched()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        while child.poll() is None:
            if sample := _sample(child.pid):
                seen.samples.append(sample)
            if kill_after_slices is not None and _commits(bank) >= kill_after_slices:
                time.sleep(1.5)  # somewhere within the next slice
                child.send_signal(signal.SIGKILL)
                seen.killed = True
                break
            time.sleep(_SAMPLE_SECONDS)
        printed, _ = child.communicate()
    if not seen.killed:
        if child.returncode:
            raise SystemExit(f"the run failed with exit code {child.returncode}")
        seen.result = json.loads(printed)
    return seen


def _sample(pid: int) -> tuple[float, int, float] | None:
    try:
        resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return time.time(), resident, (int(fields[11]) + int(fields[12])) / _TICK


def _commits(bank: Path) -> int:
    """Slices that are durable: commits of the ledger beyond the one that made the table."""
    return sum(1 for one in (bank / "ledger" / "_delta_log").glob("*.json") if one.stem.isdigit() and int(one.stem))


# --------------------------------------------------------------------------------------------------------- figures


@dataclass(frozen=True)
class Part:
    """A stretch of consecutive slices.

    Attributes:
        slices: how many. documents: theirs. seconds: from the commit before to the last one's. processor: processor
            seconds in that time. peak: most resident bytes.
    """

    slices: int
    documents: int
    seconds: float
    processor: float
    peak: int


def slices_of(bank: Path, since: int, samples: Sequence[tuple[float, int, float]]) -> list[Part]:
    """One part a slice that was committed after ledger version ``since``, but for the first, which starts unseen."""
    opened = Bank.open(bank)
    table, rows = opened.table("ledger"), opened.read("ledger", ["slice", "documents"]).to_pylist()
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["slice"]] = counts.get(row["slice"], 0) + row["documents"]
    ends = sorted((one["version"], one["timestamp"] / 1000) for one in table.history() if one["version"] > since)
    documents = [counts[name] for name in sorted(counts)][-len(ends) :]
    found = []
    for (before, after), count in zip(pairwise(end for _, end in ends), documents[1:], strict=True):
        inside = [one for one in samples if before <= one[0] <= after]
        if len(inside) > 1:
            used, peak = inside[-1][2] - inside[0][2], max(one[1] for one in inside)
            found.append(Part(1, count, after - before, used, peak))
    return found


def tenths(slices: Sequence[Part], parts: int = 10) -> list[Part]:
    """Consecutive slices put together into at most ``parts`` stretches."""
    cuts = [round(number * len(slices) / parts) for number in range(parts + 1)]
    groups = [slices[start:end] for start, end in pairwise(cuts) if end > start]
    return [
        Part(
            len(one),
            sum(part.documents for part in one),
            sum(part.seconds for part in one),
            sum(part.processor for part in one),
            max(part.peak for part in one),
        )
        for one in groups
    ]


def table(parts: Sequence[Part]) -> str:
    """For people: one line a stretch."""
    lines = ["stretch  slices  documents  documents/s  documents/processor-s  peak MiB"]
    for number, one in enumerate(parts, 1):
        lines.append(
            f"{number:7d}  {one.slices:6d}  {one.documents:9d}  {one.documents / one.seconds:11.1f}  "
            f"{one.documents / max(one.processor, 1e-9):21.1f}  {one.peak / 2**20:8.0f}"
        )
    return "\n".join(lines)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Write the corpus, run (kill and run again), and gather the figures."""
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    corpus, bank = work / "corpus.jsonl", work / "bank"
    write_corpus(corpus, options.documents)
    command = [sys.executable, "-m", "tests.bench.bench_large", "--child", "--work", str(work)]
    command += ["--encoder", options.encoder, "--cache", str(options.cache)]
    runs, slices = [], -(-options.documents // IngestSettings().slice_documents)
    kill_at = max(1, round(slices * options.kill_after)) if options.kill_after else None
    for limit in [kill_at, None] if kill_at else [None]:
        since = _commits(bank)
        began = time.monotonic()
        seen = watch(command, bank, limit)
        parts = slices_of(bank, since, seen.samples)
        runs.append(
            {
                "killed": seen.killed,
                "slices_before": since,
                "slices_after": _commits(bank),
                "seconds": round(time.monotonic() - began, 1),
                "peak_mib": round(max(one[1] for one in seen.samples) / 2**20),
                "result": seen.result,
                "stretches": [asdict(one) for one in tenths(parts)],
            }
        )
        print(f"\n{describe(options, runs[-1])}\n{table(tenths(parts))}", file=sys.stderr)
    return {"documents": options.documents, "encoder": options.encoder, "runs": runs, "bank": bank_figures(bank)}


def describe(options: argparse.Namespace, run: dict[str, Any]) -> str:
    """A sentence on one run."""
    what = "killed" if run["killed"] else "finished"
    told = f"{options.documents} documents, encoder {options.encoder}: {what} after {run['seconds']} s, slices "
    told += f"{run['slices_before']} → {run['slices_after']}, peak {run['peak_mib']} MiB"
    if run["result"]:
        kept = ["documents", "passages", "slices", "slices_skipped", "codebook_version"]
        kept += ["passages_encoded_by_this_process", "not_from_memory"]
        told += "; " + ", ".join(f"{name} {run['result'][name]}" for name in kept)
    return told


def bank_figures(bank: Path) -> dict[str, Any]:
    """What the bank holds, and whether each passage is there once."""
    codes = Bank.open(bank).read("codes", ["key", "passage"])
    distinct = codes.group_by(["key", "passage"]).aggregate([]).num_rows
    return {"passages": codes.num_rows, "distinct": distinct}


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench_large", description=__doc__)
    parser.add_argument("--documents", type=int, default=50_000)
    parser.add_argument("--encoder", choices=["memo", "real"], default="memo")
    parser.add_argument("--work", type=Path, required=True, help="an empty folder for corpus, bank and staging")
    parser.add_argument("--cache", type=Path, help="folder with the memo of bench_learning (default: WORK)")
    parser.add_argument("--kill-after", type=float, help="SIGKILL once this share of the slices is durable, run again")
    parser.add_argument("--plain", action="store_true", help="compare with a plain loop over the same core instead")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.cache = options.cache or options.work
    if options.child:
        found = ingest(options.work / "corpus.jsonl", options.work / "bank", settings_of(options))
    elif options.plain:
        found = beside_a_plain_loop(options)
    else:
        found = measure(options)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
