"""Recall and answers from a real small bank: what is found, what is read, and what is refused by name."""

from __future__ import annotations

import pickle
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest
import torch

from mbc_core import Bank, Memory, Reader, defaults
from mbc_core.adapters import AdapterRegistry
from mbc_core.bank import register_codebook
from mbc_core.codes import Rotation, unpack
from mbc_core.errors import DamagedFile, IncompatibleBank, ModelError, UsageError
from mbc_core.lexicon import Lexicon
from mbc_core.reader.kv_lora import KVLoraConfig, add_kv_lora, save_adapter, trainable
from mbc_core.recall import exhaustive_scores
from mbc_core.rerank import DEPTH, reranked
from tests.mbc_core.tiny_reader import (
    SLOTS,
    BagOfWords,
    Doc,
    add_documents,
    documents,
    language_model,
    lexicon,
    make_bank,
    pieces,
)

pytestmark = pytest.mark.usefixtures("single_thread")

DOCS = documents(16)
ROTATION, CODEBOOK = pieces()


@pytest.fixture(autouse=True)
def own_pieces(monkeypatch):
    """The release's pieces are replaced by the tiny ones; nothing is fetched."""
    monkeypatch.setattr(defaults, "rotation", lambda: ROTATION)
    monkeypatch.setattr(defaults, "lexicon_for", lambda manifest: lexicon())
    monkeypatch.setattr(defaults, "encoder_for", lambda manifest, device: BagOfWords())
    monkeypatch.setattr(defaults, "language_model", lambda device: language_model())
    monkeypatch.setattr(defaults, "reader_adapter", lambda: None)


@pytest.fixture
def bank(tmp_path) -> Bank:
    return make_bank(tmp_path / "bank", DOCS)


def test_recall_is_the_exhaustive_search_over_decoded_codes(bank):
    memory = Memory.open(bank)
    passages = bank.passages()
    packed = np.frombuffer(b"".join(passages["address"].to_pylist()), np.uint8).reshape(-1, 27)
    questions = [one.question for one in DOCS]
    vectors = BagOfWords().encode_questions(questions)
    scores = exhaustive_scores(vectors, ROTATION, unpack(packed, SLOTS), CODEBOOK.codewords)
    for row, found in enumerate(memory.recall(questions, k=4, rerank=False)):
        best = np.argsort(-scores[row], kind="stable")[:4]
        assert [(one.key, one.passage) for one in found] == [
            (passages["key"][int(place)].as_py(), passages["passage"][int(place)].as_py()) for place in best
        ]
        assert [one.score for one in found] == pytest.approx(scores[row][best].tolist(), abs=1e-5)


def test_recall_looks_again_by_the_words_that_passages_keep(bank):
    memory = Memory.open(bank)
    questions = [one.question for one in DOCS]
    scores, rows = memory.search(BagOfWords().encode_questions(questions), DEPTH)
    kept = {row: memory.words([row])[0] for row in range(len(memory))}
    expected = reranked(scores, rows, questions, kept, memory.lexicon, 4)
    for place, found in enumerate(memory.recall(questions, k=4)):
        assert [one.words for one in found] == [kept[row] for row in expected[1][place].tolist()]
        assert [one.score for one in found] == pytest.approx(expected[0][place].tolist())
    assert memory.recall(questions, k=4) != memory.recall(questions, k=4, rerank=False)


def test_what_is_recalled_names_its_document_time_and_words(bank):
    found = Memory.open(bank).recall(["Who founded Avalon00?"], k=3)[0]
    assert (found[0].doc_id, found[0].title) == ("doc-00", "About doc-00")
    assert found[0].event_time == datetime(2024, 7, 1, tzinfo=UTC)
    assert "Founder00" in found[0].words.split() and "Avalon00" in found[0].words.split()
    assert found[0].to_json() == {
        "doc_id": "doc-00",
        "title": "About doc-00",
        "event_time": "2024-07-01T00:00:00Z",
        "score": round(found[0].score, 4),
        "words": found[0].words,
    }


