"""The pipeline beside a plain loop over the same core: `make bench`. Goal: at least nine tenths of the loop's speed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import numpy as np
import pytest

from mbc_core.bank import Bank, SliceId
from mbc_core.codebook.files import Codebook
from mbc_core.codes import Rotation
from mbc_core.corpus import demo_documents, load_articles
from pipelines.encoding import MINILM, EncoderSpec, acquire
from pipelines.ingest import run_ingest
from pipelines.options import IngestSettings
from pipelines.plain import EncodeRule, assign_codebooks, encode_documents, quantize_batch
from pipelines.readers import read_source
from pipelines.records import DocumentBatch, Tally, by_window
from pipelines.sink import write_slice
from pipelines.sources import Source
from schemas.manifest import Manifest

DOCUMENTS, ROUNDS = 384, 3


@pytest.fixture
def given(tmp_path):
    book = Codebook.first(
        np.random.default_rng(2).standard_normal((512, 32)).astype(np.float32) * 0.05, np.full(512, 4e3)
    )
    Rotation.random(384, 1).save(tmp_path / "rotation")
    (tmp_path / "codebook").write_bytes(book.to_bytes())
    return IngestSettings(
        profile="paper",
        encoder=EncoderSpec(MINILM),
        rotation=str(tmp_path / "rotation"),
        codebook=str(tmp_path / "codebook"),
    )


def plain_loop(path, where, given, loaded) -> int:
    """What the pipeline does, with nothing between the steps."""
    turn = Rotation.load(Path(given.rotation))
    book = Codebook.from_bytes(Path(given.codebook).read_bytes(), given.codebook)
    manifest = Manifest("paper", loaded.encoder.encoder_id, 12, 512, 32, 0, turn.digest)
    bank = Bank.create(where, manifest, book)
    documents = list(read_source(Source(str(path), "jsonl")))
    encoded = encode_documents(loaded, DocumentBatch.of(documents, manifest.salt, 86_400), EncodeRule(0))
    vectors = {}
    for window, part in by_window(encoded.passages):
        vectors.setdefault(window, []).append(part)
    found = assign_codebooks(bank.codebooks(), vectors, vectors.__getitem__, turn, 12)
    codes = quantize_batch(encoded, lambda window: found.codebooks[found.versions[window]], turn, 12)
    seen = codes.documents["window"].value_counts().to_pylist()
    tallies = [Tally(one["values"], documents_in=one["counts"]) for one in seen]
    write_slice(bank, SliceId.begin("plain", "all"), codes, tallies)
    return len(documents)


def test_pipeline_rate(tmp_path, assets, given):
    path = tmp_path / "a.jsonl"
    rows = list(demo_documents(load_articles(assets.wiki), count=DOCUMENTS))
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    loaded = acquire(given.encoder)
    loaded.encoder.encode([row["text"][:300] for row in rows[:64]])
    spent: dict[str, list[tuple[float, float]]] = {"plain loop": [], "pipeline": []}
    for turn in range(ROUNDS):
        with measured(spent["plain loop"]):
            assert plain_loop(path, tmp_path / f"plain{turn}", given, loaded) == DOCUMENTS
        with measured(spent["pipeline"]):
            result = run_ingest([str(path)], str(tmp_path / f"bank{turn}"), given, show_progress=False)
        assert result["documents"] == DOCUMENTS
    for kind, place in (("wall", 0), ("processor", 1)):
        loop, pipeline = (median(one[place] for one in spent[name]) for name in spent)
        print(
            f"\n{DOCUMENTS} documents, {kind} time: plain loop {loop:.2f} s, pipeline {pipeline:.2f} s; "
            f"the pipeline runs at {loop / pipeline:.3f} of the loop's speed",
            end="",
        )


@contextmanager
def measured(into: list[tuple[float, float]]) -> Iterator[None]:
    """Wall and processor seconds of the block; the second still tells something on a busy machine."""
    wall, processor = time.perf_counter(), time.process_time()
    yield
    into.append((time.perf_counter() - wall, time.process_time() - processor))
