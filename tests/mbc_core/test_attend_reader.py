"""`--read attend` of a bank: the same weights under two adapters, passages by address alone, and errors by name."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner

from mbc_core import defaults
from mbc_core.answering import Reader
from mbc_core.bank import Bank
from mbc_core.cli.ask import ask
from mbc_core.codes import decode, unpack
from mbc_core.errors import IncompatibleBank, ModelError
from mbc_core.memory import Memory
from mbc_core.reader.attend_prompt import answer_attend
from mbc_core.reader.attend_reader import AttendReader, shared_copy
from mbc_core.reader.prompt import PromptFormat, prompt_room
from tests.mbc_core.qa_bank import open_bank
from tests.mbc_core.test_evaluation_attend import write_weights
from tests.mbc_core.tiny_reader import (
    SLOTS,
    BagOfWords,
    add_documents,
    documents,
    language_model,
    lexicon,
    make_bank,
    pieces,
)

pytestmark = pytest.mark.usefixtures("single_thread")

QUESTIONS = [doc.question for doc in documents(12)]


@pytest.fixture(scope="module")
def attend_folder(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("attend"), seed=3)


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    return open_bank(make_bank(tmp_path_factory.mktemp("bank") / "bank", documents(8)))


def test_vectors_are_the_codewords_turned_back(memory):
    rotation, codebook = pieces()
    addresses = [np.frombuffer(address, np.uint8) for address in memory.passages["address"].to_pylist()]
    expected = decode(unpack(np.stack(addresses), SLOTS), codebook.codewords) @ rotation.matrix
    rows = np.array([3, 0, 3])
    assert memory.vectors(rows) == pytest.approx(expected[rows], abs=1e-6)
    assert memory.vectors(rows[:0]).shape == (0, rotation.width)


def test_each_row_is_decoded_by_the_codebook_it_names(memory, monkeypatch):
    """Every second row says another version, whose codewords point the other way."""
    _, first = pieces()
    other = replace(first, codewords=-first.codewords)
    versions = pa.array(np.arange(len(memory)) % 2, memory.passages.schema.field("codebook_version").type)
    place = memory.passages.schema.get_field_index("codebook_version")
    table = memory.passages.set_column(place, "codebook_version", versions)
    mixed = Memory(memory.bank, table, memory._index, memory.encoder, memory.lexicon)
    monkeypatch.setattr(memory.bank, "codebook", lambda version: other if version else first)
    rows = np.array([5, 2, 1, 0])
    sign = np.where(rows % 2, -1, 1)[:, None]
    assert mixed.vectors(rows) == pytest.approx(sign * memory.vectors(rows), abs=1e-6)


def test_attend_recalls_by_address_and_answers_from_vectors_alone(memory, attend_folder):
    reader = Reader(memory, language_model=language_model(), attend=attend_folder)
    answers = reader.ask_many(QUESTIONS, k=3, read="attend")
    recalled = memory.recall(QUESTIONS, 3, rerank=False)
    assert [[one.doc_id for one in answer.sources] for answer in answers] == [
        [one.doc_id for one in found] for found in recalled
    ]
    found, vectors, asked = memory.recall_vectors(QUESTIONS, 3)
    assert [[one.key for one in line] for line in found] == [[one.key for one in line] for line in recalled]
    model = reader.attend.language_model
    expected, _ = answer_attend(
        model, reader.attend.projector, PromptFormat(model.tokenizer), vectors, QUESTIONS, asked,
        [[one.score for one in line] for line in found], max_tokens=prompt_room(model),
    )  # fmt: skip
    assert [answer.answer for answer in answers] == expected
    assert answers[0].read == "attend" and answers[0].recall_ms > 0


def test_two_reads_of_one_reader_share_weights_and_leave_each_other_alone(memory, attend_folder):
    reader = Reader(memory, language_model=language_model(), attend=attend_folder)
    before = [answer.answer for answer in reader.ask_many(QUESTIONS, read="closed")]
    attended = [answer.answer for answer in reader.ask_many(QUESTIONS, read="attend")]
    assert [answer.answer for answer in reader.ask_many(QUESTIONS, read="closed")] == before
    fresh = Reader(memory, language_model=language_model(), attend=attend_folder)
    assert [answer.answer for answer in fresh.ask_many(QUESTIONS, read="attend")] == attended
    ours, theirs = (
        next(one for name, one in model.named_parameters() if "embed" in name)
        for model in (reader.language_model.model, reader.attend.language_model.model)
    )
    assert ours.data_ptr() == theirs.data_ptr()


def test_a_shared_copy_has_modules_of_its_own():
    base = language_model()
    copied = shared_copy(base)
    assert copied.model is not base.model and type(copied.model) is type(base.model)
    assert [one.data_ptr() for one in copied.model.parameters()] == [one.data_ptr() for one in base.model.parameters()]
    copied.model.lm_head = torch.nn.Identity()
    assert not isinstance(base.model.lm_head, torch.nn.Identity)


def test_a_bank_without_words_can_be_attended_to(tmp_path, attend_folder):
    bank = make_bank(tmp_path / "bank", documents(8), words=0)
    reader = Reader(open_bank(bank), language_model=language_model(), attend=attend_folder)
    assert len(reader.ask_many(QUESTIONS[:2], read="attend")) == 2
    with pytest.raises(IncompatibleBank, match="--read attend"):
        reader.ask(QUESTIONS[0])


def test_missing_weights_another_base_and_another_encoder_are_told_by_name(memory, attend_folder, tmp_path):
    with pytest.raises(ModelError, match="there are no weights for the read `attend`"):
        Reader(memory, language_model=language_model(), attend=tmp_path).ask(QUESTIONS[0], read="attend")
    with pytest.raises(ModelError, match="trained for another language model"):
        Reader(memory, language_model=language_model(seed=4), attend=attend_folder).ask(QUESTIONS[0], read="attend")
    with pytest.raises(IncompatibleBank, match="another encoder"):
        AttendReader(language_model(), attend_folder, "another@1/float32/rule")


def test_an_empty_bank_is_answered_by_the_model_alone(tmp_path, attend_folder):
    bank = make_bank(tmp_path / "bank", [])
    reader = Reader(open_bank(bank), language_model=language_model(), attend=attend_folder)
    assert reader.ask(QUESTIONS[0], read="attend").sources == ()


def test_the_command_attends(tmp_path, attend_folder, monkeypatch):
    add_documents(make_bank(tmp_path / "bank", documents(4)), documents(8)[4:], "second")
    monkeypatch.setattr(defaults, "encoder_for", lambda manifest, device="cpu": BagOfWords())
    monkeypatch.setattr(defaults, "rotation", lambda: pieces()[0])
    monkeypatch.setattr(defaults, "lexicon_for", lambda manifest: lexicon())
    monkeypatch.setattr(defaults, "language_model", lambda *given, **options: language_model())
    told = [
        QUESTIONS[0],
        "--bank",
        str(tmp_path / "bank"),
        "--read",
        "attend",
        "--attend",
        str(attend_folder),
        "--json",
    ]
    result = CliRunner().invoke(ask, told)
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["read"] == "attend" and len(answer["sources"]) == 5
    assert Bank.open(tmp_path / "bank").manifest.slots == SLOTS
