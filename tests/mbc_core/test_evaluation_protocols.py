"""What each read shows, from real banks of small towns; the stream; the figures beside them."""

from __future__ import annotations

import numpy as np
import pytest

from mbc_core.errors import UsageError
from mbc_core.evaluation.asking import Wanted
from mbc_core.evaluation.bank_view import BankView
from mbc_core.evaluation.protocols import checkpoints, sheet_of_banks, sheet_of_stream
from mbc_core.evaluation.qa_file import QaDocument, QaQuestion, QaSet
from mbc_core.evaluation.sheet import READS, Sheet, Shown, load_sheet, save_sheet
from mbc_core.sizes import compress
from mbc_core.words import split_words
from tests.mbc_core.qa_bank import TinyBuilder, memory_of, open_bank, qa_set
from tests.mbc_core.tiny_reader import SLOTS, BagOfWords, Doc, lexicon, make_bank

pytestmark = pytest.mark.usefixtures("single_thread")

ENCODER = BagOfWords()
QA = qa_set()
ADDRESS = 27


@pytest.fixture(scope="module")
def memories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("banks")
    return {name: memory_of(folder / name, QA, name) for name in ("compact", "default", "rich")}


@pytest.fixture(scope="module")
def sheet(memories) -> Sheet:
    return sheet_of_banks(QA, memories, ENCODER, Wanted(ks=(3, 1), seed=5))


def one(sheet: Sheet, read: str, profile: str | None = None, k: int | None = None) -> Shown:
    (found,) = [
        shown
        for shown in sheet.shown
        if shown.read == read and profile in (None, shown.profile) and k in (None, shown.k)
    ]
    return found


def found_by_code(memory, k: int, *, rerank: bool = True) -> list[list[str]]:
    """Ids of the documents recalled for each question."""
    found = memory.recall([one.question for one in QA.questions], k, rerank=rerank)
    return [[two.doc_id for two in line] for line in found]


TEXTS = {one.doc_id: " ".join(one.text.split()) for one in QA.documents}


def test_every_read_is_there_once_a_profile_and_k(sheet):
    rows = {(shown.read, shown.profile, shown.k) for shown in sheet.shown}
    assert len(rows) == len(sheet.shown)
    for read, kind in READS.items():
        once = {None: "-", "address": f"T{SLOTS}", "histogram": f"T{SLOTS}"}.get(kind.store, "text")
        profiles = ("compact", "default", "rich") if kind.by_profile else (once,)
        ks = {"none": (0,), "all": (0,), "right": (1,)}.get(kind.places, (3, 1))
        assert {row for row in rows if row[0] == read} == {(read, profile, k) for profile in profiles for k in ks}
    assert [shown.read for shown in sheet.shown] == sorted((shown.read for shown in sheet.shown), key=list(READS).index)


@pytest.mark.parametrize("profile", ["compact", "default", "rich"])
def test_recall_shows_what_the_bank_recalls(sheet, memories, profile):
    recalled = memories[profile].recall([one.question for one in QA.questions], 3)
    assert sheet.memory(one(sheet, "recall", profile, 3)) == [[two.words for two in line] for line in recalled]
    assert one(sheet, "recall", profile, 3).bytes_per_passage == pytest.approx(memories[profile].payload_bytes)
    assert sheet.memory(one(sheet, "recall", profile, 1)) == [[line[0].words] for line in recalled]


def test_full_text_is_that_of_the_same_places(sheet, memories):
    expected = [[TEXTS[name] for name in line] for line in found_by_code(memories["default"], 3)]
    for read in ("text", "text-equal"):
        assert sheet.memory(one(sheet, read, k=3)) == expected
    assert one(sheet, "text", k=3).bytes_per_passage == pytest.approx(
        ADDRESS + compress(sorted(one.text for one in QA.documents)).zstd_dictionary
    )


