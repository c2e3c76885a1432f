"""Which questions a bank keeps for adaptation: a bounded sample of every window, for a limited time.

Each question has a priority, a hash of its document's key and of itself. A window's sample is its questions with the
least priorities. So it is the same whatever the order, the slices, the workers, the restarts and the late panes that
brought the questions: writers store candidates, the reader of the table chooses. Writers leave out what cannot be
chosen any more, ``compact`` drops what is not chosen, and both only save space.

Revisions that were superseded still count among the candidates while codes hold them, so that a window does not take
up, after a revision, questions that another order of arrival would have left out for good.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mbc_core.bank.visible import newest_revisions, revision_places
from mbc_core.errors import DamagedFile, UsageError

if TYPE_CHECKING:
    from mbc_core.bank.bank import Bank

POLICY = "replay.json"
PER_WINDOW = 256
"""Most questions a window keeps: enough of a day to measure and train an adapter on."""

LIFETIME = 365 * 86_400.0
"""Seconds after a question was added for which it is asked."""

COLUMNS = ["key", "question", "window", "added_at"]
"""What tells whether a row is asked."""

_MOST_WINDOWS = 4_096
_FOR_EVER = np.iinfo(np.int64).min


@dataclass(frozen=True, slots=True)
class ReplayPolicy:
    """How much replay a bank keeps, for all who write, read and compact it.

    Attributes:
        per_window: most questions of a window, at least 1.
        lifetime: seconds after which a question is no longer asked, and dropped by ``compact``; ``math.inf``: never.
    """

    per_window: int = PER_WINDOW
    lifetime: float = LIFETIME

    def __post_init__(self) -> None:
        if self.per_window < 1 or not self.lifetime > 0:
            raise UsageError(
                "a bank cannot keep replay like this",
                value=(self.per_window, self.lifetime),
                cause="a window keeps at least one question, for longer than no time",
                fix="give larger numbers, or ingest without replay",
            )

    def to_json(self) -> bytes:
        """As the bank keeps it."""
        told = {"per_window": self.per_window, "lifetime": None if math.isinf(self.lifetime) else self.lifetime}
        return (json.dumps(told, sort_keys=True) + "\n").encode()


def load_policy(bank: Bank) -> ReplayPolicy:
    """The bank's policy; the default when none was ever set.

    Raises:
        DamagedFile: its file cannot be read.
    """
    if not bank.storage.exists(POLICY):
        return ReplayPolicy()
    try:
        told = json.loads(bank.storage.read_bytes(POLICY))
        lifetime = math.inf if told["lifetime"] is None else float(told["lifetime"])
        return ReplayPolicy(int(told["per_window"]), lifetime)
    except (ValueError, KeyError, TypeError, UsageError) as error:
        raise DamagedFile(
            f"the bank's {bank.storage.locate(POLICY)} cannot be read",
            cause=f"{type(error).__name__}: {error}",
            fix="set it anew with `mbc ingest … --replay-per-window N --replay-lifetime TIME`",
        ) from error


def set_policy(bank: Bank, per_window: int | None = None, lifetime: float | None = None) -> ReplayPolicy:
    """Change what is given, and keep it with the bank; returns the policy that holds now."""
    if per_window is None and lifetime is None:
        return load_policy(bank)
    now = load_policy(bank) if per_window is None or lifetime is None else ReplayPolicy()
    wanted = ReplayPolicy(
        now.per_window if per_window is None else per_window, now.lifetime if lifetime is None else lifetime
    )
    if not bank.storage.exists(POLICY) or bank.storage.read_bytes(POLICY) != wanted.to_json():
        bank.storage.replace(POLICY, wanted.to_json())
    return wanted


def priority(key: int, question: str) -> int:
    """64 bits that order the questions of a window; the key is salted, so no document can choose its own place."""
    parts = (b"replay", int(key).to_bytes(8, "little", signed=True), question.encode())
    return int.from_bytes(hashlib.blake2b(b"\x00".join(parts), digest_size=8).digest(), "little")


# ------------------------------------------------------------------------------------------------------------- reading


def sampled(rows: pa.Table, codes: pa.Table, policy: ReplayPolicy, as_of: int | None = None) -> npt.NDArray[np.bool_]:
    """Mask over rows of ``replay``: those that are asked at this moment.

    Args:
        rows: with all columns. codes: columns ``key`` and ``added_at``, read after ``rows``.
        as_of: microseconds since the epoch; None: now.

    Returns:
        bool [len(rows)]: questions of documents' newest revisions, not expired, at most ``per_window`` of a window.
    """
    candidates = _candidates(rows, codes, policy, as_of)
    live = revision_places(rows, codes.filter(pa.array(newest_revisions(codes, as_of)))) >= 0
    chosen = candidates & live & _among_least(rows, candidates, policy.per_window)
    return _bounded(rows, chosen, policy.per_window)


def _candidates(rows: pa.Table, codes: pa.Table, policy: ReplayPolicy, as_of: int | None) -> npt.NDArray[np.bool_]:
    """Questions of revisions that codes hold, superseded ones too, not expired."""
    added = _added(rows)
    known = (revision_places(rows, codes) >= 0) & ~expired(rows, policy, as_of)
    return known if as_of is None else known & (added <= as_of)


def expired(rows: pa.Table, policy: ReplayPolicy, as_of: int | None = None) -> npt.NDArray[np.bool_]:
    """Mask over rows of ``replay`` whose lifetime is over at this moment."""
    moment = time.time_ns() // 1000 if as_of is None else as_of
    since = _FOR_EVER if math.isinf(policy.lifetime) else moment - round(1e6 * policy.lifetime)
    mask: npt.NDArray[np.bool_] = _added(rows) <= since
    return mask


def _among_least(rows: pa.Table, candidates: npt.NDArray[np.bool_], count: int) -> npt.NDArray[np.bool_]:
    """Where a row's priority is at most the ``count``-th least of its window's candidates."""
    floors = _floors(rows.filter(pa.array(candidates)), count, more_than=count)
    result = np.ones(rows.num_rows, bool)
    windows = rows["window"].to_pylist()
    asked = [place for place in np.flatnonzero(candidates).tolist() if windows[place] in floors]
    part = rows.select(["key", "question"]).take(pa.array(asked, pa.int64())).to_pydict()
    for place, key, question in zip(asked, part["key"], part["question"], strict=True):
        result[place] = priority(key, question) <= floors[windows[place]]
    return result


def _floors(rows: pa.Table, count: int, more_than: int = 0) -> dict[str, int]:
    """Window → the ``count``-th least of its distinct priorities, if it has so many, and more rows than given."""
    found: dict[str, int] = {}
    for one in rows["window"].value_counts().to_pylist():
        if one["counts"] >= count and one["counts"] > more_than:
            least = _priorities(rows.filter(pc.equal(rows["window"], one["values"])))
            if len(least) >= count:
                found[one["values"]] = int(least[count - 1])
    return found


def _priorities(rows: pa.Table) -> npt.NDArray[np.uint64]:
    """Distinct priorities, ascending: the same question of another revision counts once."""
    pairs = zip(rows["key"].to_pylist(), rows["question"].to_pylist(), strict=True)
    return np.unique(np.array([priority(key, question) for key, question in pairs], np.uint64))


def _bounded(rows: pa.Table, chosen: npt.NDArray[np.bool_], count: int) -> npt.NDArray[np.bool_]:
    """At most ``count`` of each window, also where a document gives two answers to one question."""
    counts = rows.filter(pa.array(chosen))["window"].value_counts().to_pylist()
    for window in (one["values"] for one in counts if one["counts"] > count):
        mine = np.flatnonzero(chosen & pc.equal(rows["window"], window).to_numpy())
        part = rows.select(["key", "question", "answer"]).take(pa.array(mine, pa.int64())).to_pylist()
        ranks = [(priority(one["key"], one["question"]), one["key"], one["question"], one["answer"]) for one in part]
        order = sorted(range(len(mine)), key=ranks.__getitem__)
        chosen[mine[order[count:]]] = False
    return chosen


# -------------------------------------------------------------------------------------------------- compacting, writing


def not_asked(bank: Bank, cutoff: int) -> Callable[[pa.Table], npt.NDArray[np.bool_]]:
    """What makes the mask of rows of ``replay`` (columns key, question, window, added_at) that nobody asks any more.

    These are the expired ones, and those outside their window's sample now and as of every moment since ``cutoff``
    (microseconds since the epoch).
    """
    rows, policy = bank.read("replay", COLUMNS), load_policy(bank)
    codes = bank.read("codes", ["key", "added_at"])  # last: what has no codes yet does not count
    old = _candidates(rows, codes, policy, None) & (_added(rows) <= cutoff)
    floors = _floors(rows.filter(pa.array(old)), policy.per_window)

    def mask(part: pa.Table) -> npt.NDArray[np.bool_]:
        told = zip(part["window"].to_pylist(), part["key"].to_pylist(), part["question"].to_pylist(), strict=True)
        outside = [window in floors and priority(key, question) > floors[window] for window, key, question in told]
        found: npt.NDArray[np.bool_] = expired(part, policy) | np.array(outside, bool)
        return found

    return mask


@dataclass
class KeptPriorities:
    """What a writer remembers of the windows it writes to: the least priorities that are stored already.

    Only a question below the ``per_window``-th of them can still be chosen. Not knowing of others' rows costs space,
    never a question.

    Attributes:
        per_window: of the bank's policy.
    """

    per_window: int
    _kept: dict[str, npt.NDArray[np.uint64]] = field(default_factory=dict)

    def load(self, bank: Bank, windows: Iterable[str]) -> None:
        """Look up those of ``windows`` that are not known yet."""
        wanted = pa.array(sorted(set(windows) - self._kept.keys()), pa.string())
        if not len(wanted):
            return
        rows = bank.read("replay", COLUMNS)
        rows = rows.filter(pc.is_in(rows["window"], wanted))
        if rows.num_rows:
            codes = bank.read("codes", ["key", "added_at"])
            rows = rows.filter(pa.array(_candidates(rows, codes, load_policy(bank), None)))
        for window in wanted.to_pylist():
            self._kept[window] = np.zeros(0, np.uint64)
            self.add(window, _priorities(rows.filter(pc.equal(rows["window"], window))))

    def add(self, window: str, priorities: npt.NDArray[np.uint64]) -> None:
        """Remember what was stored now: priorities uint64 [n]."""
        before = self._kept.pop(window, np.zeros(0, np.uint64))
        self._kept[window] = np.union1d(before, priorities)[: self.per_window]
        while len(self._kept) > _MOST_WINDOWS:  # the oldest; it is looked up again if a late document comes
            del self._kept[next(iter(self._kept))]

    def floors(self) -> Mapping[str, int]:
        """Window → the greatest priority that can still be chosen, for windows that are full."""
        return {window: int(kept[-1]) for window, kept in self._kept.items() if len(kept) >= self.per_window}


def _added(rows: pa.Table) -> npt.NDArray[np.int64]:
    moments: npt.NDArray[np.int64] = rows["added_at"].cast(pa.int64()).to_numpy()
    return moments
