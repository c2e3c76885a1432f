"""Address codes: exact, packed as FAISS packs, and blind to a passage's company."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
from codebook_data import codebook_of, topical_embeddings
from hypothesis import given
from hypothesis import strategies as st

from mbc_core import codes
from mbc_core.codes import (
    Rotation,
    code_size,
    decode,
    exact_inner_products,
    exact_squared_distances,
    pack,
    quantize,
    to_slots,
    unpack,
)
from mbc_core.errors import DamagedFile, UsageError


def faiss_index(codewords: np.ndarray, slots: int) -> faiss.IndexPQ:
    index = faiss.IndexPQ(slots * codewords.shape[1], slots, 9, faiss.METRIC_INNER_PRODUCT)
    faiss.copy_array_to_vector(np.tile(codewords, (slots, 1)).ravel(), index.pq.centroids)
    index.is_trained = True
    return index


def test_pack_typed_out():
    # 1 sets bit 0; 2 sets bit 9 + 1 = 10; 511 sets bits 18…26.
    packed = pack(np.array([[1, 2, 511]], dtype=np.uint16))
    assert packed.tolist() == [[0b00000001, 0b00000100, 0b11111100, 0b00000111]]
    assert unpack(packed, 3).tolist() == [[1, 2, 511]]


def test_code_sizes_of_the_two_profiles():
    assert (code_size(12), code_size(24)) == (14, 27)


@given(st.lists(st.lists(st.integers(0, 511), min_size=12, max_size=12), max_size=5))
def test_pack_equals_python_integers_and_unpacks(rows):
    array = np.array(rows, dtype=np.uint16).reshape(len(rows), 12)
    packed = pack(array)
    for row, stored in zip(rows, packed, strict=True):
        assert bytes(stored) == sum(code << 9 * at for at, code in enumerate(row)).to_bytes(14, "little")
    assert np.array_equal(unpack(packed, 12), array)


@pytest.mark.parametrize("slots", [12, 24])
def test_codes_are_faiss_codes_bit_for_bit(slots):
    rotation = Rotation.random(384, seed=3)
    vectors = to_slots(topical_embeddings(1500, 384), rotation, slots)
    book = codebook_of(vectors, 512)
    ours = pack(quantize(vectors, book.codewords))
    theirs = faiss_index(book.codewords, slots).sa_encode(vectors.reshape(1500, 384))
    assert ours.shape == theirs.shape == (1500, code_size(slots))
    assert ours.tobytes() == theirs.tobytes()


def test_quantize_equals_a_plain_loop():
    vectors = to_slots(topical_embeddings(20, 48), Rotation.random(48, seed=1), 6)
    words = codebook_of(vectors, 31).codewords
    for passage, row in enumerate(quantize(vectors, words)):
        for slot, code in enumerate(row):
            distances = ((vectors[passage, slot].astype(np.float64) - words) ** 2).sum(axis=1)
            assert code == distances.argmin()


def test_quantize_takes_the_lowest_index_of_equal_codewords():
    words = np.array([[9, 9], [1, 2], [1, 2]], dtype=np.float32)
    assert quantize(np.array([[[1, 2], [8, 9]]], dtype=np.float32), words).tolist() == [[1, 0]]


def test_quantize_serves_vectors_of_very_different_size():
    words = np.array([[1e-3, 0], [1, 0], [1000, 0], [0, 0]], dtype=np.float32)
    vectors = np.array([[[9e-4, 1e-5], [1.1, 0], [4e5, 3], [0, 0]]], dtype=np.float32)
    assert quantize(vectors, words).tolist() == [[0, 1, 2, 3]]


@given(st.lists(st.integers(0, 59), min_size=1, max_size=60))
def test_a_passages_codes_do_not_depend_on_its_neighbours(chosen):
    """Any company, any order, alone: the same bits of z and c (invariant 10)."""
    embeddings, rotation, vectors, words, expected = _encoded_sixty()
    part = to_slots(embeddings[chosen], rotation, 6)
    assert part.tobytes() == vectors[chosen].tobytes()
    assert np.array_equal(quantize(part, words), expected[chosen])


def _encoded_sixty(cache={}):  # noqa: B006 (one computation for all examples)
    if not cache:
        embeddings, rotation = topical_embeddings(60, 96), Rotation.random(96, seed=5)
        vectors = to_slots(embeddings, rotation, 6)
        words = codebook_of(vectors, 40).codewords
        cache["all"] = embeddings, rotation, vectors, words, quantize(vectors, words)
    return cache["all"]


def test_block_boundaries_change_nothing(monkeypatch):
    vectors = to_slots(topical_embeddings(50, 96), Rotation.random(96, seed=5), 6)
    words = codebook_of(vectors, 64).codewords
    whole = quantize(vectors, words)
    monkeypatch.setattr(codes, "_BLOCK_VECTORS", 7)
    assert np.array_equal(quantize(vectors, words), whole)


@given(st.integers(0, 2**32 - 1), st.sampled_from([3, 16, 32, 384]))
def test_exact_products_do_not_depend_on_the_order_of_summation(seed, width):
    """Shuffling the columns shuffles every sum; plain float32 products change their last bits, these do not."""
    draw = np.random.default_rng(seed)
    a, b = draw.standard_normal((2, 9, width)).astype(np.float32)
    order = draw.permutation(width)
    assert exact_inner_products(a, b).tobytes() == exact_inner_products(a[:, order], b[:, order]).tobytes()
    distances = exact_squared_distances(a, b)
    assert distances.tobytes() == exact_squared_distances(a[:, order], b[:, order]).tobytes()
    assert distances == pytest.approx(((a[:, None].astype(float) - b[None]) ** 2).sum(axis=2), rel=1e-5, abs=1e-5)


def test_exact_products_at_the_worst_case_stay_exact():
    """All elements at the grid's limit: the sum just reaches 2^53 and must not round."""
    a = np.full((1, 384), np.nextafter(np.float32(1), np.float32(0)), dtype=np.float32)
    integers, exponent = codes._fixed_point(a)
    assert (integers**2).sum() <= 2.0**53
    assert int((integers @ integers.T)[0, 0]) == sum(int(one) ** 2 for one in integers[0])
    assert float(np.ldexp(integers, exponent)[0, 0]) == pytest.approx(1.0, abs=2**-22)