def test_truncated_text_has_the_bytes_of_that_passages_words(sheet, memories):
    memory = memories["compact"]
    names = memory.passages["doc_id"].to_pylist()
    sizes = {name: len(words) for name, words in zip(names, memory.passages["words"].to_pylist(), strict=True)}
    for shown, recalled in zip(sheet.memory(one(sheet, "truncated", "compact", 3)), found_by_code(memory, 3),
                               strict=True):  # fmt: skip
        for line, name in zip(shown, recalled, strict=True):
            assert TEXTS[name].startswith(line)
            assert len(line.encode()) == sizes[name], "ASCII: the very same number of bytes"
    stored = np.mean(list(sizes.values()))
    assert one(sheet, "truncated", "compact", 3).bytes_per_passage == pytest.approx(ADDRESS + stored)
    assert one(sheet, "recall", "compact", 3).bytes_per_passage == pytest.approx(ADDRESS + stored)
    assert one(sheet, "first-words", "compact", 3).bytes_per_passage <= ADDRESS + stored


def test_text_as_codes_has_every_word(sheet, memories):
    recalled = found_by_code(memories["default"], 1)
    for shown, names in zip(sheet.memory(one(sheet, "text-codes", k=1)), recalled, strict=True):
        assert shown == [" ".join(word.text for word in split_words(TEXTS[names[0]]))]
    codes = [sum(map(len, lexicon().encode_words([word.text for word in split_words(text)])))
             for text in TEXTS.values()]  # fmt: skip
    assert one(sheet, "text-codes", k=1).bytes_per_passage == pytest.approx(ADDRESS + 2 * np.mean(codes))
    assert sheet.figures["texts"]["codes"] == pytest.approx(2 * np.mean(codes))


def test_the_right_passage_is_shown_whether_it_was_found_or_not(sheet, memories):
    answering = [QA.documents[one.document].doc_id for one in QA.questions]
    assert sheet.memory(one(sheet, "right-text")) == [[TEXTS[name]] for name in answering]
    memory = memories["default"]
    names = memory.passages["doc_id"].to_pylist()
    words = dict(zip(names, memory.words(range(len(names))), strict=True))
    assert sheet.memory(one(sheet, "right", "default")) == [[words[name]] for name in answering]
    assert one(sheet, "right", "default").bytes_per_passage == pytest.approx(memory.payload_bytes - ADDRESS)


@pytest.mark.parametrize("profile", ["compact", "default", "rich"])
def test_the_shuffled_bank_shows_words_of_other_documents(sheet, memories, profile):
    memory = memories[profile]
    names = memory.passages["doc_id"].to_pylist()
    said = memory.words(range(len(names)))
    assert len(set(said)) == len(said), "each town has words of its own, so a line tells its document"
    owner = dict(zip(said, names, strict=True))
    shown = sheet.memory(one(sheet, "shuffled", profile, 3))
    for lines, recalled, question in zip(shown, found_by_code(memory, 3), QA.questions, strict=True):
        documents = [owner[line] for line in lines]
        assert len(documents) == 3
        assert QA.documents[question.document].doc_id not in documents
        assert all(other != name for other, name in zip(documents, recalled, strict=True))


def test_closed_books_show_nothing_and_cost_nothing(sheet):
    for read in ("closed", "closed-equal"):
        assert sheet.memory(one(sheet, read)) == [[]] * len(QA.questions)
        assert (one(sheet, read).bytes_per_passage, one(sheet, read).recall_ms) == (0.0, 0.0)
    assert one(sheet, "recall", "default", 3).recall_ms > 0 == one(sheet, "right", "default").recall_ms


