"""Questions a person might put to the demo corpus, with the answer its text gives. Nobody trains on them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DemoQuestion:
    """A question, the answer that the article's lead section gives, and the article."""

    title: str
    question: str
    answer: str


QUESTIONS = tuple(
    DemoQuestion(*fields)
    for fields in (
        ("C (programming language)", "Who created the C programming language?", "Dennis Ritchie"),
        ("Han dynasty", "Who established the Han dynasty of China?", "Liu Bang"),
        ("The Beach Boys", "In which city were the Beach Boys formed?", "Hawthorne, California"),
        ("Niccolò Machiavelli", "What is Machiavelli's best known political treatise?", "The Prince"),
        ("Russell's paradox", "In which year was Russell's paradox published?", "1901"),
        ("Mississippi River", "Which lake is the traditional source of the Mississippi River?", "Lake Itasca"),
        ("Confucius", "Under which name was Confucius born?", "Kong Qiu"),
        ("Rhodium", "What is the atomic number of rhodium?", "45"),
        ("Yves Saint Laurent (designer)", "When did Yves Saint Laurent found his fashion label?", "1962"),
        ("Ocean", "How much of Earth does the ocean cover?", "70.8%"),
        ("Emerald", "Of which mineral is emerald a variety?", "beryl"),
        ("The Beatles", "In which city were the Beatles formed?", "Liverpool"),
    )
)


def questions_about(titles: Collection[str], most: int) -> list[DemoQuestion]:
    """The first ``most`` questions whose article is among ``titles``."""
    return [question for question in QUESTIONS if question.title in titles][:most]
