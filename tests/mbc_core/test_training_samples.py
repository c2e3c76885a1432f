"""Training samples: composed by array operations, equal to what plain loops over words and lines would write."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbc_core.errors import DamagedFile, UsageError
from mbc_core.evaluation.addresses import AddressIndex
from mbc_core.reader.prompt import PromptFormat
from mbc_core.training.batches import Ragged, spread
from mbc_core.training.prepared import load_prepared
from mbc_core.training.samples import _NEVER, Mixture, SampleSource, _entry_budgets, build_source, distractors
from mbc_core.words import choose_words, keeping_order, word_worth
from tests.mbc_core.class_lexicon import class_lexicon, follow_lexicon
from tests.mbc_core.prepared_data import write_prepared
from tests.mbc_core.tiny_reader import END, SLOTS, BagOfWords, documents, lexicon, pieces, tokenizer

FORM = PromptFormat(tokenizer())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load_prepared(write_prepared(tmp_path_factory.mktemp("prepared")))


def source(data, mixture: Mixture, **options) -> SampleSource:
    rotation, codebook = pieces()
    index = AddressIndex(data.embeddings, rotation, codebook.codewords, SLOTS)
    others, ranks = distractors(data.rows, index.nearest(data.question_embeddings, 9))
    passage_others, _ = distractors(np.arange(len(data)), index.nearest(data.embeddings, 9))
    return build_source(data, lexicon(), FORM, others, ranks, passage_others, mixture=mixture, **options)


def shown(composed) -> list[tuple[str, str]]:
    """(prompt, answer) of each sample, as text."""
    found = []
    for start, length, answer in zip(
        composed.tokens.starts, composed.tokens.lengths, composed.answer_lengths, strict=True
    ):
        ids = composed.tokens.values[start : start + length].tolist()
        cut = len(ids) - int(answer)
        found.append((FORM.tokenizer.decode(ids[:cut]), FORM.tokenizer.decode(ids[cut:])))
    return found


def plain_words(data, row: int, budget: int) -> str:
    """Words in the order of keeping, until one does not fit, in text order: a loop over one passage."""
    words, scores = data.words_of(row)
    costs = np.array(lexicon().costs(words))
    taken, spent = [], 0
    order, repetitions = keeping_order(words, word_worth(scores, costs), costs.tolist())
    for place in [*order, *repetitions]:
        spent += costs[place]
        if spent > 16 * budget:
            break
        taken.append(place)
    return " ".join(words[place] for place in sorted(taken))


def test_the_words_of_each_budget_are_those_of_a_plain_loop(data):
    made = source(data, Mixture(budgets=(12, 64)))
    for budget in (12, 30, 64):
        for row in range(len(data)):
            tokens, lengths = made._line_tokens(np.array([row]), np.array([budget]), np.array([False]))
            assert FORM.tokenizer.decode(tokens.tolist()).strip() == plain_words(data, row, budget)
            assert lengths.tolist() == [len(tokens)]


def test_the_plain_loop_is_the_banks_choice_up_to_the_last_word(data):
    for row in range(len(data)):
        words, scores = data.words_of(row)
        chosen = lexicon().decode(choose_words(words, scores, 40, lexicon()).tolist())
        assert set(plain_words(data, row, 40).split()) <= set(chosen.split())


@given(
    st.lists(st.lists(st.tuples(st.text("abA1", max_size=4), st.integers(0, 5)), max_size=10), max_size=3),
    st.integers(0, 2),
    st.sampled_from([class_lexicon, follow_lexicon]),
)
def test_budgets_at_which_words_enter_agree_with_the_banks_choice(passages, seed, kind):
    classed, most = kind(seed), 300
    texts = [[word for word, _ in one] for one in passages]
    scores = [np.array([value for _, value in one], dtype=np.float32) for one in passages]
    costs = [np.array(classed.costs(one), dtype=np.int64) for one in texts]
    worth = [word_worth(score, cost) for score, cost in zip(scores, costs, strict=True)]
    none = np.zeros(0)
    found = _entry_budgets(
        texts, np.concatenate([none, *worth]), np.concatenate([none, *costs]).astype(np.int64), most, classed
    )
    start = 0
    for words, score in zip(texts, scores, strict=True):
        enters = found[start : start + len(words)].astype(np.int64)
        start += len(words)
        assert ((enters <= most) | (enters == _NEVER)).all()
        assert not any(word == "" and bits != _NEVER for word, bits in zip(words, enters, strict=True))
        for budget in range(0, 19, 3):
            kept = [word for word, bits in zip(words, enters, strict=True) if bits <= 16 * budget]
            codes = [code for own in classed.encode_words(kept) for code in own]
            assert len(classed.pack(codes)) <= 2 * budget
            chosen = classed.decode(choose_words(words, score, budget, classed)).split()
            rest = iter(chosen)
            assert all(word in rest for word in kept), "in their order; the bank may add a word that still has room"
            if len(kept) == sum(map(bool, words)):
                assert chosen == kept


def test_every_sample_is_lines_then_its_question_and_its_answer(data):
    mixture = Mixture(
        cloze=0.0, no_memory=0.0, full_text=0.0, budgets=(20, 20), profiles=(20,), passages=(3,), weights=(1,)
    )
    lines_of = {plain_words(data, row, 20): row for row in range(len(data))}
    seen = set()
    for prompt, answer in shown(source(data, mixture).pool(1, 0, 200)):
        *memory, question, last = prompt.split("\n")
        place = data.questions.index(question.removeprefix("Question: "))
        assert last == "Answer:" and answer == f" {data.answers[place][0]}{END}"
        rows = [lines_of[line.removeprefix(" ")] for line in memory]
        assert len(set(rows)) == 3 and int(data.rows[place]) in rows
        seen.add((place, rows.index(int(data.rows[place]))))
    assert {position for _, position in seen} == {0, 1, 2}  # the true one stands anywhere


def test_ordered_samples_stand_as_recall_ranks_them_with_the_nearest_distractors(data):
    mixture = Mixture(
        cloze=0.0, no_memory=0.0, full_text=0.0, budgets=(20, 20), profiles=(20,), passages=(5,), weights=(1,),
        ordered=1.0, hardest=1.0,
    )  # fmt: skip
    rotation, codebook = pieces()
    found = AddressIndex(data.embeddings, rotation, codebook.codewords, SLOTS).nearest(data.question_embeddings, 9)
    lines_of = {plain_words(data, row, 20): row for row in range(len(data))}
    for prompt, _ in shown(source(data, mixture).pool(1, 0, 100)):
        *memory, question, _ = prompt.split("\n")
        place = data.questions.index(question.removeprefix("Question: "))
        true = int(data.rows[place])
        ranked = found[place].tolist()
        expected = ranked[:5] if true in ranked[:5] else [*[one for one in ranked if one != true][:4], true]
        assert [lines_of[line.removeprefix(" ")] for line in memory] == expected


def test_shares_of_memory_text_and_cloze(data):
    mixture = Mixture(cloze=0.3, no_memory=0.2, full_text=0.25)
    found = shown(source(data, mixture).pool(3, 0, 3000))
    texts = {f" {one}" for one in data.table["text"].to_pylist()}
    first = [prompt.split("\n")[0] for prompt, _ in found]
    assert np.mean([one.startswith("Question: ") for one in first]) == pytest.approx(0.2, abs=0.03)
    assert np.mean([one in texts for one in first]) == pytest.approx(0.25, abs=0.03)
    assert np.mean(["Fill in the blank" in prompt for prompt, _ in found]) == pytest.approx(0.3, abs=0.03)


def test_numbers_of_passages_are_drawn_as_weighted(data):
    mixture = Mixture(
        cloze=0.0, no_memory=0.0, full_text=0.0, passages=(1, 3, 8), weights=(0.5, 0.3, 0.2), max_tokens=4096
    )
    counts = [prompt.count("\n") - 1 for prompt, _ in shown(source(data, mixture).pool(3, 0, 3000))]
    values, times = np.unique(counts, return_counts=True)
    assert values.tolist() == [1, 3, 8]
    assert (times / 3000).tolist() == pytest.approx([0.5, 0.3, 0.2], abs=0.03)


def test_pools_depend_on_seed_and_number_alone(data):
    made = source(data, Mixture())
    one, same, other_number, other_seed = (
        made.pool(*arguments) for arguments in ((5, 2, 64), (5, 2, 64), (5, 3, 64), (6, 2, 64))
    )
    assert (one.tokens.values == same.tokens.values).all() and (one.answer_lengths == same.answer_lengths).all()
    for different in (other_number, other_seed):
        assert one.tokens.values.tolist() != different.tokens.values.tolist()


def test_a_tight_limit_drops_lines_but_never_the_true_one_or_the_question(data):
    mixture = Mixture(
        cloze=0.0,
        no_memory=0.0,
        full_text=0.0,
        budgets=(64, 64),
        profiles=(64,),
        passages=(8,),
        weights=(1,),
        max_tokens=300,
    )
    for prompt, answer in shown(source(data, mixture).pool(2, 0, 200)):
        *memory, question, _ = prompt.split("\n")
        place = data.questions.index(question.removeprefix("Question: "))
        assert f" {plain_words(data, int(data.rows[place]), 64)}" in memory
        assert len((prompt + answer).replace(END, "").encode()) + 1 <= 300
        assert 1 <= len(memory) < 8


def test_full_text_is_cut_at_its_limit(data):
    mixture = Mixture(cloze=0.0, no_memory=0.0, full_text=1.0, passages=(1,), weights=(1,), text_tokens=40)
    for prompt, _ in shown(source(data, mixture).pool(2, 0, 50)):
        line = prompt.split("\n")[0]
        assert len(line) == 40 and any(f" {one}".startswith(line) for one in data.table["text"].to_pylist())


def test_passages_without_questions_train_on_cloze_alone(tmp_path):
    bare = load_prepared(write_prepared(tmp_path, questions=False))
    for prompt, answer in shown(source(bare, Mixture()).pool(0, 0, 50)):
        assert "Question: Fill in the blank: " in prompt and answer.endswith(END) and len(answer) > len(END) + 1


def test_nothing_at_all_to_train_on_is_an_error(tmp_path):
    bare = load_prepared(write_prepared(tmp_path, questions=False))
    with pytest.raises(UsageError, match=r"there is nothing to train on: '0 questions'"):
        source(bare, Mixture(), cloze_per_passage=0)


def test_distractors_are_the_search_results_without_the_true_passage():
    found = np.array([[4, 2, 7], [1, 0, 3], [5, 6, 8]])
    others, ranks = distractors(np.array([2, 1, 9]), found)
    assert others.tolist() == [[4, 7, -1], [0, 3, -1], [5, 6, 8]]
    assert ranks.tolist() == [1, 0, 3]
    assert distractors(np.array([2, 1, 9]), found, keep=2)[0].tolist() == [[4, 7], [0, 3], [5, 6]]


def test_fewer_passages_than_distractors_wanted(tmp_path):
    small = load_prepared(write_prepared(tmp_path, 3))
    mixture = Mixture(cloze=0.0, no_memory=0.0, full_text=0.0, passages=(8,), weights=(1,))
    for prompt, _ in shown(source(small, mixture).pool(0, 0, 40)):
        lines = prompt.split("\n")[:-2]
        assert len(lines) == len(set(lines)) == 3


@given(st.lists(st.lists(st.integers(0, 99), max_size=5), max_size=8))
def test_ragged_lists_come_back(lists):
    packed = Ragged.of(lists)
    assert [packed.values[a : a + n].tolist() for a, n in zip(packed.starts, packed.lengths, strict=True)] == lists
    assert packed.values[spread(packed.starts, packed.lengths)].tolist() == [one for row in lists for one in row]


def test_prepared_data_is_split_and_counted(data):
    dev, train = data.split("dev"), data.split("train")
    assert (len(dev), len(train)) == (6, 18) and data.sources == {"others": 8, "towns": 16}
    for part in (dev, train):
        for question, row in zip(part.questions, part.rows, strict=True):
            assert question.removeprefix("Who founded ")[:-1] in part.table["text"][row].as_py()
    expected = BagOfWords().encode_questions([documents()[4].question])[0]
    assert dev.question_embeddings[1] == pytest.approx(expected, abs=1e-3)
    assert np.linalg.norm(data.embeddings, axis=1) == pytest.approx(np.ones(24), abs=1e-6)


def test_damaged_prepared_data_is_named(tmp_path):
    with pytest.raises(DamagedFile, match=r"the prepared training data cannot be read.*FileNotFoundError"):
        load_prepared(tmp_path)
    folder = write_prepared(tmp_path, 8)
    pq.write_table(pq.read_table(folder / "passages.parquet").slice(0, 5), folder / "passages.parquet")
    with pytest.raises(
        DamagedFile, match=r"the prepared files do not fit together: '5 passages, 8 embeddings, rows up to 7'"
    ):
        load_prepared(folder)