def test_a_bank_recalls_by_itself_and_notices_that_it_has_grown(bank, monkeypatch):
    question = "Who founded Avalon00?"
    assert bank.recall(question, k=3) == Memory.open(bank).recall([question], 3)[0]
    with monkeypatch.context() as patched:
        patched.setattr(Memory, "open", None)  # nothing is opened again
        assert len(bank.recall(question)) == 5
    add_documents(bank, [Doc("late", "The town of Avalon00 was founded by Founder99.", "2024-08-01")], "second")
    monkeypatch.setattr(defaults, "encoder_for", None)  # the encoder is kept
    assert "late" in [one.doc_id for one in bank.recall(question, k=3)]
    assert pickle.loads(pickle.dumps(bank))._memory is None  # workers get the address alone


def test_more_wanted_than_there_is_and_nothing_asked(bank):
    memory = Memory.open(bank)
    assert len(memory) == 16 and len(memory.recall(["Avalon00"], k=99)[0]) == 16
    assert memory.recall([], k=5) == []


def test_an_empty_bank_recalls_nothing_and_still_answers(tmp_path):
    bank = make_bank(tmp_path / "bank", [])
    assert Memory.open(bank).recall(["anything"], k=5) == [[]]
    answer = Reader(bank).ask("anything?")
    assert answer.sources == () and answer.to_json()["sources"] == []


def test_a_document_without_time_has_none(tmp_path):
    bank = make_bank(tmp_path / "bank", [Doc("undated", "The town of Avalon lies by the sea.")])
    assert Memory.open(bank).recall(["Avalon"], k=1)[0][0].to_json()["event_time"] is None


def test_rows_of_several_codebook_versions_are_searched_together(bank, tmp_path):
    """Version 1 has the same codewords in another order: other codes, the same meaning, so the same scores."""
    order = np.arange(len(CODEBOOK.codewords))[::-1].copy()
    permuted = replace(
        CODEBOOK, version=1, parent=0, codewords=CODEBOOK.codewords[order], count=CODEBOOK.count[order],
        sum=CODEBOOK.sum[order], built_from=("2024-07-01T00:00:00Z",), last_window="2024-07-01T00:00:00Z",
    )  # fmt: skip
    mixed = make_bank(tmp_path / "mixed", DOCS[:9])
    register_codebook(mixed, permuted)
    add_documents(mixed, DOCS[9:], "second", permuted)
    assert set(mixed.passages()["codebook_version"].to_pylist()) == {0, 1}
    questions = [one.question for one in DOCS]
    assert Memory.open(mixed).recall(questions, 5) == Memory.open(bank).recall(questions, 5)


def test_as_of_shows_the_bank_as_it_was(bank):
    before = datetime.now(UTC)
    add_documents(bank, [Doc("late", "The town of Avalon00 was moved by Founder99 in 1999.", "2024-08-01")], "second")
    now, then = Memory.open(bank), Memory.open(bank, as_of=before)
    assert (len(now), len(then)) == (17, 16)
    assert "late" in [one.doc_id for one in now.recall(["Who moved Avalon00?"], 17)[0]]
    assert "late" not in [one.doc_id for one in then.recall(["Who moved Avalon00?"], 17)[0]]
    naive = (before.astimezone(UTC)).replace(tzinfo=None)
    assert len(Memory.open(bank, as_of=naive)) == 16  # UTC when no zone is named
    assert Reader(bank, as_of=before).ask("Avalon00?", read="closed").to_json()["as_of"].endswith("Z")


def test_a_revision_replaces_what_was_recalled(bank):
    add_documents(bank, [Doc("doc-00", "The town of Avalon00 was refounded by Nobody77.", "2024-07-01")], "second")
    (found,) = Memory.open(bank).recall(["Who founded Avalon00?"], 20)
    assert [one.words for one in found if one.doc_id == "doc-00"] == [
        next(one.words for one in found if "Nobody77" in one.words)
    ]


class OtherEncoder(BagOfWords):
    encoder_id = "other@ffffffffffff/float32/sentences-256"


