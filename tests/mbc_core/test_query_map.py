"""The map of questions: the same scores by every search, today's ranks where it changes nothing, refused elsewhere."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from codebook_data import codebook_of, topical_embeddings

from mbc_core import defaults, weights
from mbc_core.codes import LENGTH_WEIGHT, Rotation, decode, pack, quantize, to_slots
from mbc_core.errors import DamagedFile, IncompatibleBank, UsageError
from mbc_core.evaluation.addresses import AddressIndex
from mbc_core.memory import Memory
from mbc_core.query_map import QueryMap, mapped_scores
from mbc_core.recall import RecallIndex
from mbc_core.training.neighbours import code_scores
from tests.mbc_core.tiny_reader import SLOTS as TINY_SLOTS
from tests.mbc_core.tiny_reader import BagOfWords, documents, lexicon, make_bank, pieces

WIDTH, SLOTS = 48, 8
ROTATION = Rotation.random(WIDTH, seed=2)
PASSAGES, QUESTIONS = topical_embeddings(200, WIDTH, seed=1), topical_embeddings(6, WIDTH, seed=2)
VECTORS = to_slots(PASSAGES, ROTATION, SLOTS)
BOOK = codebook_of(VECTORS, 64)
CODES = quantize(VECTORS, BOOK.codewords)
ROWS = np.arange(len(PASSAGES))
ENGINES = pytest.mark.parametrize("engine", ["faiss", "exact"])


def some_map(rotation: Rotation = ROTATION, slots: int = SLOTS, seed: int = 3) -> QueryMap:
    draw = np.random.default_rng(seed)
    residual = (draw.standard_normal((rotation.width, rotation.width)) / 10).astype(np.float16).astype(np.float32)
    lengths = np.exp(draw.standard_normal(rotation.width) / 2).astype(np.float32)
    return QueryMap(residual, lengths, -0.25, rotation.digest, slots)


def index(engine: str, query_map: QueryMap | None) -> RecallIndex:
    return RecallIndex.build([(BOOK, pack(CODES), ROWS)], ROTATION, SLOTS, engine=engine, query_map=query_map)


def loops(found: QueryMap) -> np.ndarray:
    """The score as the module's text has it, element by element."""
    z = QUESTIONS.astype(np.float64) @ ROTATION.matrix.astype(np.float64).T
    decoded = decode(CODES, BOOK.codewords).astype(np.float64)
    scores = np.zeros((len(QUESTIONS), len(PASSAGES)))
    for place, question in enumerate(z):
        turned = [question[i] + sum(found.residual[i, j] * question[j] for j in range(WIDTH)) for i in range(WIDTH)]
        for row, passage in enumerate(decoded):
            product = sum(turned[i] * passage[i] for i in range(WIDTH))
            length = sum(found.length_weights[i] * passage[i] ** 2 for i in range(WIDTH))
            scores[place, row] = product + LENGTH_WEIGHT * (1 - length) + found.offset
    return scores


def test_by_hand():
    """z = (3, 4), D swaps and halves: (3 + 2, 4 + 1.5); x̂ = (1, 0) with u = (2, 1): 5 + β·(1 - 2) + 1."""
    rotation = Rotation(np.eye(2, dtype=np.float32))
    found = QueryMap(
        np.array([[0, 0.5], [0.5, 0]], np.float32), np.array([2, 1], np.float32), 1.0, rotation.digest, slots=1
    )
    question = np.array([[3, 4]], np.float32)
    assert found.apply(question[:, None]).tolist() == [[[5.0, 5.5]]]
    words, codes = np.array([[1, 0], [0, 1]], np.float32), np.array([[0], [1]], np.uint16)
    expected = [[6 - LENGTH_WEIGHT, 6.5]]
    assert mapped_scores(question, rotation, codes, words, found) == pytest.approx(np.array(expected))


@ENGINES
def test_every_search_scores_like_plain_loops(engine):
    found = some_map()
    expected = loops(found)
    assert mapped_scores(QUESTIONS, ROTATION, CODES, BOOK.codewords, found) == pytest.approx(expected, abs=1e-6)
    scores, rows = index(engine, found).search(QUESTIONS, len(PASSAGES))
    assert scores == pytest.approx(np.take_along_axis(expected, rows, axis=1), abs=3e-6)
    turned = found.apply(to_slots(QUESTIONS, ROTATION, SLOTS))
    by_torch = code_scores(
        torch.from_numpy(turned),
        torch.from_numpy(CODES.astype(np.int64)),
        torch.from_numpy(BOOK.codewords),
        length_weights=torch.from_numpy(found.length_weights),
    )
    assert by_torch.numpy() + found.offset == pytest.approx(expected, abs=3e-6)
    nearest = AddressIndex(PASSAGES, ROTATION, BOOK.codewords, SLOTS, query_map=found).nearest(QUESTIONS, 9)
    assert np.take_along_axis(expected, nearest, axis=1) == pytest.approx(-np.sort(-expected, axis=1)[:, :9], abs=3e-6)
    assert (rows != index(engine, None).search(QUESTIONS, len(PASSAGES))[1]).any(), "the map matters"


@ENGINES
def test_the_identity_gives_the_scores_and_ranks_of_no_map_bit_for_bit(engine):
    plain = index(engine, None).search(QUESTIONS, 50)
    mapped = index(engine, QueryMap.identity(ROTATION, SLOTS)).search(QUESTIONS, 50)
    for one, other in zip(plain, mapped, strict=True):
        assert one.tobytes() == other.tobytes()
    identity = AddressIndex(PASSAGES, ROTATION, BOOK.codewords, SLOTS, query_map=QueryMap.identity(ROTATION, SLOTS))
    none = AddressIndex(PASSAGES, ROTATION, BOOK.codewords, SLOTS)
    assert np.array_equal(identity.nearest(QUESTIONS, 20), none.nearest(QUESTIONS, 20))


