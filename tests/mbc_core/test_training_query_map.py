"""Training a query map: it finds what codes hide on planted data, a seed gives it again, the card holds the truth."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner
from codebook_data import codebook_of

from mbc_core.cli.train_query_map import query_map_command
from mbc_core.codes import LENGTH_WEIGHT, Rotation, decode, pack, quantize, to_slots
from mbc_core.errors import UsageError
from mbc_core.query_map import QueryMap, mapped_scores
from mbc_core.recall import RecallIndex, exhaustive_scores
from mbc_core.training import query_map as training
from mbc_core.training.prepared import Prepared
from mbc_core.training.query_map import QueryMapRecipe, fit_query_map, measure_map, train_query_maps

WIDTH, SLOTS = 32, 4
ROTATION = Rotation(np.eye(WIDTH, dtype=np.float32))
RECIPE = QueryMapRecipe(steps=60, batch=64, hard=8, nearest=16, lr=0.03)

pytestmark = pytest.mark.usefixtures("single_thread")


def planted(count: int, seed: int = 0) -> Prepared:
    """Passages whose first slot direction is shared by all and that questions get wrong: what a map can unlearn."""
    draw = np.random.default_rng(seed)
    passages = draw.standard_normal((count, SLOTS, WIDTH // SLOTS))
    asked = passages + 0.5 * draw.standard_normal(passages.shape)
    passages[:, :, 0] += draw.standard_normal((count, SLOTS)) * 2
    asked[:, :, 0] = draw.standard_normal((count, SLOTS)) * 2
    rows = np.arange(count)
    table = pa.table(
        {"source": ["planted"] * count, "split": ["dev" if row % 5 == 0 else "train" for row in rows.tolist()]}
    )
    names = [str(row) for row in rows.tolist()]
    return Prepared(table, unit(passages), names, [[one] for one in names], rows, unit(asked))


def unit(rows: np.ndarray) -> np.ndarray:
    flat = rows.reshape(len(rows), WIDTH)
    return (flat / np.linalg.norm(flat, axis=1, keepdims=True)).astype(np.float32)


DATA = planted(400)
BOOK = codebook_of(to_slots(DATA.embeddings, ROTATION, SLOTS), 128)


@pytest.fixture(scope="module")
def fitted() -> QueryMap:
    return fit_query_map(DATA, ROTATION, BOOK, SLOTS, RECIPE)


def test_new_questions_find_their_passages_better_and_the_bad_direction_counts_less(fitted):
    new = planted(400, seed=7)
    found = measure_map(new.embeddings, new.question_embeddings, new.rows, ROTATION, BOOK, SLOTS, fitted)
    assert found["gain_at_1"][1] > 0, "the interval of the gain lies above zero"
    diagonal = (1 + np.diag(fitted.residual)).reshape(SLOTS, -1)
    assert (diagonal[:, 0] < 0.7 * diagonal[:, 1:].mean(axis=1)).all()


def test_what_is_measured_is_what_a_plain_search_finds(fitted):
    new = planted(150, seed=8)
    found = measure_map(new.embeddings, new.question_embeddings, new.rows, ROTATION, BOOK, SLOTS, fitted)
    packed = pack(quantize(to_slots(new.embeddings, ROTATION, SLOTS), BOOK.codewords))
    for name, one in (("codes", None), ("mapped", fitted)):
        index = RecallIndex.build([(BOOK, packed, new.rows)], ROTATION, SLOTS, engine="exact", query_map=one)
        _, rows = index.search(new.question_embeddings, 5)
        for k in (1, 5):
            right = [row in line[:k] for row, line in enumerate(rows.tolist())]
            assert found[f"{name}_at_{k}"] == pytest.approx(100 * np.mean(right), abs=0.01)
    ranks = (new.question_embeddings @ new.embeddings.T).argmax(axis=1)
    assert found["float_at_1"] == pytest.approx(100 * np.mean(ranks == new.rows), abs=0.01)
    assert (found["questions"], found["passages"]) == (150, 150)
    assert found["mapped_share_at_1"][0] == pytest.approx(100 * found["mapped_at_1"] / found["float_at_1"], abs=0.02)


def test_scores_stay_on_the_scale_of_the_plain_score(fitted):
    """Words are added to scores, so right and nearly right passages must stand as far apart as without the map."""
    codes = quantize(to_slots(DATA.embeddings, ROTATION, SLOTS), BOOK.codewords)
    plain = exhaustive_scores(DATA.question_embeddings, ROTATION, codes, BOOK.codewords)
    mapped = mapped_scores(DATA.question_embeddings, ROTATION, codes, BOOK.codewords, fitted)
    right = np.arange(len(DATA))
    wrong = plain.copy()
    wrong[right, right] = -np.inf
    near = np.hstack([right[:, None], np.argsort(-wrong, axis=1)[:, : RECIPE.nearest]])
    one, other = (np.take_along_axis(scores, near, axis=1) for scores in (plain, mapped))
    assert other.mean() == pytest.approx(one.mean(), abs=1e-3)
    assert other.std(axis=1, ddof=1).mean() == pytest.approx(one.std(axis=1, ddof=1).mean(), rel=1e-2)


def test_the_model_before_its_first_step_is_the_plain_score():
    model = training._Model(WIDTH, SLOTS)
    decoded = torch.from_numpy(
        decode(quantize(to_slots(DATA.embeddings, ROTATION, SLOTS), BOOK.codewords), BOOK.codewords)
    )
    asked = torch.from_numpy(DATA.question_embeddings)
    raw = model.turned(asked) @ decoded.T - (decoded**2) @ model.lengths()
    plain = asked @ decoded.T - LENGTH_WEIGHT * (decoded**2).sum(dim=1)
    assert raw.detach().numpy() == pytest.approx(plain.numpy(), abs=1e-6)


def test_a_seed_gives_the_same_map_again(fitted):
    assert fit_query_map(DATA, ROTATION, BOOK, SLOTS, RECIPE).digest == fitted.digest
    other = QueryMapRecipe(steps=60, batch=64, hard=8, nearest=16, lr=0.03, seed=1)
    assert fit_query_map(DATA, ROTATION, BOOK, SLOTS, other).digest != fitted.digest


def test_maps_and_cards_are_written_and_held_out_passages_are_not_learned(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "load_prepared", lambda folder: DATA)
    said: list[str] = []
    (card,) = train_query_maps(
        tmp_path, ROTATION, {SLOTS: BOOK}, tmp_path / "out", RECIPE, measure={"again": tmp_path}, say=said.append
    )
    written = QueryMap.load(tmp_path / "out" / f"query_map_t{SLOTS}.safetensors")
    assert (
        written.digest
        == card["file_sha256"]
        == fit_query_map(DATA.split("train"), ROTATION, BOOK, SLOTS, RECIPE).digest
    )
    assert card == json.loads((tmp_path / "out" / f"query_map_t{SLOTS}.json").read_text("utf-8"))
    assert (card["rotation"], card["codebook"], card["passages"]) == (ROTATION.digest, BOOK.digest, 320)
    assert (card["held_out"]["questions"], card["held_out"]["passages"]) == (80, 400)
    assert card["recall"]["again"]["questions"] == 400
    assert any("step 60 of 60" in line for line in said)


def test_the_command_reads_weights_from_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "load_prepared", lambda folder: DATA)
    ROTATION.save(tmp_path / "rotation.safetensors")
    (tmp_path / f"codebook_t{SLOTS}.safetensors").write_bytes(BOOK.to_bytes())
    line = ["--out", tmp_path / "out", "--weights", tmp_path, "--slots", SLOTS, "--steps", 3, "--batch", 8]
    done = CliRunner().invoke(query_map_command, [str(one) for one in (tmp_path, *line)])
    assert done.exit_code == 0, done.output
    (card,) = json.loads(done.stdout)
    assert card["command"].startswith("mbc train query-map PREPARED --out OUT --steps 3 --batch 8")
    assert (tmp_path / "out" / card["file"]).exists()


def test_too_little_to_learn_from_is_named():
    with pytest.raises(UsageError, match="too few passages to train a query map: '12 passages, 12 questions'"):
        fit_query_map(DATA.take(np.arange(12)), ROTATION, BOOK, SLOTS, RECIPE)