def test_another_encoder_lexicon_or_rotation_is_refused_by_name(bank):
    with pytest.raises(IncompatibleBank, match=r"made with another encoder: 'bag-of-words@0123.*other@ffffffffffff"):
        Memory.open(bank, OtherEncoder())
    with pytest.raises(IncompatibleBank, match=r"made with another lexicon"):
        Memory.open(bank, lexicon=Lexicon([]))
    with pytest.raises(IncompatibleBank, match=r"made with another rotation"):
        Memory.open(bank, rotation=Rotation.random(96, 5))


def test_an_address_of_the_wrong_length_is_damage(bank, monkeypatch):
    passages = bank.passages()
    cut = pa.array([one[:20] for one in passages["address"].to_pylist()], pa.binary())
    broken = passages.set_column(passages.schema.get_field_index("address"), "address", cut)
    monkeypatch.setattr(Bank, "passages", lambda self, as_of=None: broken)
    with pytest.raises(DamagedFile, match=r"an address has the wrong length: '\[20\] bytes'.*T = 24 takes 27"):
        Memory.open(bank)


def test_no_bank_is_told(tmp_path):
    with pytest.raises(UsageError, match=r"there is no bank here"):
        Memory.open(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"there is no bank here"):
        Reader(tmp_path / "nowhere")


# ------------------------------------------------------------------------------------------------------------ Reader


def test_an_answer_has_the_keys_of_the_command_line(bank):
    told = Reader(bank).ask("Who founded Avalon00?", k=2).to_json()
    assert list(told) == ["question", "answer", "read", "as_of", "sources", "milliseconds"]
    assert list(told["milliseconds"]) == ["recall", "generate"] and told["milliseconds"]["generate"] > 0
    assert told["sources"][0]["doc_id"] == "doc-00" and len(told["sources"]) == 2
    assert (told["question"], told["read"], told["as_of"]) == ("Who founded Avalon00?", "recall", None)


def test_the_model_reads_the_recalled_words_best_first_then_the_question(bank, monkeypatch):
    seen = []

    def noting(language_model, form, prompts, **options):
        seen.extend(language_model.tokenizer.decode(one) for one in prompts)
        return ["said"] * len(prompts)

    monkeypatch.setattr("mbc_core.reader.generate.answer_prompts", noting)
    reader = Reader(bank)
    answer = reader.ask("Who founded Avalon00?", k=3)
    lines = [f" {one.words}\n" for one in answer.sources]
    assert seen == ["".join(lines) + "Question: Who founded Avalon00?\nAnswer:"] and answer.answer == "said"
    assert reader.prompt_tokens([["one"]], ["Why?"]) == [len(b" one\nQuestion: Why?\nAnswer:")]
    reader.ask("Who founded Avalon00?", read="closed")
    assert seen[-1] == "Question: Who founded Avalon00?\nAnswer:"


def test_many_questions_at_once_are_answered_as_one_by_one(bank):
    reader = Reader(bank)
    questions = [one.question for one in DOCS[:5]]
    together = reader.ask_many(questions, k=2)
    alone = [reader.ask(one, k=2) for one in questions]
    assert [(one.answer, one.sources) for one in together] == [(one.answer, one.sources) for one in alone]
    assert reader.ask_many([]) == []


def test_closed_book_needs_no_encoder_and_shows_no_sources(bank, monkeypatch):
    monkeypatch.setattr(defaults, "encoder_for", None)
    answer = Reader(bank).ask("Who founded Avalon00?", read="closed")
    assert answer.sources == () and answer.recall_ms == 0


def test_wrong_questions_and_reads_are_told(bank):
    reader = Reader(bank)
    with pytest.raises(UsageError, match=r"a question is empty: 'number 2 of 2'"):
        reader.ask_many(["Why?", "  "])
    with pytest.raises(UsageError, match=r"a question is empty: 'number 1 of 1'"):
        reader.memory.recall([""])
    with pytest.raises(UsageError, match=r"a question is not UTF-8: 'number 1 of 1'"):
        reader.ask("Wh\udcff?")
    with pytest.raises(UsageError, match=r"there is no such read: 'telepathy'.*recall, attend, aggregate, closed"):
        reader.ask("Why?", read="telepathy")
    with pytest.raises(UsageError, match=r"the question is too long"):
        reader.ask("why " * 2000)
    with pytest.raises(UsageError, match=r"k is below 1"):
        reader.ask("Why?", k=0)


