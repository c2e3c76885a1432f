"""What the reads of prepared sets show: passages with the scores they were found with, controls with the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mbc_core.evaluation.addresses import AddressIndex
from mbc_core.reader.attend import AttendConfig, AttendProjector
from mbc_core.training import attend_reads
from mbc_core.training.attend_reads import AttendRead, Vectors, read_prepared
from mbc_core.training.prepared import load_prepared
from tests.mbc_core.prepared_data import write_prepared
from tests.mbc_core.tiny_reader import SLOTS, WIDTH, language_model, pieces

pytestmark = pytest.mark.usefixtures("single_thread")

READS = (
    AttendRead("closed", 0), AttendRead("attend-right", 1), AttendRead("attend", 3), AttendRead("attend-shuffled", 3),
)  # fmt: skip


def test_a_control_is_weighed_as_the_passages_it_stands_for(tmp_path, monkeypatch):
    data = load_prepared(write_prepared(tmp_path, 12))
    rotation, codebook = pieces()
    index = AddressIndex(data.embeddings, rotation, codebook.codewords, SLOTS)
    vectors = Vectors.of(index, codebook, rotation)
    torch.manual_seed(0)
    words = torch.nn.functional.normalize(torch.randn(20, WIDTH), dim=1)
    made = AttendProjector(
        AttendConfig(WIDTH, 32, 20, answers=2, topics=1, hidden=8), words, torch.randint(0, 256, (20, 1))
    ).eval()
    seen = []

    def noting(*given, **options):
        seen.append(given)
        return real(*given, **options)

    real = attend_reads.answer_attend
    monkeypatch.setattr(attend_reads, "answer_attend", noting)
    rows = read_prepared(language_model(), made, data, vectors, READS)
    assert [(row["read"], row["k"]) for row in rows] == [(read.kind, read.k) for read in READS]
    scores, found = index.nearest_scored(data.question_embeddings, 3)
    closed, right, attend, shuffled = ((given[3], given[6]) for given in seen)
    assert {len(one) for one in closed[0]} == {len(one) for one in closed[1]} == {0}
    assert np.array_equal(np.concatenate(right[0]), vectors.decoded[data.rows])
    assert np.array_equal(np.stack(attend[0]), vectors.decoded[found])
    assert attend[1] == shuffled[1] == scores.tolist()
    assert not np.array_equal(np.stack(shuffled[0]), np.stack(attend[0]))
