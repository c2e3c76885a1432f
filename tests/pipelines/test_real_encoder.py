"""The real encoder through the pipeline: its fixed shapes make codes independent of batches, bit for bit."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mbc_core.bank import Bank
from mbc_core.codebook.files import Codebook
from mbc_core.codes import Rotation, pack, quantize, to_slots
from mbc_core.encoder import PassageEncoder
from mbc_core.passages import split_passages
from pipelines.encoding import MINILM, EncoderSpec
from pipelines.ingest import run_ingest
from pipelines.options import IngestSettings

SENTENCES = (
    "The observatory opened in 1923 on a hill above the harbour.",
    "Its first director, Maria Lind, measured 412 double stars.",
    "A fire destroyed the dome, and the lens was found intact.",
    "Visitors came by tram until the line closed.",
    "The town sold the site to the university for one crown.",
)


@pytest.mark.slow
def test_codes_of_the_real_encoder_do_not_depend_on_batches(tmp_path, assets):
    turn = Rotation.random(384, 1)
    book = Codebook.first(
        np.random.default_rng(2).standard_normal((512, 32)).astype(np.float32) * 0.05, np.full(512, 4e3)
    )
    turn.save(tmp_path / "rotation")
    (tmp_path / "codebook").write_bytes(book.to_bytes())
    documents = [
        {"id": str(number), "text": " ".join(np.random.default_rng(number).choice(SENTENCES, 1 + 5 * number))}
        for number in range(9)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in documents))
    found = []
    for size in (2, 512):
        given = IngestSettings(
            profile="paper",
            encoder=EncoderSpec(MINILM),
            rotation=str(tmp_path / "rotation"),
            codebook=str(tmp_path / "codebook"),
            batch_documents=size,
        )
        result = run_ingest([str(tmp_path / "a.jsonl")], str(tmp_path / f"bank{size}"), given, show_progress=False)
        rows = Bank.open(tmp_path / f"bank{size}").passages().to_pylist()
        found.append({(row["doc_id"], row["passage"]): row["address"] for row in rows})
        assert result["passages"] == len(rows)
    encoder = PassageEncoder.load(assets.minilm, None)
    expected = {}
    for one in documents:
        for number, passage in enumerate(split_passages(one["text"], encoder.count_pieces)):
            z = to_slots(encoder.encode([passage])[0].embedding[None], turn, 12)
            expected[one["id"], number] = pack(quantize(z, book.codewords)).tobytes()
    assert found[0] == found[1] == expected
    assert len(expected) > len(documents), "some documents must have several passages"