def test_figures_of_the_search_and_of_the_sizes(sheet, memories):
    (recall,) = sheet.figures["recall"]  # all three profiles share T = 24
    assert (recall["T"], recall["bytes"], recall["passages"], recall["questions"]) == (SLOTS, ADDRESS, 12, 12)
    right = [QA.documents[one.document].doc_id for one in QA.questions]
    for rerank, rows in ((False, recall["at"]), (True, recall["at_reranked"])):
        assert [row["k"] for row in rows] == [1, 5, 10]
        for row in rows:
            lists = found_by_code(memories[recall["profile"]], row["k"], rerank=rerank)
            assert row["by_code"] == pytest.approx(
                100 * np.mean([name in line for name, line in zip(right, lists, strict=True)])
            )
    vectors = ENCODER.encode_questions([one.text for one in QA.documents])
    asked = ENCODER.encode_questions([one.question for one in QA.questions])
    best = (asked @ vectors.T).argmax(1)
    assert recall["at"][0]["by_float"] == pytest.approx(100 * np.mean(best == np.arange(12)))
    assert [one["profile"] for one in sheet.figures["bytes"]] == ["compact", "default", "rich"]
    inspected = memories["rich"].bank.inspect()["bytes_per_passage"]
    assert {name: sheet.figures["bytes"][2][name] for name in inspected} == inspected
    assert sheet.figures["bytes"][2]["codebooks"] > 1000
    assert sheet.figures["settings"]["qa"] == QA.digest and sheet.figures["notes"] == []


def test_the_same_seed_gives_the_same_sheet(sheet, memories, tmp_path):
    again = sheet_of_banks(QA, memories, ENCODER, Wanted(ks=(3, 1), seed=5))
    for name, made in (("a", sheet), ("b", again)):
        timeless = [Shown(**{**_fields(shown), "recall_ms": 0.0}) for shown in made.shown]
        save_sheet(tmp_path / name, Sheet(made.questions, made.answers, made.lines, timeless, made.figures, made.codes))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert load_sheet(tmp_path / "a").lines == sheet.lines
    other = sheet_of_banks(QA, memories, ENCODER, Wanted(ks=(3,), seed=6))
    shuffled = [one(made, "shuffled", "default", 3) for made in (sheet, other)]
    assert sheet.memory(shuffled[0]) != other.memory(shuffled[1])


def _fields(shown: Shown) -> dict[str, object]:
    return {name: getattr(shown, name) for name in Shown.__slots__}


def test_a_limit_asks_fewer_questions_of_the_same_bank(memories):
    made = sheet_of_banks(QA, memories, ENCODER, Wanted(("recall",), (2,), limit=4, seed=2))
    assert one(made, "recall", "default").questions == QA.drawn(4, 2)
    assert made.figures["recall"][0]["questions"] == 4 and made.figures["recall"][0]["passages"] == 12


def test_a_profile_without_words_is_searched_and_read_as_text_only(tmp_path):
    memory = memory_of(tmp_path / "bank", QA, "paper")
    made = sheet_of_banks(QA, {"paper": memory}, ENCODER, Wanted(ks=(2,)))
    assert {shown.read for shown in made.shown} == {
        "closed", "closed-equal", "text", "text-equal", "right-text", "right-text-equal",
        "attend-closed", "attend-shuffled", "attend", "attend-right", "aggregate-shuffled", "aggregate",
    }  # fmt: skip
    assert made.figures["texts"]["codes"] is None


def test_documents_that_the_bank_lacks_are_counted_and_shown_as_nothing(tmp_path):
    smaller = QaSet.of(QA.documents[:9], tuple(one for one in QA.questions if one.document < 9))
    memory = memory_of(tmp_path / "bank", smaller)
    made = sheet_of_banks(QA, {"default": memory}, ENCODER, Wanted(("right", "recall", "shuffled"), (2,)))
    assert made.figures["notes"] == ["3 of 12 questions are about documents that the bank does not hold"]
    assert [len(lines) for lines in one(made, "right").lines] == [1] * 9 + [0] * 3
    assert [len(lines) for lines in one(made, "recall").lines] == [2] * 12


