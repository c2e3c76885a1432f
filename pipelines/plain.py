"""The plain-function twins of the transforms: what happens to one batch, without Beam.

Everything with mathematics is ``mbc_core``'s; here it is applied to the rows of a batch. The transforms only carry
batches between these functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mbc_core.bank.replay import priority
from mbc_core.codebook.statistics import BatchStatistics
from mbc_core.codes import Rotation, pack, quantize, to_slots
from mbc_core.evaluation.cloze import gives_away, make_cloze
from mbc_core.passages import split_passages
from mbc_core.windows import window_order
from mbc_core.words import choose_words, split_words
from pipelines.encoding import LoadedEncoder, stack
from pipelines.readers import MAX_RAW_BYTES
from pipelines.records import (
    CODE_ROWS,
    DEAD_LETTER_ROWS,
    DOCUMENT_ROWS,
    REPLAY_ROWS,
    CodeBatch,
    DeadLetters,
    DocumentBatch,
    EncodedBatch,
    WindowVectors,
    column,
    embedding_array,
    passage_schema,
    stable_hash,
)
from schemas.tables import UNDATED

if TYPE_CHECKING:
    from mbc_core.codebook.chain import CodebookChain
    from mbc_core.codebook.files import Codebook
    from mbc_core.codebook.update import CodebookUpdate
    from mbc_core.encoder import EncodedPassage

HELD_OUT_ONE_IN = 10
"""One document in so many is kept out of training, by its key: it measures an adapter."""

_CLOZE_PASSAGES, _CLOZE_SEEDS = 3, 3
_SYSTEMIC = 8


@dataclass(frozen=True, slots=True)
class EncodeRule:
    """What is kept of a document beside its embeddings.

    Attributes:
        words: most word codes a passage.
        keep_text: store the text too, compressed (off by default: the bank is there to be small).
        replay: make replay rows (question and answer pairs that adaptation trains on).
    """

    words: int
    keep_text: bool = False
    replay: bool = True


# -------------------------------------------------------------------------------------------------------- encoding


def encode_documents(
    loaded: LoadedEncoder, batch: DocumentBatch, rule: EncodeRule, progress: Callable[[int], None] | None = None
) -> EncodedBatch:
    """Documents → passages with embeddings and word codes, and their documents' rows without text.

    Args:
        progress: called with the number of passages just finished.
    """
    documents = batch.documents
    texts = documents["text"].to_pylist()
    cut = [split_passages(text, loaded.encoder.count_pieces) for text in texts]
    owners = np.repeat(np.arange(len(texts)), [len(one) for one in cut])
    encoded = list(loaded.encoder.encode([passage for one in cut for passage in one], progress))
    passages = pa.RecordBatch.from_arrays(
        [
            documents["key"].take(pa.array(owners)),
            pa.array([number for one in cut for number in range(len(one))], pa.int32()),
            documents["event_time"].take(pa.array(owners)),
            documents["window"].take(pa.array(owners)),
            pa.array([_word_codes(one, loaded, rule.words) for one in encoded], pa.binary()),
            embedding_array(stack([one.embedding for one in encoded], loaded.encoder.width)),
        ],
        schema=passage_schema(loaded.encoder.width),
    )
    replay = _replay(documents, cut, encoded) if rule.replay else []
    return EncodedBatch(
        _document_rows(documents, rule.keep_text), passages, pa.RecordBatch.from_pylist(replay, REPLAY_ROWS)
    )


def encode_or_reject(
    loaded: LoadedEncoder, batch: DocumentBatch, rule: EncodeRule, progress: Callable[[int], None] | None = None
) -> tuple[EncodedBatch | None, DeadLetters | None]:
    """:func:`encode_documents`; documents that cannot be encoded become dead letters instead of stopping the run.

    When the batch fails it is tried again one document at a time. Trouble of the machine (no memory, no disk) and
    batches of which nothing at all can be encoded are not the documents' fault: they are raised.
    """
    try:
        return encode_documents(loaded, batch, rule, progress), None
    except (MemoryError, OSError):
        raise
    except Exception as error:  # any error of a model or tokenizer; told apart below
        rows, failed, last = [], [], error
    for place in range(len(batch)):
        one = DocumentBatch(batch.documents.slice(place, 1))
        try:
            rows.append(encode_documents(loaded, one, rule))
        except (MemoryError, OSError):
            raise
        except Exception as error:
            last = error
            failed.append(_encode_failed(one.documents.to_pylist()[0], error))
    if not rows and len(batch) >= _SYSTEMIC:
        raise last
    letters = DeadLetters(pa.RecordBatch.from_pylist(failed, DEAD_LETTER_ROWS)) if failed else None
    return (EncodedBatch.concat(rows) if rows else None), letters


def _encode_failed(row: Mapping[str, object], error: Exception) -> dict[str, object]:
    return {
        "window": row["window"],
        "reason": "encode_failed",
        "message": f"{type(error).__name__}: {error}",
        "source": "encoder",
        "position": 0,
        "key": row["key"],
        "raw": str(row["text"]).encode("utf-8", "replace")[:MAX_RAW_BYTES],
    }


def _word_codes(passage: EncodedPassage, loaded: LoadedEncoder, budget: int) -> bytes:
    if loaded.lexicon is None or not budget:
        return b""
    return loaded.lexicon.pack(choose_words(passage.words, passage.scores, budget, loaded.lexicon).tolist())


def _document_rows(documents: pa.RecordBatch, keep_text: bool) -> pa.RecordBatch:
    texts = pa.nulls(documents.num_rows, pa.binary())
    if keep_text:
        import zstandard

        packer = zstandard.ZstdCompressor(level=19)
        texts = pa.array([packer.compress(text.encode()) for text in documents["text"].to_pylist()], pa.binary())
    columns = [texts if one.name == "text_zstd" else documents[one.name] for one in DOCUMENT_ROWS]
    return pa.RecordBatch.from_arrays(columns, schema=DOCUMENT_ROWS)


def _replay(
    documents: pa.RecordBatch, cut: Sequence[Sequence[str]], encoded: Sequence[EncodedPassage]
) -> list[dict[str, object]]:
    rows, first = [], 0
    for document, passages in zip(documents.drop_columns(["text"]).to_pylist(), cut, strict=True):
        mine = encoded[first : first + len(passages)]
        first += len(passages)
        key = document["key"].to_bytes(8, "little", signed=True)
        pairs = [(one["question"], one["answer"]) for one in document["qa"] or []] or _cloze(key, passages, mine)
        split = "heldout" if stable_hash(b"split", key) % HELD_OUT_ONE_IN == 0 else "train"
        for question, answer in pairs:
            row = {name: document[name] for name in ("key", "event_time", "window")}
            told = {"question": question, "answer": answer, "split": split}
            rows.append(row | told | {"priority": priority(document["key"], question)})
    return rows


def _cloze(key: bytes, passages: Sequence[str], encoded: Sequence[EncodedPassage]) -> list[tuple[str, str]]:
    """One cloze question from a passage chosen by the document's key; the next ones are tried when it offers none.

    One that gives a word of its answer away is not asked.
    """
    start = stable_hash(b"passage", key)
    for step in range(min(len(passages), _CLOZE_PASSAGES)):
        place = (start + step) % len(passages)
        words: Sequence[str] = encoded[place].words
        scores = encoded[place].scores
        if not words:  # an encoder without a salience head: every word is as good as another
            words = [one.text for one in split_words(passages[place])]
            scores = np.zeros(len(words), np.float32)
        for seed in range(_CLOZE_SEEDS):
            made = make_cloze(passages[place], words, scores, seed)
            if made is not None and not gives_away(*made):
                return [made]
    return []


# -------------------------------------------------------------------------------------------- codebook and codes


@dataclass
class Assignment:
    """What walking the windows of one slice decides.

    Attributes:
        versions: window → codebook version of its codes.
        codebooks: every version in use, by number.
        published: new versions, in order.
        statistics: window → statistics that no version has taken in yet; the bank keeps them.
    """

    versions: dict[str, int] = field(default_factory=dict)
    codebooks: dict[int, Codebook] = field(default_factory=dict)
    published: list[CodebookUpdate] = field(default_factory=list)
    statistics: dict[str, BatchStatistics] = field(default_factory=dict)


def assign_codebooks(
    chain: CodebookChain,
    windows: Iterable[str],
    vectors: Callable[[str], Iterable[WindowVectors]],
    rotation: Rotation,
    slots: int,
    *,
    continues: str | None = None,
    recorded: Mapping[str, int] | None = None,
) -> Assignment:
    """Walk windows in order: choose each one's version, gather its statistics, publish where enough have gathered.

    Args:
        chain: the codebook versions before; updated in place.
        windows: any order, repeats allowed. vectors: the batches of one window, any chunking.
        continues: a window that goes on in a later slice: nothing is published at its end yet.
        recorded: versions already chosen for windows whose codes are in part committed.
    """
    found, chosen = Assignment(), dict(recorded or {})
    gathered: dict[str, BatchStatistics] = {}
    for window in sorted(set(windows), key=window_order):
        known = chosen.get(window)
        book = chain.version_for(window) if known is None else chain.versions[known]
        found.versions[window], found.codebooks[book.version] = book.version, book
        if window == UNDATED:
            continue  # never published from
        statistics = sum_statistics(book, vectors(window), rotation, slots)
        gathered[window] = statistics
        update = chain.add(window, statistics, ended=window != continues)
        if update is not None:
            found.published.append(update)
    last = chain.head.last_window
    found.statistics = {window: statistics for window, statistics in gathered.items() if last is None or window > last}
    return found


def sum_statistics(book: Codebook, batches: Iterable[WindowVectors], rotation: Rotation, slots: int) -> BatchStatistics:
    """Statistics of all batches under one codebook version; equal bytes for any chunking and order."""
    total = BatchStatistics.zero(book.size, book.width, book.version)
    for batch in batches:
        z = to_slots(batch.embeddings(), rotation, slots)
        keys, numbers = column(batch.passages, "key"), column(batch.passages, "passage")
        total = total + BatchStatistics.of(
            book, z, quantize(z, book.codewords), keys.astype(np.int64), numbers.astype(np.int32)
        )
    return total


def quantize_batch(
    batch: EncodedBatch, book_of: Callable[[str], Codebook], rotation: Rotation, slots: int
) -> CodeBatch:
    """Embeddings → packed address codes, each row with the version of its window.

    Args:
        book_of: window → the codebook its codes are made with.
    """
    z = to_slots(batch.embeddings(), rotation, slots)
    windows = batch.passages["window"].dictionary_encode()
    books = [book_of(name) for name in windows.dictionary.to_pylist()]
    version = np.array([book.version for book in books], np.int32)[windows.indices.to_numpy(zero_copy_only=False)]
    codes = np.zeros((len(z), slots), np.uint16)
    for book in {one.version: one for one in books}.values():
        here = version == book.version
        codes[here] = quantize(np.ascontiguousarray(z[here]), book.codewords)
    made = {"address": packed_array(pack(codes)), "codebook_version": pa.array(version)}
    columns = [made[one.name] if one.name in made else batch.passages[one.name] for one in CODE_ROWS]
    return CodeBatch(batch.documents, pa.RecordBatch.from_arrays(columns, schema=CODE_ROWS), batch.replay)


def packed_array(packed: npt.NDArray[np.uint8]) -> pa.Array:
    """uint8 [n, code_size] → a binary column."""
    size = packed.shape[1]
    fixed = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(size), len(packed), [None, pa.py_buffer(np.ascontiguousarray(packed))]
    )
    return fixed.cast(pa.binary())


def smallest_by_priority(rows: pa.RecordBatch, count: int, floors: Mapping[str, int] | None = None) -> pa.RecordBatch:
    """Of each window the ``count`` rows with the least ``priority``: a sample that no order changes.

    Args:
        floors: window → the greatest priority that is still wanted; any where none is given.
    """
    order = np.lexsort((column(rows, "priority"), rows["window"].dictionary_encode().indices.to_numpy()))
    windows, ranks = rows["window"].to_pylist(), column(rows, "priority").tolist()
    taken: dict[str, int] = {}
    keep = []
    for place in order.tolist():
        window = windows[place]
        seen = taken.get(window, 0)
        if seen < count and (floors is None or window not in floors or ranks[place] <= floors[window]):
            taken[window] = seen + 1
            keep.append(place)
    return rows.take(pa.array(sorted(keep), pa.int64()))


def deal_by_key(batch: CodeBatch, shards: int) -> Iterator[tuple[int, CodeBatch]]:
    """Parts of a batch by shard: all rows of a document go to the same one, in every process."""
    if shards == 1:
        yield 0, batch
        return
    keys = column(batch.documents, "key").astype(np.int64)
    shard = np.array([stable_hash(b"shard", int(key).to_bytes(8, "little", signed=True)) % shards for key in keys])
    for number in np.unique(shard).tolist():
        yield int(number), batch.take(shard == number)
