"""The prompt keeps the question whole, drops passages from the least, and spells pieces the same way everywhere."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbc_core.errors import UsageError
from mbc_core.reader.prompt import PromptFormat
from tests.mbc_core.tiny_reader import END, tokenizer

TOKENIZER = tokenizer()
FORM = PromptFormat(TOKENIZER)
TEXT = st.text(alphabet=st.characters(blacklist_categories=("Cs", "Cc")), max_size=40)


def decoded(ids) -> str:
    return TOKENIZER.decode(ids)


def test_lines_come_first_then_the_question():
    prompt = FORM.build(["Avalon 1500 Founder00", "Camelot 1514"], "Who founded\nAvalon?")
    assert decoded(prompt.ids) == " Avalon 1500 Founder00\n Camelot 1514\nQuestion: Who founded Avalon?\nAnswer:"
    assert prompt.lines == 2


def test_without_memory_the_question_stands_alone():
    assert decoded(FORM.build([], "Why?").ids) == "Question: Why?\nAnswer:"


def test_a_passage_without_words_takes_no_line():
    assert FORM.build(["", "  ", "Camelot"], "Why?").ids == FORM.build(["Camelot"], "Why?").ids


def test_passages_go_least_score_first_when_room_is_short():
    question = FORM.question("Why?")
    lines = ["aaaa", "bbbb", "cccc"]  # six tokens each: a space, four bytes, a newline
    for room, kept in ((18, 3), (17, 2), (12, 2), (11, 1), (6, 1), (5, 0), (0, 0)):
        prompt = FORM.build(lines, "Why?", max_tokens=len(question) + room)
        assert prompt.lines == kept
        assert decoded(prompt.ids) == "".join(f" {line}\n" for line in lines[:kept]) + "Question: Why?\nAnswer:"


def test_a_worse_passage_does_not_slip_in_for_a_better_one_that_does_not_fit():
    prompt = FORM.build(["aaaa", "b" * 50, "cc"], "Why?", max_tokens=len(FORM.question("Why?")) + 20)
    assert decoded(prompt.ids).startswith(" aaaa\nQuestion")


def test_a_question_that_does_not_fit_is_refused_not_cut():
    with pytest.raises(UsageError, match=r"the question is too long: '1018 tokens'.*a question is never cut"):
        FORM.build([], "x" * 1000, max_tokens=900)


@given(st.lists(TEXT, max_size=6), TEXT, st.integers(60, 400))
def test_the_question_is_whole_and_the_limit_holds_for_any_text(memory, question, limit):
    asked = FORM.question(question)
    if len(asked) > limit:
        return
    prompt = FORM.build(memory, question, limit)
    assert prompt.ids[len(prompt.ids) - len(asked) :] == asked
    assert len(prompt.ids) <= limit
    assert prompt.ids == [one for words in memory[: prompt.lines] for one in FORM.line(words)] + asked


def test_a_tokenizer_with_a_first_token_gets_it_once():
    with_bos = PromptFormat(tokenizer(bos="<|begin|>"))
    first = with_bos.tokenizer.bos_token_id
    ids = with_bos.build(["Camelot"], "Why?").ids
    assert with_bos.start == [first] and ids[0] == first and first not in ids[1:]
    assert ids[1:] == FORM.build(["Camelot"], "Why?").ids


def test_answers_end_and_are_cut_where_they_end():
    ids = FORM.answer(" Founder  00 ")
    assert decoded(ids) == f" Founder 00{END}"
    assert FORM.text([*ids, 40, 41]) == "Founder 00"
    assert FORM.text(TOKENIZER(" Paris\nQuestion: more")["input_ids"]) == "Paris"
    assert FORM.text([]) == "" and FORM.text([256]) == ""


def test_a_newline_or_the_end_of_text_stops_an_answer():
    assert FORM.stop_ids == sorted({256, TOKENIZER("\n")["input_ids"][0]})


def test_many_pieces_at_once_are_the_pieces_one_by_one():
    texts = [" Avalon", "Question: é?\nAnswer:", ""]
    assert FORM.encode_many(texts) == [TOKENIZER(text)["input_ids"] for text in texts]
    assert FORM.encode_many([]) == []


def test_words_tokenised_one_by_one_are_the_line_of_the_real_tokenizer(assets):
    """Training tokenises each word by itself; answering tokenises the whole line: both must give the same ids."""
    from transformers import AutoTokenizer

    from mbc_core.reader.language_model import load_language_model

    found = load_language_model(assets.smollm2.folder, assets.smollm2.file, cache=assets.cache / "language-models")
    assert isinstance(found.tokenizer, type(AutoTokenizer.from_pretrained(found.tokenizer.name_or_path)))
    form = PromptFormat(found.tokenizer)
    words = ["In", "1787", "U.S.", "O'Brien", "3,400", "naïve", "50%", "Zürich", "C++", "10:30", "東京", "e.g", "AT&T"]
    pieces = [one for ids in form.encode_many([f" {word}" for word in words]) for one in ids]
    assert form.line(" ".join(words)) == [*pieces, *form.newline]
    assert form.start == []
