"""`python -m mbc_core.cli eval --from-reads`: the step that runs on a machine with a GPU and little else."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from mbc_core.cli.evaluate import evaluate
from mbc_core.evaluation.sheet import Lines, Sheet, Shown, save_sheet
from mbc_core.reader.language_model import load_language_model
from tests.mbc_core.test_evaluation_attend import write_weights
from tests.mbc_core.tiny_reader import SLOTS, BagOfWords, llama, pieces, tokenizer

ABSENT = ("faiss", "deltalake", "gguf", "apache_beam", "zstandard")

PROGRAM = f"""
import sys
for name in {ABSENT!r}:
    sys.modules[name] = None  # importing it raises ImportError
import torch
torch.set_num_threads(1)
from mbc_core.cli import cli, run
sys.exit(run(cli, sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    llama().save_pretrained(folder / "lm")
    tokenizer().save_pretrained(folder / "lm")
    lines = Lines()
    shown = [
        Shown("closed", "-", 0, [1], [[]], 0.0, 0.0),
        Shown("recall", "default", 1, [1], [lines.places(["Bob Oslo"])], 75.0, 1.5),
        Shown("text-equal", "text", 1, [1], [lines.places(["Bob lives in Oslo."])], 300.0, 1.5),
    ]
    figures = {"recall": [], "bytes": [], "texts": None, "settings": {"qa": "abc"}, "notes": ["from far away"]}
    save_sheet(
        folder / "reads.gz", Sheet(["unasked?", "Where is Bob?"], [["x"], ["Oslo"]], lines.all(), shown, figures)
    )
    return folder


def mbc(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, "eval", *map(str, words), "--device", "cpu"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_a_sheet_is_answered_without_bank_beam_or_faiss(place):
    done = mbc("--from-reads", place / "reads.gz", "--lm", place / "lm", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [row["name"] for row in result["rows"]] == ["closed", "recall/default@1"], "no rival was given"
    assert result["notes"] == ["from far away"] and result["settings"]["qa"] == "abc"
    assert (result["settings"]["lm"], result["settings"]["adapter"]) == ("lm", None)
    assert "2 answers by lm, adapter none, on cpu" in done.stderr


def test_codes_on_a_sheet_are_attended_to_and_missing_weights_are_told(place, tmp_path):
    from mbc_core.evaluation.shown_codes import ShownCodes

    rotation, codebook = pieces()
    encoder = BagOfWords()
    codes = ShownCodes(
        encoder.encoder_id, SLOTS, rotation, {0: codebook.codewords}, {0: 0}, encoder.encode_questions(["Who?"])
    )
    line = f"0:{bytes(27).hex()}"
    shown = [Shown("attend", "T24", 1, [0], [[0]], 27.0, 1.0), Shown("closed", "-", 0, [0], [[]], 0.0, 0.0)]
    save_sheet(tmp_path / "codes.gz", Sheet(["Who?"], [["x"]], [line], shown, {}, codes.to_json()))
    base = load_language_model(place / "lm")
    weights = write_weights(tmp_path / "attend", base=base)
    told = ("--from-reads", tmp_path / "codes.gz", "--lm", place / "lm")
    done = mbc(*told, "--attend", weights, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [(row["name"], row["bytes_per_passage"]) for row in result["rows"]] == [
        ("attend/T24@1", 27.0),
        ("closed", 0.0),
    ]
    assert result["settings"]["attend"] == str(weights)
    (weights / "projector.safetensors").unlink()
    done = mbc(*told, "--attend", weights)
    assert done.returncode == 1 and "there are no weights for the read `attend`" in done.stderr


def test_weights_of_attend_are_not_looked_at_for_a_sheet_without_its_rows(place, monkeypatch):
    def broken(**given):
        raise AssertionError("looked at")

    monkeypatch.setattr("mbc_core.defaults.attend_weights", broken)
    told = ["--from-reads", str(place / "reads.gz"), "--lm", str(place / "lm"), "--device", "cpu"]
    evaluate.main([*told, "--json"], standalone_mode=False)
    with pytest.raises(AssertionError, match="looked at"):
        evaluate.main([*told, "--attend", str(place)], standalone_mode=False)


def test_a_damaged_sheet_and_a_missing_model_say_so(place, tmp_path):
    (tmp_path / "broken.gz").write_bytes(b"no gzip")
    done = mbc("--from-reads", tmp_path / "broken.gz", "--lm", place / "lm")
    assert done.returncode == 1 and "the question sheet cannot be read" in done.stderr and done.stdout == ""
    done = mbc("--qa", tmp_path / "none.jsonl")
    assert done.returncode == 2 and "the QA file cannot be read" in done.stderr
