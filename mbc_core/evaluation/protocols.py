"""Question sheets of whole protocols: one bank a profile, or one bank that grows while it is asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from mbc_core.errors import UsageError
from mbc_core.evaluation.asking import Asker, Wanted
from mbc_core.evaluation.bank_view import BankView, TextEncoder
from mbc_core.evaluation.qa_file import QaDocument, QaSet
from mbc_core.evaluation.sheet import READS, Lines, Sheet, Shown
from mbc_core.evaluation.stores import text_codes_store
from mbc_core.sizes import compress
from schemas.manifest import PROFILES
from schemas.results import RecallFigures, StoredBytes, TextBytes

if TYPE_CHECKING:
    from mbc_core.memory import Memory

Say = Callable[[str], None]
MAIN_PROFILE = "default"
FIRST = 200
_STREAM_READS = ("recall", "shuffled")


class Builder(Protocol):
    """Builds the banks that an evaluation reads, through the pipeline."""

    @property
    def encoder(self) -> TextEncoder:
        """The encoder that the banks are made with."""

    def add(self, name: str, profile: str, documents: Sequence[QaDocument]) -> None:
        """Ingest documents into the bank ``name``, making it when it is not there."""

    def open(self, name: str) -> Memory:
        """The bank as it is now."""


def sheet_of_banks(
    qa: QaSet, memories: Mapping[str, Memory], encoder: TextEncoder, wanted: Wanted, say: Say = lambda line: None
) -> Sheet:
    """The reads of one bank a profile, all of the same documents.

    Reads that do not depend on the profile are shown once, from the profile ``default`` or else the first with words.

    Args:
        memories: profile → open bank.
        encoder: the one the banks were made with.

    Raises:
        UsageError: a recalled passage's text is wanted and nobody has it, or a bank is too small.
    """
    asker = Asker(qa, encoder, wanted, qa.drawn(wanted.limit, wanted.seed))
    views = {name: BankView.of(memory, qa, encoder.count_pieces) for name, memory in memories.items()}
    readable = [name for name, view in views.items() if view.has_words] or list(views)
    main = views[MAIN_PROFILE if MAIN_PROFILE in readable else readable[0]]
    figures = _figures(qa, views, main, asker, say)
    by_name: dict[tuple[str, str], list[Shown]] = {}
    for name, view in views.items():
        reads = [read for read in wanted.reads if _offers(view, read) and (READS[read].by_profile or view is main)]
        for one in asker.show(view, reads, figures["texts"]):
            by_name.setdefault((one.read, name), []).append(one)
    ordered = [shown for read in READS for name in views for shown in by_name.get((read, name), [])]
    by_address = any(READS[one.read].store in ("address", "histogram") for one in ordered)
    codes = asker.shown_codes(main).to_json() if by_address else None
    return replace(_sheet(qa, asker.lines, ordered, figures), codes=codes)


def sheet_of_stream(
    qa: QaSet,
    builder: Builder,
    profile: str,
    wanted: Wanted,
    *,
    first: int = FIRST,
    say: Say = lambda line: None,
) -> Sheet:
    """The MAC protocol: documents arrive in order; the first ones are asked about again and again as more come.

    At ``first``, 2·first, 4·first, … documents and at the end the questions about the first ``first`` are read by
    recall and from a shuffled bank, once closed book; at the end all questions are asked in every way wanted.

    Raises:
        UsageError: fewer documents than ``first``, or a profile without words.
    """
    if not PROFILES[profile].words:
        raise UsageError(
            "retention is measured by reading words",
            value=profile,
            cause="this profile stores addresses only",
            fix="take the profile compact, default or rich",
        )
    if not 0 < first <= len(qa.documents):
        raise UsageError(
            "the stream is shorter than its first part",
            value=f"{len(qa.documents)} documents",
            cause=f"retention is measured on the first {first}",
            fix="give a longer file or a smaller --first",
        )
    early = replace(wanted, ks=wanted.ks[:1], with_float=False)
    asker = Asker(qa, builder.encoder, early, qa.drawn(wanted.limit, wanted.seed, documents=first))
    streamed: list[Shown] = []
    arrived = 0
    for count in checkpoints(first, len(qa.documents)):
        builder.add("stream", profile, qa.documents[arrived:count])
        arrived = count
        view = BankView.of(builder.open("stream"), qa, builder.encoder.count_pieces)
        reads = [*_STREAM_READS, *(("closed", "closed-equal") if count == first else ())]
        streamed += [replace(one, documents=count) for one in asker.show(view, reads, None)]
        say(f"{count:,} documents have come")
    whole = sheet_of_banks(qa, {profile: builder.open("stream")}, builder.encoder, wanted, say)
    lines = Lines()
    lines.places(whole.lines)
    known = asker.lines.all()
    moved = [
        replace(one, lines=[lines.places(known[place] for place in places) for places in one.lines]) for one in streamed
    ]
    return replace(whole, lines=lines.all(), shown=[*whole.shown, *moved])


def checkpoints(first: int, total: int) -> list[int]:
    """``first``, twice that, four times, … and ``total``.

    >>> checkpoints(200, 1000), checkpoints(200, 200)
    ([200, 400, 800, 1000], [200])
    """
    found = []
    count = first
    while count < total:
        found.append(count)
        count *= 2
    return [*found, total]


def _offers(view: BankView, read: str) -> bool:
    kind = READS[read]
    needs_words = kind.by_profile or kind.store == "text-codes"
    return view.has_words or not needs_words


def _figures(qa: QaSet, views: Mapping[str, BankView], main: BankView, asker: Asker, say: Say) -> dict[str, Any]:
    """What is measured without a language model."""
    recall: list[RecallFigures] = []
    for view in (main, *views.values()):
        if all(one["T"] != view.slots for one in recall):  # profiles of one T share their addresses
            recall.append(asker.recall_figures(view))
            say(f"searched {len(view.texts):,} passages by code, T = {view.slots}")
    missing = int((main.right[list(asker.places)] < 0).sum())
    notes = []
    if missing:
        notes.append(f"{missing} of {len(asker.places)} questions are about documents that the bank does not hold")
    return {
        "recall": recall,
        "bytes": [_stored(view) for view in views.values()],
        "texts": _text_bytes(main),
        "settings": {
            "qa": qa.digest,
            "documents": len(qa.documents),
            "questions": len(asker.places),
            "seed": asker.wanted.seed,
            "limit": asker.wanted.limit,
        },
        "notes": notes,
    }


def _stored(view: BankView) -> StoredBytes:
    found = view.memory.bank.inspect()
    books = [one.size for one in view.memory.bank.storage.list("codebooks") if one.path.count("/") == 1]
    return {
        **found["bytes_per_passage"],
        "profile": view.profile,
        "passages": found["passages"],
        "codebooks": sum(books),
    }


def _text_bytes(view: BankView) -> TextBytes | None:
    """What the known texts take as they are, compressed, and as codes."""
    texts = sorted(text for text in view.texts if text is not None)  # a dictionary depends on the order
    if not texts:
        return None
    found = compress(texts)
    lexicon = view.memory.lexicon
    return {
        "passages": found.passages,
        "text": found.text,
        "zstd": found.zstd,
        "zstd_dictionary": found.zstd_dictionary,
        "dictionary": found.dictionary,
        "codes": text_codes_store(texts, lexicon).bytes_per_passage if lexicon is not None else None,
    }


def _sheet(qa: QaSet, lines: Lines, shown: list[Shown], figures: dict[str, Any]) -> Sheet:
    return Sheet(
        [one.question for one in qa.questions],
        [list(one.answers) for one in qa.questions],
        lines.all(),
        shown,
        figures,
    )
