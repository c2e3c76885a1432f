"""The published JSON keys, typed out: scripts of other people rely on them."""

from __future__ import annotations

import pytest

from schemas import results

KEYS = {
    "IngestResult": "ingest_id documents passages duplicates replaced dead_letters windows codebook_version seconds "
    "documents_per_second",
    "AskResult": "question answer read as_of sources milliseconds",
    "Source": "doc_id title event_time score words",
    "AskMilliseconds": "recall generate",
    "InspectResult": "documents passages dead_letters windows bytes bytes_per_passage codebook adapter",
    "VerifiedInspectResult": "documents passages dead_letters windows bytes bytes_per_passage codebook adapter ok "
    "problems",
    "BankBytes": "codes documents replay codebooks adapters other total",
    "BytesPerPassage": "address words codes_table all_in",
    "CodebookFigures": "version K T used perplexity resets",
    "EvalRow": "read profile k em em_low em_high em_prefix f1 f1_low f1_high questions bytes_per_passage "
    "prompt_tokens milliseconds",
    "EvalResult": "rows recall bytes texts retention settings notes",
    "MeasuredRow": "name adapter passages_shown milliseconds_recall milliseconds_generate compared",
    "Compared": "against em em_low em_high f1 f1_low f1_high f1_share f1_share_low f1_share_high",
    "RecallFigures": "profile T bytes passages questions at",
    "RecallAt": "k by_code by_code_low by_code_high by_float share share_low share_high",
    "StoredBytes": "profile passages codebooks",
    "TextBytes": "passages text zstd zstd_dictionary dictionary codes",
    "RetentionRow": "documents questions f1 f1_low f1_high shuffled_f1 closed closed_f1 above_closed above_closed_low "
    "above_closed_high above_shuffled above_shuffled_low above_shuffled_high relative relative_low relative_high "
    "f1_relative f1_relative_low f1_relative_high",
    "AdaptResult": "candidate promoted reason steps seconds before after",
    "AdaptScores": "new_f1 old_f1",
    "ForgetResult": "forgotten not_found receipt",
}


@pytest.mark.parametrize("name", KEYS)
def test_no_key_is_renamed(name):
    annotations = getattr(results, name).__annotations__
    assert set(KEYS[name].split()) <= set(annotations)
