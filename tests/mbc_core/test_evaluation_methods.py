"""Sets of documents and questions, the closed book and full text, against what `mbc eval` itself would ask."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from mbc_core.codes import quantize, to_slots
from mbc_core.errors import UsageError
from mbc_core.evaluation.methods import MethodSet, folder_digest, load_method_set
from mbc_core.evaluation.text_methods import ClosedBook, FullText
from mbc_core.reader.generate import answer_prompts
from mbc_core.reader.kv_lora import KVLoraConfig, add_kv_lora, save_adapter
from mbc_core.reader.prompt import PromptFormat
from mbc_core.training.neighbours import code_scores
from mbc_core.training.prepared import load_prepared
from tests.mbc_core.prepared_data import write_prepared
from tests.mbc_core.tiny_reader import SLOTS, language_model, pieces

pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_prepared(tmp_path_factory.mktemp("prepared"), 8)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    where = tmp_path_factory.mktemp("adapter")
    base = language_model()
    model = add_kv_lora(base.model, KVLoraConfig(r=2, alpha=4))
    save_adapter(model, where, KVLoraConfig(r=2, alpha=4), base_digest=base.digest, base_name=base.name)
    return where


def named(prepared, names):
    return replace(prepared, table=prepared.table.set_column(0, "passage_id", [names]))


def test_passages_of_one_document_belong_together(folder):
    names = ["a", "a#1", "a#2", "b", "c", "c#1", "d#x", "e"]
    data = MethodSet.of("towns", named(load_prepared(folder), names))
    assert [one.tolist() for one in data.documents] == [[0, 1, 2], [3], [4, 5], [6], [7]]
    assert data.rows_of([1, 0]).tolist() == [3, 0, 1, 2] and data.rows_of([]).tolist() == []
    assert data.asked_about() == list(range(8))
    few = data.first(3)
    assert [one.tolist() for one in few.documents] == [[0, 1, 2], [3], [4, 5]] and len(few.prepared.questions) == 6
    assert few.digest != data.digest and data.first(5) is data and data.first(None) is data
    assert data.asked_about(1) == [0, 1, 2] and data.asked_about(3) == [0, 1, 2, 3, 4, 5]


def test_the_digest_is_of_texts_questions_and_answers(folder):
    prepared = load_prepared(folder)
    one = MethodSet.of("towns", prepared)
    assert MethodSet.of("other name", prepared).digest == one.digest
    other = replace(prepared, answers=[["y"], *prepared.answers[1:]])
    assert MethodSet.of("towns", other).digest != one.digest


def test_strangers_must_be_strangers(folder, tmp_path):
    prepared = load_prepared(folder)
    with pytest.raises(UsageError, match="8 passages are in both"):
        MethodSet.of("towns", prepared, prepared)
    nothing = load_prepared(write_prepared(tmp_path, 4, questions=False))
    with pytest.raises(UsageError, match="no questions"):
        MethodSet.of("towns", nothing)


def test_the_closed_book_answers_the_bare_question(folder, adapter):
    base, data = language_model(), load_method_set("towns", folder)
    method = ClosedBook(base, None)
    method.start(data)
    said = method.answer([3, 1])
    form = PromptFormat(base.tokenizer)
    wanted = answer_prompts(base, form, [form.build([], data.prepared.questions[one]).ids for one in (3, 1)])
    assert said == wanted and any(said)
    method.adapt([0, 1, 2])
    assert method.answer([3, 1]) == said and method.size().bank == 0
    assert ClosedBook(base, adapter).identity != method.identity
    assert ClosedBook(base, adapter).size().model == (adapter / "adapter_model.safetensors").stat().st_size


def expected(data, rows, questions):
    """The two best of ``rows`` for each question, by the score of the codes."""
    rotation, codebook = pieces()
    codes = quantize(to_slots(data.prepared.embeddings[rows], rotation, SLOTS), codebook.codewords)
    asked = to_slots(data.prepared.question_embeddings[questions], rotation, SLOTS)
    scores = code_scores(*(torch.from_numpy(one) for one in (asked, codes.astype(np.int64), codebook.codewords)))
    texts = data.prepared.table["text"].to_pylist()
    return [[texts[rows[place]] for place in row.argsort(descending=True)[:2].tolist()] for row in scores]


def test_full_text_shows_what_is_found_among_the_documents_so_far(folder, adapter, monkeypatch):
    base, data = language_model(), load_method_set("towns", folder)
    rotation, codebook = pieces()
    shown = []
    real = PromptFormat.build

    def build(self, memory, question, max_tokens=0):
        shown.append(list(memory))
        return real(self, memory, question, max_tokens)

    monkeypatch.setattr(PromptFormat, "build", build)
    method = FullText(base, adapter, rotation, codebook, k=2)
    method.start(data)
    texts = data.prepared.table["text"].to_pylist()
    method.answer([0])
    assert shown.pop() == []  # nothing has come yet
    method.adapt([4, 0, 6])
    method.answer([0, 7])
    assert shown == expected(data, [4, 0, 6], [0, 7])
    shown.clear()
    method.adapt([7, 1, 2, 3, 5])
    method.answer([7])
    assert shown == expected(data, [4, 0, 6, 7, 1, 2, 3, 5], [7])
    held = sum(len(one.encode()) for one in texts) + 8 * (SLOTS * 9 // 8)
    assert method.size() == replace(method.size(), kind="text", entries=8, bank=held)
    method.start(data)
    assert method.size().entries == 0


def test_k_is_at_least_one_and_names_the_row(adapter):
    rotation, codebook = pieces()
    assert FullText(language_model(), adapter, rotation, codebook, k=3).name == "text@3"
    with pytest.raises(UsageError, match="k is below 1"):
        FullText(language_model(), adapter, rotation, codebook, k=0)


def test_a_folders_digest_is_of_weights_and_configuration(adapter, tmp_path):
    for file in adapter.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "card.json").write_text("{}")
    assert folder_digest(tmp_path) == folder_digest(adapter)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert folder_digest(tmp_path) != folder_digest(adapter)


def test_order_of_rows_is_kept_in_numpy_and_arrow_alike(folder):
    data = load_method_set("towns", folder)
    rows = data.rows_of([5, 2])
    assert rows.dtype == np.int64
    assert data.prepared.table.take(pa.array(rows))["passage_id"].to_pylist() == ["doc-05", "doc-02"]