def test_exact_products_are_as_good_as_float32():
    h, rotation = topical_embeddings(200, 384), Rotation.random(384, seed=0)
    reference = h.astype(np.float64) @ rotation.matrix.astype(np.float64).T
    assert np.abs(rotation.apply(h) - reference).max() < 3e-7


def test_rotation_is_orthogonal_seeded_and_saved(tmp_path):
    rotation = Rotation.random(96, seed=7)
    assert np.abs(rotation.matrix @ rotation.matrix.T - np.eye(96)).max() < 1e-5
    assert rotation.digest == Rotation.random(96, seed=7).digest != Rotation.random(96, seed=8).digest
    rotation.save(tmp_path / "rotation.safetensors")
    again = Rotation.load(tmp_path / "rotation.safetensors")
    assert again.digest == rotation.digest
    assert np.array_equal(again.matrix, rotation.matrix)


def test_a_damaged_rotation_is_refused(tmp_path):
    path = tmp_path / "rotation.safetensors"
    Rotation.random(96, seed=7).save(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DamagedFile, match=r"the rotation cannot be read: .*rotation\.safetensors"):
        Rotation.load(path)
    with pytest.raises(DamagedFile, match="the rotation is not orthogonal"):
        Rotation(np.ones((4, 4), dtype=np.float32))


def test_decode_gives_the_codewords_back():
    words = np.array([[1, 2], [3, 4]], dtype=np.float32)
    assert decode(np.array([[1, 0, 1]], dtype=np.uint16), words).tolist() == [[3, 4, 1, 2, 3, 4]]


def test_empty_batches_are_fine():
    rotation = Rotation.random(96, seed=7)
    vectors = to_slots(np.zeros((0, 96), dtype=np.float32), rotation, 12)
    assert vectors.shape == (0, 12, 8)
    empty = quantize(vectors, np.ones((3, 8), dtype=np.float32))
    assert pack(empty).shape == (0, 14)
    assert unpack(pack(empty), 12).shape == (0, 12)


def test_wrong_inputs_are_named():
    rotation = Rotation.random(96, seed=7)
    words = np.ones((3, 8), dtype=np.float32)
    with pytest.raises(UsageError, match=r"wrong shape or dtype of the embeddings: '\[2, 95\] float32'"):
        rotation.apply(np.zeros((2, 95), dtype=np.float32))
    with pytest.raises(UsageError, match=r"\[2, 96\] float64.*\[any, 96\] float32 is expected"):
        rotation.apply(np.zeros((2, 96)))
    with pytest.raises(UsageError, match="not a numpy array: 'list'"):
        pack([[1]])
    with pytest.raises(UsageError, match="T = 7, width = 96"):
        to_slots(np.zeros((2, 96), dtype=np.float32), rotation, 7)
    with pytest.raises(UsageError, match="infinity or not-a-number: 'row 1 of 2'"):
        rotation.apply(np.array([[0.0] * 96, [np.nan] * 96], dtype=np.float32))
    with pytest.raises(UsageError, match="does not fit into 9 bits: 512"):
        pack(np.array([[512]], dtype=np.uint16))
    with pytest.raises(UsageError, match=r"wrong shape or dtype of the packed addresses: '\[1, 14\] uint8'"):
        unpack(np.zeros((1, 14), dtype=np.uint8), 24)
    with pytest.raises(UsageError, match="a code lies beyond the codebook: 3"):
        decode(np.array([[3]], dtype=np.uint16), words)
    with pytest.raises(UsageError, match="wrong shape or dtype of the slot vectors"):
        quantize(np.zeros((2, 12, 7), dtype=np.float32), words)
