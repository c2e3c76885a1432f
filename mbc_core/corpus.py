"""The demo corpus: 10,033 English Wikipedia lead sections as documents whose topic drifts from day to day.

The articles have no dates of their own, so each gets a made-up publication time: topics come one after the other,
about a thousand articles a day, and neighbouring days share a topic only where one runs out. The same arguments
give the same bytes.

Text: Wikipedia's authors, CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/); every document carries
the address of its article.

    python -m mbc_core.corpus wiki.jsonl            # all of it, for `mbc ingest wiki.jsonl --bank …`
    python -m mbc_core.corpus wiki.jsonl --count 500
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote

from mbc_core.assets import Assets, cache_root
from mbc_core.errors import DamagedFile, MbcError, UsageError

LICENCE = "Wikipedia lead sections, CC BY-SA 4.0, by Wikipedia's authors (each document's uri names its article)"
FIRST_DAY = datetime(2025, 1, 1, tzinfo=UTC)
DAYS = 10

TOPICS = (
    "Mathematics",
    "Physical sciences",
    "Technology",
    "Biology and health sciences",
    "Geography",
    "History",
    "Society and social sciences",
    "Philosophy and religion",
    "Arts",
    "Everyday life",
    "People",
    "Uncategorized",
)
"""In the order in which the stream meets them; a topic that is not listed comes last."""


@dataclass(frozen=True, slots=True)
class Article:
    """One lead section as the asset has it."""

    title: str
    text: str
    topic: str


def load_articles(wiki: Path) -> list[Article]:
    """Read the asset's JSON file.

    Raises:
        DamagedFile: not the JSON that was expected.
    """
    try:
        entries = json.loads(wiki.read_text("utf-8"))
        return [Article(entry["title"], entry["extract"].strip(), entry["topic"]) for entry in entries.values()]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DamagedFile(
            "the demo corpus cannot be read",
            value=str(wiki),
            cause=str(error),
            fix="delete the file and run `make setup` again",
        ) from error


def demo_documents(
    articles: Sequence[Article], *, count: int | None = None, seed: int = 0, days: int = DAYS
) -> Iterator[dict[str, str]]:
    """Documents (id, title, text, uri, timestamp) in the order of their event times.

    Args:
        articles: what :func:`load_articles` read.
        count: how many, drawn by a seeded hash so that every topic keeps its share; None for all.
        seed: draws another sample and another order within topics.
        days: how many one-day windows the documents spread over, evenly.

    Raises:
        UsageError: more documents than there are, or fewer documents than days.
    """
    total = len(articles) if count is None else count
    if not days <= total <= len(articles):
        raise UsageError(
            "the number of documents is out of range",
            value=total,
            cause=f"the corpus has {len(articles)} and spreads over {days} days",
            fix=f"choose between {days} and {len(articles)}",
        )
    drawn = sorted(articles, key=lambda article: _rank(article.title, seed))[:total]
    drawn.sort(key=lambda article: (_topic_rank(article.topic), _rank(article.title, seed)))
    for number, article in enumerate(drawn):
        day, rest = divmod(number * days, total)
        moment = FIRST_DAY + timedelta(days=day, seconds=rest * 86_400 // total)
        yield {
            "id": article.title,
            "title": article.title,
            "text": article.text,
            "uri": "https://en.wikipedia.org/wiki/" + quote(article.title.replace(" ", "_"), safe=",:()'!"),
            "timestamp": moment.strftime("%Y-%m-%dT%H:%M:%SZ"),
        }


def write_corpus(articles: Sequence[Article], out: Path, *, count: int | None = None, seed: int = 0) -> int:
    """Write the documents as JSON Lines and return their number; an equal file is left untouched.

    Args:
        articles: what :func:`load_articles` read.
        out: the file to write.
        count, seed: as in :func:`demo_documents`.
    """
    lines = [json.dumps(document, ensure_ascii=False) for document in demo_documents(articles, count=count, seed=seed)]
    content = ("\n".join(lines) + "\n").encode("utf-8")
    if not (out.exists() and out.read_bytes() == content):
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(out.name + ".partial")
        partial.write_bytes(content)
        partial.replace(out)
    return len(lines)


def cached_corpus(wiki: Path, *, count: int | None = None, seed: int = 0) -> Path:
    """The documents as a JSON Lines file in the user's cache, written when missing."""
    articles = load_articles(wiki)
    out = cache_root() / "corpus" / f"wikipedia-{count or len(articles)}-seed{seed}.jsonl"
    write_corpus(articles, out, count=count, seed=seed)
    return out


def _rank(title: str, seed: int) -> bytes:
    return hashlib.blake2b(title.encode(), digest_size=8, key=seed.to_bytes(8, "little", signed=True)).digest()


def _topic_rank(topic: str) -> int:
    return TOPICS.index(topic) if topic in TOPICS else len(TOPICS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the corpus to a file."""
    parser = argparse.ArgumentParser(prog="python -m mbc_core.corpus", description="The demo corpus as JSON Lines.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=None, help="a seeded sample of this many (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        articles = load_articles(Assets.ensure(lambda line: print(line, file=sys.stderr)).wiki)
        written = write_corpus(articles, options.out, count=options.count, seed=options.seed)
    except MbcError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{written} documents in {options.out}. {LICENCE}.", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