def test_faiss_still_holds_the_packed_bytes():
    import faiss

    searched = index("faiss", some_map())
    held = faiss.vector_to_array(searched._engines[0].index.codes)
    assert held.tobytes() == pack(CODES).tobytes()


def test_a_question_is_mapped_alike_in_any_company():
    asked = to_slots(QUESTIONS, ROTATION, SLOTS)
    whole = some_map().apply(asked)
    assert whole.dtype == np.float32
    for row in range(len(asked)):
        assert some_map().apply(asked[row : row + 1]).tobytes() == whole[row : row + 1].tobytes()


def test_the_file_keeps_the_map(tmp_path):
    found = some_map()
    (tmp_path / "map.safetensors").write_bytes(found.to_bytes())
    again = QueryMap.load(tmp_path / "map.safetensors")
    assert np.array_equal(again.residual, found.residual)
    assert np.array_equal(again.length_weights, found.length_weights)
    assert (again.offset, again.rotation, again.slots) == (found.offset, found.rotation, found.slots)
    assert again.digest == found.digest != some_map(seed=4).digest
    with pytest.raises(DamagedFile, match="the query map cannot be read"):
        QueryMap.from_bytes(found.to_bytes()[:-9], "somewhere")
    with pytest.raises(DamagedFile, match="the query map cannot be read"):
        QueryMap.from_bytes(ROTATION.to_bytes(), "somewhere")


def test_what_no_map_can_hold_is_refused():
    found = some_map()
    with pytest.raises(DamagedFile, match="does not hold what one holds"):
        replace(found, length_weights=found.length_weights * 0)
    with pytest.raises(DamagedFile, match="does not hold what one holds"):
        replace(found, residual=found.residual * np.float32("inf"))
    with pytest.raises(DamagedFile, match="T = 7"):
        replace(found, slots=7)
    with pytest.raises(UsageError, match=r"query map: '\[48, 47\] float32'"):
        replace(found, residual=np.ascontiguousarray(found.residual[:, 1:]))
    with pytest.raises(UsageError, match="does not fit the question: 'T · d_c = 8 · 3, width 48'"):
        found.apply(np.zeros((1, 8, 3), np.float32))


def test_another_rotation_or_number_of_codes_is_refused_by_name():
    other = Rotation.random(WIDTH, seed=9)
    with pytest.raises(IncompatibleBank, match=rf"query map belongs.*rotation {ROTATION.digest[:12]}.*T = 8"):
        RecallIndex.build([], other, SLOTS, query_map=some_map())
    with pytest.raises(IncompatibleBank, match=r"these codes have rotation .*T = 4"):
        AddressIndex(PASSAGES, ROTATION, BOOK.codewords, 4, query_map=some_map())


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A bank of the tiny pieces; ``shipped``: where the release's weights would lie."""
    rotation, _ = pieces()
    monkeypatch.setattr(defaults, "rotation", lambda: rotation)
    monkeypatch.setattr(defaults, "lexicon_for", lambda manifest: lexicon())
    monkeypatch.setattr(defaults, "encoder_for", lambda manifest, device: BagOfWords())
    shipped = tmp_path / "weights"
    shipped.mkdir()
    monkeypatch.setattr(weights, "path", lambda name: shipped / name)
    return make_bank(tmp_path / "bank", documents(16)), rotation, shipped


def ship(folder, found: QueryMap, slots: int) -> None:
    (folder / f"query_map_t{slots}.safetensors").write_bytes(found.to_bytes())
    (folder / f"query_map_t{slots}.json").write_text(f'{{"file_sha256": "{found.digest}"}}')


def test_a_bank_is_asked_through_the_shipped_map_and_its_manifest_stays(tiny):
    bank, rotation, shipped = tiny
    manifest = bank.manifest
    asked = BagOfWords().encode_questions([one.question for one in documents(16)])
    plain = Memory.open(bank).search(asked, 5)
    found = some_map(rotation, TINY_SLOTS)
    given = Memory.open(bank, query_map=found).search(asked, 5)
    assert not np.array_equal(given[0], plain[0])
    ship(shipped, found, TINY_SLOTS)
    for one, other in zip(Memory.open(bank).search(asked, 5), given, strict=True):
        assert np.array_equal(one, other)
    without = Memory.open(bank, query_map=QueryMap.identity(rotation, TINY_SLOTS)).search(asked, 5)
    assert all(np.array_equal(one, other) for one, other in zip(without, plain, strict=True))
    assert bank.manifest == manifest


def test_a_bank_of_another_rotation_is_read_without_the_shipped_map(tiny):
    bank, rotation, shipped = tiny
    ship(shipped, some_map(Rotation.random(rotation.width, seed=77), TINY_SLOTS), TINY_SLOTS)
    assert defaults.query_map(rotation, TINY_SLOTS) is None
    assert len(Memory.open(bank)) > 0
    with pytest.raises(IncompatibleBank, match="the query map belongs to another rotation"):
        Memory.open(bank, query_map=some_map(Rotation.random(rotation.width, seed=77), TINY_SLOTS))


def test_a_shipped_map_that_is_not_its_cards_is_refused(tiny):
    bank, rotation, shipped = tiny
    ship(shipped, some_map(rotation, TINY_SLOTS), TINY_SLOTS)
    (shipped / f"query_map_t{TINY_SLOTS}.safetensors").write_bytes(some_map(rotation, TINY_SLOTS, seed=8).to_bytes())
    with pytest.raises(DamagedFile, match="does not match its card"):
        Memory.open(bank)
