"""The JSON objects that ``--json`` prints. Scripts rely on these keys: more may be added, none renamed."""

from __future__ import annotations

from typing import TypedDict


class IngestResult(TypedDict):
    """``mbc ingest``. Counts are in documents unless named otherwise, and come from the ledger."""

    ingest_id: str
    documents: int
    passages: int
    duplicates: int
    replaced: int
    dead_letters: int
    windows: int
    codebook_version: int
    seconds: float
    documents_per_second: float


class Source(TypedDict):
    """A recalled passage behind an answer; ``event_time`` is ISO 8601 or None."""

    doc_id: str
    title: str | None
    event_time: str | None
    score: float
    words: str


class AskMilliseconds(TypedDict):
    """Time of the two parts of an answer."""

    recall: float
    generate: float


class AskResult(TypedDict):
    """``mbc ask``; ``as_of`` is ISO 8601 or None for now."""

    question: str
    answer: str
    read: str
    as_of: str | None
    sources: list[Source]
    milliseconds: AskMilliseconds


class BankBytes(TypedDict):
    """Bytes on storage, logs included: what the store holds below each folder. ``other`` is the rest."""

    codes: int
    documents: int
    replay: int
    codebooks: int
    adapters: int
    other: int
    total: int


class BytesPerPassage(TypedDict):
    """Bytes a passage: ``address`` and ``words`` are the payload itself, ``all_in`` is codes + documents."""

    address: float
    words: float
    codes_table: float
    all_in: float


class CodebookFigures(TypedDict):
    """The newest codebook version: ``used`` codewords of K, perplexity and resets of its last update."""

    version: int
    K: int
    T: int
    used: int
    perplexity: float
    resets: int


class InspectResult(TypedDict):
    """``mbc inspect``; ``adapter`` names the live adapter of each base model, or is None."""

    documents: int
    passages: int
    dead_letters: int
    windows: int
    bytes: BankBytes
    bytes_per_passage: BytesPerPassage
    codebook: CodebookFigures
    adapter: str | None


class VerifiedInspectResult(InspectResult):
    """``mbc inspect --verify``."""

    ok: bool
    problems: list[str]


class EvalRow(TypedDict):
    """One way of reading, measured: shares in percent, intervals at 95%."""

    read: str
    profile: str
    k: int
    em: float
    em_low: float
    em_high: float
    em_prefix: float
    f1: float
    f1_low: float
    f1_high: float
    questions: int
    bytes_per_passage: float
    prompt_tokens: float
    milliseconds: float


class EvalResult(TypedDict):
    """``mbc eval``."""

    rows: list[EvalRow]


class AdaptScores(TypedDict):
    """F1 in percent on held-out questions about new and about old documents."""

    new_f1: float
    old_f1: float


class AdaptResult(TypedDict):
    """``mbc adapt``; ``candidate`` is the adapter version that was written."""

    candidate: str
    promoted: bool
    reason: str
    steps: int
    seconds: float
    before: AdaptScores
    after: AdaptScores


class ForgetResult(TypedDict):
    """``mbc forget``: counts of documents, and the path of the receipt."""

    forgotten: int
    not_found: int
    receipt: str