def test_texts_beyond_the_qa_file_must_be_kept_in_the_bank(tmp_path):
    fewer = QaSet.of(QA.documents[:4], QA.questions[:4])
    memory = memory_of(tmp_path / "bank", QA)
    made = sheet_of_banks(fewer, {"default": memory}, ENCODER, Wanted(("recall", "shuffled"), (3,)))
    assert made.figures["recall"][0]["at"][0]["by_float"] is None, "not every text is known"
    with pytest.raises(UsageError, match=r"the text of a recalled passage is not known: 'doc-\d+'.*--keep-text"):
        sheet_of_banks(fewer, {"default": memory}, ENCODER, Wanted(("text",), (5,)))


def test_the_part_that_answers_is_the_right_one(tmp_path):
    filler = "Nothing of note happened there in those years, as far as anyone remembers it. " * 16
    long = f"{filler}Then Zenobia founded the town of Palmyra99. {filler}"
    docs = [Doc("long", long), *(Doc(one.doc_id, one.text) for one in QA.documents)]
    memory = open_bank(make_bank(tmp_path / "bank", docs))
    qa = QaSet.of((QaDocument("long", long),), (QaQuestion("Who founded Palmyra99?", ("Zenobia",), 0),))
    view = BankView.of(memory, qa, ENCODER.count_pieces)
    assert sum(name == "long" for name in memory.passages["doc_id"].to_pylist()) > 1
    assert "Zenobia" in view.text(int(view.right[0]))


def test_wrong_wishes():
    with pytest.raises(UsageError, match=r"there is no such read: \['telepathy'\].*choose among closed, "):
        Wanted(("recall", "telepathy"))
    with pytest.raises(UsageError, match="k is below 1"):
        Wanted(ks=(5, 0))


@pytest.mark.parametrize(
    ("first", "total", "expected"),
    [(200, 1000, [200, 400, 800, 1000]), (200, 800, [200, 400, 800]), (5, 5, [5]), (3, 4, [3, 4])],
)
def test_checkpoints_double(first, total, expected):
    assert checkpoints(first, total) == expected


def test_the_stream_asks_about_the_first_documents_as_it_grows(tmp_path):
    builder = TinyBuilder(tmp_path)
    made = sheet_of_stream(QA, builder, "default", Wanted(("recall", "closed"), (2, 1), seed=1), first=3)
    ids = [one.doc_id for one in QA.documents]
    assert builder.told == [("stream", "default", ids[a:b]) for a, b in ((0, 3), (3, 6), (6, 12))]
    streamed = [shown for shown in made.shown if shown.documents is not None]
    assert [(shown.read, shown.documents, shown.k) for shown in streamed] == [
        ("recall", 3, 2), ("shuffled", 3, 2), ("closed", 3, 0), ("closed-equal", 3, 0),
        ("recall", 6, 2), ("shuffled", 6, 2), ("recall", 12, 2), ("shuffled", 12, 2),
    ]  # fmt: skip
    assert all(shown.questions == [0, 1, 2] for shown in streamed)
    final = [(shown.read, shown.k) for shown in made.shown if shown.documents is None]
    assert final == [("closed", 0), ("recall", 2), ("recall", 1)]
    for count in (3, 12):
        known = memory_of(tmp_path / f"check-{count}", QA.first_documents(count))
        expected = [
            [two.words for two in line] for line in known.recall([QA.questions[n].question for n in range(3)], 2)
        ]
        (shown,) = [shown for shown in streamed if (shown.read, shown.documents) == ("recall", count)]
        assert made.memory(shown) == expected


def test_a_stream_needs_its_first_part(tmp_path):
    with pytest.raises(UsageError, match=r"the stream is shorter than its first part: '12 documents'.*smaller --first"):
        sheet_of_stream(QA, TinyBuilder(tmp_path), "default", Wanted(), first=13)
    with pytest.raises(UsageError, match="retention is measured by reading words: 'paper'"):
        sheet_of_stream(QA, TinyBuilder(tmp_path), "paper", Wanted(), first=3)
