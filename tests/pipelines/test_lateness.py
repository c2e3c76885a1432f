"""Lateness alone: which documents a moving watermark leaves behind."""

from __future__ import annotations

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing import test_stream
from apache_beam.testing.util import assert_that, equal_to
from apache_beam.transforms.window import TimestampedValue
from stream_run import LIVE

from pipelines.lateness import JudgeLateness, too_late_letters
from pipelines.stream_records import document_to_bytes
from schemas.document import Document

W = 10


def judged(steps, allowed):
    """Steps are watermarks (numbers) and lists of event times; gives (times in time, times too late)."""
    stream = test_stream.TestStream()
    for step in steps:
        if isinstance(step, list):
            stream = stream.add_elements([TimestampedValue((0, b"%d" % time), time) for time in step])
        else:
            stream = stream.advance_watermark_to(step)
    pipeline = beam.Pipeline(options=PipelineOptions(LIVE))
    typed = pipeline | stream.advance_watermark_to_infinity().with_output_types(tuple[int, bytes])
    return pipeline, typed | JudgeLateness(W, allowed)


@pytest.mark.parametrize(
    ("steps", "allowed", "in_time", "too_late"),
    [
        pytest.param([[1, 9], 9, [2], 10, [3], [11]], 0, [1, 9, 2, 11], [3], id="nothing allowed"),
        pytest.param([[1], 14, [2], 15, [3]], 5, [1, 2], [3], id="half a window allowed"),
        pytest.param(
            [[1], 34, [2], 35, [3, 12], 45, [13]], 25, [1, 2, 12], [3, 13], id="more than two windows allowed"
        ),
        pytest.param([[41], 45, [12, 35], [45]], 0, [41, 45], [12, 35], id="windows never seen, before one that was"),
        pytest.param([3, [41], 25, [12, 35]], 0, [41, 12, 35], [], id="a gap ahead of the watermark is open"),
        pytest.param([[1], 100, [95], 101, [50, 99]], 0, [1, 95], [50, 99], id="after a long gap"),
        pytest.param(
            [[1], 9_999, [9_995], 10_000, [5_000, 9_999]], 0, [1, 9_995], [5_000, 9_999], id="a thousand windows"
        ),
        pytest.param([[-15], -10, [-11], [-5]], 0, [-15, -5], [-11], id="before the epoch"),
        pytest.param([[5], 8, [3], [7]], 0, [5, 3, 7], [], id="out of order within a window"),
    ],
)
def test_who_is_in_time(steps, allowed, in_time, too_late):
    pipeline, found = judged(steps, allowed)
    assert_that(found.in_time | "Ours" >> beam.Map(lambda one: int(one[1])), equal_to(in_time), label="in time")
    assert_that(found.too_late | "Theirs" >> beam.Map(lambda one: int(one[1])), equal_to(too_late), label="too late")
    pipeline.run().wait_until_finish()


def test_the_dead_letter_keeps_the_document_and_its_place():
    document = Document("x", "Some text.", uri="https://example.org/x", event_time=None)
    data = document_to_bytes(document)
    (row,) = too_late_letters(data, b"0" * 16, 86_400, 60, 5_000_000).rows.to_pylist()
    assert (row["window"], row["reason"], row["source"]) == ("1970-01-01T00:00:00Z", "too_late", document.uri)
    assert row["key"] == document.key(b"0" * 16)
    assert row["raw"] == data
    assert "1970-01-01T00:00:05Z" in row["message"] and "the 60 s that are allowed" in row["message"]
