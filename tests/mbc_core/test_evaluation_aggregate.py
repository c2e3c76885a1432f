"""The aggregate read in an evaluation: a sheet carries the bank's histogram as one line, and is answered from it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from mbc_core import defaults, weights
from mbc_core.answering import Reader
from mbc_core.bank.histogram import bank_histogram
from mbc_core.errors import DamagedFile, ModelError
from mbc_core.evaluation.answers import Adapters, answer_sheet
from mbc_core.evaluation.asking import Wanted
from mbc_core.evaluation.kept_answers import KeptAnswers
from mbc_core.evaluation.protocols import sheet_of_banks
from mbc_core.evaluation.sheet import Shown, load_sheet, save_sheet
from mbc_core.evaluation.whole_bank import histogram_from, histogram_line, paper_folder
from mbc_core.paper.files import trained_on
from tests.mbc_core.qa_bank import memory_of, qa_set
from tests.mbc_core.test_reader_aggregate import write_weights
from tests.mbc_core.tiny_reader import SLOTS, BagOfWords, language_model, pieces

pytestmark = pytest.mark.usefixtures("single_thread")

QA = qa_set()
READS = ("aggregate-shuffled", "aggregate")


@pytest.fixture(autouse=True)
def tiny_pieces(monkeypatch):
    monkeypatch.setattr(defaults, "rotation", lambda: pieces()[0])


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("paper"))


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    return memory_of(tmp_path_factory.mktemp("banks") / "bank", QA, "default")


@pytest.fixture(scope="module")
def sheet(memory):
    return sheet_of_banks(QA, {"default": memory}, BagOfWords(), Wanted(reads=READS, ks=(3, 1)))


def one(sheet, read) -> Shown:
    (found,) = [shown for shown in sheet.shown if shown.read == read]
    return found


def test_every_question_is_shown_the_same_line_which_is_the_banks_histogram(sheet, memory):
    shown = one(sheet, "aggregate")
    lines = {line for lines in sheet.memory(shown) for line in lines}
    found, wanted = histogram_from(*lines), bank_histogram(memory.bank)
    assert {version: held.tolist() for version, held in found.cells.items()} == {
        version: held.tolist() for version, held in wanted.cells.items()
    }
    assert found.passages == wanted.passages == len(memory)
    assert (shown.k, shown.profile, shown.bytes_per_passage) == (0, f"T{SLOTS}", 27.0) and shown.recall_ms > 0


def test_the_shuffled_bank_has_as_many_codes_under_other_codewords(sheet, memory):
    own, other = (histogram_from(sheet.memory(one(sheet, read))[0][0]) for read in reversed(READS))
    for version, held in own.cells.items():
        assert not np.array_equal(held, other.cells[version])
        for cells, others in zip(held, other.cells[version], strict=True):
            assert sorted(cells) == sorted(others)
    assert histogram_line(memory, 3) == histogram_line(memory, 3) != histogram_line(memory, 4)


def test_a_sheet_from_disk_is_answered_as_the_bank_itself(sheet, memory, paper, tmp_path):
    save_sheet(tmp_path / "sheet.gz", sheet)
    told = load_sheet(tmp_path / "sheet.gz")
    assert told == sheet
    base = language_model()
    answered = {row.shown.read: row for row in answer_sheet(told, base, Adapters(aggregate=paper))}
    assert set(answered) == set(READS) and not hasattr(base.model, "peft_config")
    questions = [one.question for one in QA.questions]
    reader = Reader(memory, paper=paper, language_model=language_model())
    embeddings = BagOfWords().encode_questions(questions).astype(np.float16).astype(np.float32)  # as a sheet has them
    vectors = reader.aggregate.memory(reader.histogram, reader.bank)
    assert answered["aggregate"].predictions == reader.aggregate.answer(questions, embeddings, vectors)
    assert answered["aggregate"].predictions != answered["aggregate-shuffled"].predictions
    assert answered["aggregate"].passages == 0 and answered["aggregate"].prompt_tokens > 0


def test_kept_answers_belong_to_this_bank_and_these_weights(sheet, paper, tmp_path):
    only = replace(sheet, shown=[one(sheet, "aggregate")])
    path = tmp_path / "kept.jsonl"
    for _ in range(2):
        answer_sheet(only, language_model(), Adapters(aggregate=paper), kept=KeptAnswers(path))
    assert len(path.read_text().splitlines()) == 1
    changed = replace(only, lines=[line.replace("[[", "[[1", 1) for line in only.lines])
    answer_sheet(changed, language_model(), Adapters(aggregate=paper), kept=KeptAnswers(path))
    assert len(path.read_text().splitlines()) == 2


def test_which_weights_answer(sheet, paper, tmp_path, monkeypatch):
    digest = language_model().digest
    monkeypatch.setattr(weights, "path", lambda name: tmp_path / name)
    assert paper_folder(sheet, digest, paper, ()) == paper
    assert paper_folder(sheet, digest, None, ()) is None, "nothing is shipped, nobody asked"
    with pytest.raises(ModelError, match="T = 24"):
        paper_folder(sheet, digest, None, ("aggregate",))
    assert paper_folder(replace(sheet, shown=[]), digest, paper, ()) is None
    monkeypatch.setattr(defaults, "has_paper_weights", lambda slots: True)
    monkeypatch.setattr(defaults, "paper_weights", lambda slots: paper)
    assert trained_on(paper) == digest
    assert paper_folder(sheet, digest, None, ()) == paper
    assert paper_folder(sheet, "another", None, ()) is None


def test_damaged_lines_are_told(sheet, paper):
    for line in (
        "",
        "{}",
        json.dumps({"passages": 1, "counts": {"0": [1]}}),
        json.dumps({"passages": 1, "counts": []}),
    ):
        with pytest.raises(DamagedFile, match="histogram cannot be read"):
            histogram_from(line)
    (version,) = histogram_from(sheet.memory(one(sheet, "aggregate"))[0][0]).counts
    codes = {**sheet.codes, "codebooks": {str(version + 1): sheet.codes["codebooks"][str(version)]}}
    with pytest.raises(DamagedFile, match="lacks codebook versions"):
        answer_sheet(replace(sheet, codes=codes), language_model(), Adapters(aggregate=paper))
