"""Where a dead letter speaks of a document: its id as a whole word in the raw record, the message or the source."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence

_CHUNK = 400
_SHORTEST_CUT = 4
_EDGE = rb"[0-9A-Za-z_]"


class Mentions:
    """Finds ids in bytes, however the record spells them.

    A raw record may be JSON, CSV or text, of any encoding, cut off at its end, or not even that; so an id counts as
    mentioned where it stands as a whole word. That may take the contents of a few more dead letters than needed.

    Args:
        ids: distinct ids.

    >>> Mentions(["doc-7", "8"]).places({"raw": b'{"id": "doc-7", "text": 88}', "message": "", "source": ""})
    {0}
    """

    def __init__(self, ids: Sequence[str]) -> None:
        self._place: dict[bytes, int] = {}
        self._heads: dict[bytes, int] = {}
        for place, one in enumerate(ids):
            for spelling in _spellings(one):
                self._place.setdefault(spelling, place)
            head = one.encode("utf-8", "replace")
            for size in range(_SHORTEST_CUT, len(head)):
                self._heads.setdefault(head[:size], place)
        found = sorted(self._place, key=len, reverse=True)
        self._patterns = [
            # A look-ahead finds words that overlap too.
            re.compile(rb"(?<!" + _EDGE + rb")(?=(" + b"|".join(map(re.escape, part)) + rb")(?!" + _EDGE + rb"))")
            for part in (found[start : start + _CHUNK] for start in range(0, len(found), _CHUNK))
        ]
        self._ids = {one: place for place, one in enumerate(ids)}

    def places(self, letter: Mapping[str, object]) -> set[int]:
        """Places (in the ids given) of the ids that a dead letter mentions; ``letter`` has message, source and raw."""
        raw = letter.get("raw") or b""
        texts = [raw if isinstance(raw, bytes) else b""]
        texts += [str(letter.get(name) or "").encode("utf-8", "replace") for name in ("message", "source")]
        found = {place for text in texts for place in self._in(text)}
        return found | set(self._parsed(texts[0])) | set(self._cut(texts[0]))

    def _in(self, text: bytes) -> Iterator[int]:
        for pattern in self._patterns:
            for match in pattern.finditer(text):
                yield self._place[match[1]]

    def _parsed(self, raw: bytes) -> Iterator[int]:
        """An id that JSON escapes spell in a way of their own."""
        try:
            record = json.loads(raw)
        except (ValueError, RecursionError):
            return
        for name in ("id", "doc_id") if isinstance(record, dict) else ():
            if (place := self._ids.get(str(record.get(name)))) is not None:
                yield place

    def _cut(self, raw: bytes) -> Iterator[int]:
        """An id that the record's end cuts off, when enough of it is there to be known."""
        longest = max(map(len, self._heads), default=0)
        for size in range(min(longest, len(raw)), _SHORTEST_CUT - 1, -1):
            place = self._heads.get(raw[-size:])
            before = raw[-size - 1 : -size] if size < len(raw) else b""
            if place is not None and not re.fullmatch(_EDGE, before):
                yield place


def _spellings(one: str) -> set[bytes]:
    """The id as plain text, in JSON and CSV, and in the encodings that files come in."""
    texts = {one, json.dumps(one)[1:-1], json.dumps(one, ensure_ascii=False)[1:-1], one.replace('"', '""')}
    texts |= {text.replace("/", "\\/") for text in tuple(texts)}
    found = {text.encode(code) for text in texts for code in ("utf-8", "utf-16-le", "utf-16-be") if _fits(text, code)}
    return found | {text.encode("latin-1") for text in texts if _fits(text, "latin-1")}


def _fits(text: str, code: str) -> bool:
    try:
        text.encode(code)
    except UnicodeEncodeError:
        return False
    return True