def test_a_bank_without_words_recalls_but_is_not_read(tmp_path):
    bank = make_bank(tmp_path / "bank", DOCS, words=0)
    assert Memory.open(bank).recall(["Avalon00"], 1)[0][0].words == ""
    with pytest.raises(IncompatibleBank, match=r"no word codes to read: 'profile paper'.*--profile default"):
        Reader(bank).ask("Who founded Avalon00?")
    assert Reader(bank).ask("Who founded Avalon00?", read="closed").sources == ()


def adapter_folder(folder, seed: int, kind: str = "llama"):
    """An adapter that changes answers, for the tiny base model."""
    base = language_model(kind)
    config = KVLoraConfig(r=2, alpha=64)
    adapted = add_kv_lora(base.model, config, seed=seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in trainable(adapted).values():
            weight.add_(torch.randn_like(weight))
    save_adapter(adapted, folder, config, base_digest=base.digest, base_name=base.name)
    return folder


def test_which_adapter_reads(bank, tmp_path, monkeypatch):
    first, second, shipped = (adapter_folder(tmp_path / name, seed) for seed, name in enumerate(("a", "b", "c"), 1))
    question = "Who founded Avalon00?"

    def answer(**options):
        reader = Reader(bank, **options)
        return reader.ask(question).answer, reader.adapter

    plain, name = answer()
    assert name is None
    monkeypatch.setattr(defaults, "reader_adapter", lambda: shipped)
    with_shipped, name = answer()
    assert name == "shipped" and with_shipped != plain
    registry = AdapterRegistry(bank)
    base = language_model().digest
    version = registry.save_candidate_folder(first, {}, base)
    assert answer() == (with_shipped, "shipped")  # a candidate is not live
    before = datetime.now(UTC)
    registry.promote(version, "better")
    with_live, name = answer()
    assert name == version and with_live not in (plain, with_shipped)
    assert answer(as_of=before) == (with_shipped, "shipped")
    with_folder, name = answer(adapter=second)
    assert name == str(second) and with_folder not in (plain, with_shipped, with_live)
    registry.rollback(base, "worse")
    assert answer() == (with_shipped, "shipped")


def test_a_shipped_adapter_of_another_base_is_left_alone_and_a_given_one_is_refused(bank, tmp_path, monkeypatch):
    folder = adapter_folder(tmp_path / "gpt2", 1, "gpt2")
    monkeypatch.setattr(defaults, "reader_adapter", lambda: folder)
    assert Reader(bank).adapter is None
    with pytest.raises(ModelError, match=r"trained for another base model"):
        Reader(bank, adapter=folder).ask("Why?")


def test_a_damaged_live_adapter_is_told(bank, tmp_path):
    registry = AdapterRegistry(bank)
    version = registry.save_candidate_folder(adapter_folder(tmp_path / "a", 1), {}, language_model().digest)
    registry.promote(version, "better")
    path = tmp_path / "bank" / "adapters" / version / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(DamagedFile, match=r"does not match its digest"):
        Reader(bank).ask("Why?")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_one_bank_is_read_by_two_families_of_models(bank, kind):
    reader = Reader(Memory.open(bank), language_model=language_model(kind))
    answers = reader.ask_many([one.question for one in DOCS[:3]], k=2)
    assert len({one.answer for one in answers}) > 1
    assert all(one.sources[0].doc_id == doc.doc_id for one, doc in zip(answers, DOCS[:3], strict=True))


def test_the_package_offers_its_names_lazily():
    import mbc_core

    assert mbc_core.Reader is Reader and set(mbc_core.__all__) == {"Bank", "Memory", "Reader"}
    with pytest.raises(AttributeError, match=r"has no attribute 'Nothing'"):
        _ = mbc_core.Nothing
