"""The JSON objects that ``--json`` prints. Scripts rely on these keys: more may be added, none renamed."""

from __future__ import annotations

from typing import Any, TypedDict


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
    """``mbc inspect --verify``: what is wrong, a line each, and what is worth knowing and no fault."""

    ok: bool
    problems: list[str]
    information: list[str]


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


class Compared(TypedDict):
    """A row beside another one, over the same questions: differences in points, ``f1_share`` in percent of its F1.

    ``f1_share`` is None when the other's F1 is next to nothing.
    """

    against: str
    em: float
    em_low: float
    em_high: float
    f1: float
    f1_low: float
    f1_high: float
    f1_share: float | None
    f1_share_low: float | None
    f1_share_high: float | None


class MeasuredRow(EvalRow):
    """A row of ``mbc eval``. ``milliseconds`` is a question's recall and generation together.

    ``name`` is unique; ``adapter`` says who answered; ``passages_shown`` is the mean that fitted into the prompt.
    """

    name: str
    adapter: str
    passages_shown: float
    milliseconds_recall: float
    milliseconds_generate: float
    compared: list[Compared]


class RecallAt(TypedDict):
    """R@k in percent; ``share`` is the codes' in percent of the float embedding's (None: not searched, or nothing)."""

    k: int
    by_code: float
    by_code_low: float
    by_code_high: float
    by_float: float | None
    share: float | None
    share_low: float | None
    share_high: float | None


class RecallFigures(TypedDict):
    """How well one kind of address finds the passage that answers; ``bytes`` a passage.

    ``at`` is by address alone, ``at_reranked`` after a second look by word codes (empty for a bank without words).
    """

    profile: str
    T: int
    bytes: int
    passages: int
    questions: int
    at: list[RecallAt]
    at_reranked: list[RecallAt]


class StoredBytes(BytesPerPassage):
    """Bytes a passage of one profile's bank; ``codebooks`` is the size of all codebook files together."""

    profile: str
    passages: int
    codebooks: int


class TextBytes(TypedDict):
    """Bytes a passage of the same texts; ``codes`` is every word as a 16-bit code.

    ``zstd_dictionary`` is with a dictionary of ``dictionary`` bytes trained on these texts, not counted.
    """

    passages: int
    text: float
    zstd: float
    zstd_dictionary: float
    dictionary: int
    codes: float | None


class RetentionRow(TypedDict):
    """F1 on the first documents' questions when the stream has brought ``documents``.

    ``above_closed`` and ``above_shuffled`` are points; ``relative`` is ``above_closed`` and ``f1_relative`` is F1, in
    percent of the first row's (None when that is next to nothing).
    """

    documents: int
    questions: int
    f1: float
    f1_low: float
    f1_high: float
    shuffled_f1: float | None
    closed: str
    closed_f1: float
    above_closed: float
    above_closed_low: float
    above_closed_high: float
    above_shuffled: float | None
    above_shuffled_low: float | None
    above_shuffled_high: float | None
    relative: float | None
    relative_low: float | None
    relative_high: float | None
    f1_relative: float | None
    f1_relative_low: float | None
    f1_relative_high: float | None


class EvalResult(TypedDict):
    """``mbc eval``; ``retention`` is empty unless the stream was asked for."""

    rows: list[MeasuredRow]
    recall: list[RecallFigures]
    bytes: list[StoredBytes]
    texts: TextBytes | None
    retention: list[RetentionRow]
    settings: dict[str, Any]
    notes: list[str]


class AdaptScores(TypedDict):
    """F1 in percent on held-out questions about new and about old documents."""

    new_f1: float
    old_f1: float


class AdaptResult(TypedDict):
    """``mbc adapt``; ``candidate`` is the adapter version that was written, with ``--from-set`` its folder.

    ``reason`` is ``promoted``, ``too few``, ``canary``, ``old worse`` or ``new not better``, and ``sentence`` the same
    with its figures; ``passed`` is the gate's word, ``promoted`` whether the adapter went live. ``best_step`` is the
    step whose weights were kept, ``held_out`` the number of questions by split.
    """

    candidate: str
    promoted: bool
    reason: str
    sentence: str
    passed: bool
    steps: int
    best_step: int
    seconds: float
    before: AdaptScores
    after: AdaptScores
    held_out: dict[str, int]


class AddResult(TypedDict):
    """``mbc adapters add``; the words are those of :class:`AdaptResult`."""

    candidate: str
    promoted: bool
    reason: str
    sentence: str
    before: AdaptScores
    after: AdaptScores


class SetResult(TypedDict):
    """``mbc adapt --write-set``; ``questions`` by split, ``adapters`` the folders of live adapters beside the set."""

    set: str
    digest: str
    bank: str
    as_of: str
    questions: dict[str, int]
    adapters: list[str]
    seconds: float


class Stored(TypedDict):
    """Files and bytes of a bank on storage; ``parts`` is bytes by folder."""

    files: int
    bytes: int
    parts: BankBytes


class CompactResult(TypedDict):
    """``mbc compact``: ``merged`` files became ``shards``; ``dropped`` rows by table; ``swept`` files nobody named."""

    before: Stored
    after: Stored
    merged: int
    shards: int
    dropped: dict[str, int]
    swept: int
    seconds: float


class ForgetResult(TypedDict):
    """``mbc forget``: counts of documents, and the path of the receipt."""

    forgotten: int
    not_found: int
    receipt: str
