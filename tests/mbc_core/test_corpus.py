"""The demo corpus: deterministic, every topic in its share, topics drifting from window to window."""

from __future__ import annotations

import json
from collections import Counter
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import pytest

from mbc_core.corpus import DAYS, TOPICS, Article, demo_documents, load_articles, main, write_corpus
from mbc_core.errors import DamagedFile, UsageError
from schemas.document import document_from_mapping

SIZES = {"Mathematics": 60, "Geography": 100, "People": 200, "A topic of its own": 40}
ARTICLES = [
    Article(f"{topic} {number}", f"Text about {topic}, number {number}.", topic)
    for topic, size in SIZES.items()
    for number in range(size)
]
TOPIC_OF = {article.title: article.topic for article in ARTICLES}


def day(document: dict[str, str]) -> int:
    return datetime.fromisoformat(document["timestamp"]).day


def test_every_article_once_and_days_of_equal_size():
    documents = list(demo_documents(ARTICLES))
    assert sorted(document["id"] for document in documents) == sorted(TOPIC_OF)
    assert Counter(map(day, documents)) == dict.fromkeys(range(1, DAYS + 1), 40)


def test_topics_come_one_after_the_other():
    met: list[str] = []
    for document in demo_documents(ARTICLES):
        topic = TOPIC_OF[document["id"]]
        if topic not in met:
            met.append(topic)
        assert met[-1] == topic, "a topic came back after another had begun"
    assert met == ["Mathematics", "Geography", "People", "A topic of its own"]


def test_times_rise_strictly_and_are_valid_documents():
    documents = [document_from_mapping(document) for document in demo_documents(ARTICLES)]
    times = [document.event_time for document in documents]
    assert all(earlier < later for earlier, later in pairwise(times))
    assert all(document.title and document.uri for document in documents)


def test_a_sample_keeps_the_shares_and_depends_on_the_seed_only():
    sample = list(demo_documents(ARTICLES, count=100, seed=3))
    assert sample == list(demo_documents(list(reversed(ARTICLES)), count=100, seed=3))
    assert sample != list(demo_documents(ARTICLES, count=100, seed=4))
    shares = Counter(TOPIC_OF[document["id"]] for document in sample)
    assert all(abs(shares[topic] - size / 4) <= 12 for topic, size in SIZES.items())


@pytest.mark.parametrize("count", [0, DAYS - 1, len(ARTICLES) + 1])
def test_a_count_out_of_range(count):
    with pytest.raises(UsageError, match=rf"out of range: {count}.*corpus has 400"):
        list(demo_documents(ARTICLES, count=count))


def test_an_equal_file_is_left_untouched(tmp_path):
    out = tmp_path / "deep" / "corpus.jsonl"
    assert write_corpus(ARTICLES, out, count=20) == 20
    before = out.stat().st_mtime_ns
    write_corpus(ARTICLES, out, count=20)
    assert out.stat().st_mtime_ns == before
    write_corpus(ARTICLES, out, count=21)
    assert len(out.read_text("utf-8").splitlines()) == 21


def test_uris_are_quoted():
    (document,) = list(demo_documents([Article("Gödel's 1 & 2", "Text.", "Mathematics")], days=1))
    assert document["uri"] == "https://en.wikipedia.org/wiki/G%C3%B6del's_1_%26_2"


@pytest.mark.parametrize("content", ["", "[]", "{}x", '{"a": {"title": "a"}}'])
def test_a_damaged_corpus(tmp_path, content):
    path = tmp_path / "summaries.json"
    path.write_text(content)
    with pytest.raises(DamagedFile, match=r"corpus cannot be read.*make setup"):
        load_articles(path)


def test_the_real_corpus(assets, tmp_path: Path):
    articles = load_articles(assets.wiki)
    assert len(articles) == 10_033
    assert {article.topic for article in articles} == set(TOPICS)
    out = tmp_path / "corpus.jsonl"
    assert main([str(out), "--count", "500"]) == 0
    documents = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert len({document["id"] for document in documents}) == 500
    assert Counter(map(day, documents)) == dict.fromkeys(range(1, DAYS + 1), 50)
