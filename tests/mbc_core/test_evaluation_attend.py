"""The attend read in an evaluation: a sheet carries codes, and is answered from them where no bank is."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mbc_core.bank import Bank
from mbc_core.codes import decode, quantize, to_slots
from mbc_core.errors import DamagedFile, IncompatibleBank
from mbc_core.evaluation.answers import Adapters, answer_sheet
from mbc_core.evaluation.asking import Wanted
from mbc_core.evaluation.kept_answers import KeptAnswers
from mbc_core.evaluation.protocols import sheet_of_banks
from mbc_core.evaluation.sheet import Sheet, Shown, load_sheet, save_sheet
from mbc_core.evaluation.shown_codes import ShownCodes, address_lines
from mbc_core.reader.attend import PROJECTOR_FILE, AttendConfig, AttendProjector, load_projector, save_projector
from mbc_core.reader.attend_prompt import answer_attend
from mbc_core.reader.kv_lora import KVLoraConfig, add_kv_lora, load_adapter, save_adapter
from mbc_core.reader.language_model import LanguageModel
from mbc_core.reader.prompt import PromptFormat
from tests.mbc_core.qa_bank import memory_of, qa_set
from tests.mbc_core.tiny_reader import SLOTS, WIDTH, BagOfWords, language_model, pieces

pytestmark = pytest.mark.usefixtures("single_thread")

QA = qa_set()
READS = ("closed", "attend-closed", "attend-shuffled", "attend", "attend-right")


def write_weights(
    folder: Path, encoder: str = BagOfWords.encoder_id, seed: int = 0, base: LanguageModel | None = None
) -> Path:
    """An adapter and a projector with random weights."""
    base = base or language_model()
    config = KVLoraConfig(r=2, alpha=4)
    save_adapter(add_kv_lora(base.model, config), folder, config, base_digest=base.digest, base_name=base.name)
    torch.manual_seed(seed)
    words = torch.nn.functional.normalize(torch.randn(40, WIDTH), dim=1)
    made = AttendProjector(
        AttendConfig(WIDTH, 32, 40, answers=2, topics=1, hidden=24), words, torch.randint(0, 256, (40, 2))
    )
    save_projector(folder / PROJECTOR_FILE, made, base_digest=base.digest, encoder=encoder, rotation="")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_weights(tmp_path_factory.mktemp("attend"))


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    return memory_of(tmp_path_factory.mktemp("banks") / "bank", QA, "default")


@pytest.fixture(scope="module")
def sheet(memory) -> Sheet:
    return sheet_of_banks(QA, {"default": memory}, BagOfWords(), Wanted(reads=READS, ks=(3, 1)))


def one(sheet: Sheet, read: str, k: int) -> Shown:
    (found,) = [shown for shown in sheet.shown if (shown.read, shown.k) == (read, k)]
    return found


def test_a_line_is_the_address_as_the_bank_stores_it(sheet, memory):
    addresses = memory.passages["address"].to_pylist()
    assert all(len(address) == 27 for address in addresses)
    lines = address_lines(memory)
    assert [bytes.fromhex(line.partition(":")[2]) for line in lines] == addresses
    found = memory.recall([question.question for question in QA.questions], 3, rerank=False)
    names = memory.passages["doc_id"].to_pylist()
    assert sheet.memory(one(sheet, "attend", 3)) == [
        [lines[names.index(two.doc_id)] for two in recalled] for recalled in found
    ]
    answering = [QA.documents[question.document].doc_id for question in QA.questions]
    assert sheet.memory(one(sheet, "attend-right", 1)) == [[lines[names.index(name)]] for name in answering]
    for shown, name in zip(sheet.memory(one(sheet, "attend-shuffled", 3)), answering, strict=True):
        assert len(set(shown)) == 3 and lines[names.index(name)] not in shown
    assert {shown.bytes_per_passage for shown in sheet.shown if shown.k} == {27.0}
    assert {shown.profile for shown in sheet.shown if shown.k} == {f"T{SLOTS}"}


def test_lines_decode_to_the_vectors_that_were_quantized(sheet):
    rotation, codebook = pieces()
    texts = BagOfWords().encode([document.text for document in QA.documents])
    embeddings = np.stack([encoded.embedding for encoded in texts])
    codes = quantize(to_slots(embeddings, rotation, SLOTS), codebook.codewords)
    expected = decode(codes, codebook.codewords) @ rotation.matrix
    shown = ShownCodes.from_json(json.loads(json.dumps(sheet.codes)))
    found = shown.passages([line for (line,) in sheet.memory(one(sheet, "attend-right", 1))])
    assert found == pytest.approx(expected, abs=1e-6)
    asked = BagOfWords().encode_questions([question.question for question in QA.questions])
    assert shown.asked([2, 0]) == pytest.approx(asked[[2, 0]], abs=1e-3), "half precision"
    assert shown.encoder == BagOfWords.encoder_id


def test_each_line_is_read_with_the_codebook_it_names(sheet):
    shown = ShownCodes.from_json(sheet.codes or {})
    (version,) = shown.codebooks
    lines = [line for (line,) in sheet.memory(one(sheet, "attend-right", 1))][:2]
    two = replace(shown, codebooks={**shown.codebooks, 7: -shown.codebooks[version]})
    other = lines[1].replace(f"{version}:", "7:")
    plain, turned = shown.passages(lines), two.passages([lines[0], other])
    assert turned == pytest.approx(np.stack([plain[0], -plain[1]]), abs=1e-6)
    with pytest.raises(DamagedFile, match="a question sheet's address cannot be read"):
        shown.passages([other])
    with pytest.raises(DamagedFile, match="a question sheet's address cannot be read"):
        shown.passages(["0:xyz"])
    with pytest.raises(DamagedFile, match="lacks a question's vector"):
        shown.asked([99])


def test_a_sheet_from_disk_is_answered_as_the_bank_would_be(sheet, memory, weights, tmp_path):
    save_sheet(tmp_path / "sheet.gz", sheet)
    told = load_sheet(tmp_path / "sheet.gz")
    assert told == sheet
    answered = {
        (row.shown.read, row.shown.k): row for row in answer_sheet(told, language_model(), Adapters(attend=weights))
    }
    assert set(answered) == {(shown.read, shown.k) for shown in sheet.shown}
    questions = [question.question for question in QA.questions]
    embeddings = BagOfWords().encode_questions(questions).astype(np.float16).astype(np.float32)
    scores, rows = memory.search(embeddings, 3)
    shown = ShownCodes.from_json(sheet.codes or {})
    base = language_model()
    model = replace(base, model=load_adapter(base.model, weights)[0].eval())
    projector = load_projector(weights / PROJECTOR_FILE).projector
    lines = address_lines(memory)
    vectors = [shown.passages([lines[row] for row in found]) for found in rows]
    expected, prompts = answer_attend(
        model, projector, PromptFormat(base.tokenizer), vectors, questions, embeddings, scores.tolist()
    )
    assert answered["attend", 3].predictions == expected
    assert answered["attend", 3].passages == 3 and answered["attend", 3].prompt_tokens == np.mean(
        [len(prompt.ids) for prompt in prompts]
    )
    assert answered["attend-closed", 0].passages == 0
    assert len({tuple(row.predictions) for row in answered.values()}) > 2


def test_passages_of_several_carry_the_scores_they_were_found_with(sheet, memory, tmp_path):
    """A shuffled passage has the say of the one it stands for; one passage needs no score."""
    scores, _ = memory.search(BagOfWords().encode_questions([question.question for question in QA.questions]), 3)
    for read in ("attend", "attend-shuffled"):
        assert one(sheet, read, 3).scores == pytest.approx(scores, abs=1e-5)
        assert one(sheet, read, 1).scores is None
    assert one(sheet, "attend-right", 1).scores is None and one(sheet, "closed", 0).scores is None
    kept = one(sheet, "attend", 3)
    assert kept.fields()["scores"] == kept.scores and "scores" not in one(sheet, "closed", 0).fields()
    path = tmp_path / "sheet.gz"
    save_sheet(path, replace(sheet, shown=[replace(kept, scores=[[1.0]] * len(kept.lines))]))
    with pytest.raises(DamagedFile, match="has other scores than lines"):
        load_sheet(path)


def test_a_sheet_without_scores_is_read_in_one_prompt(sheet, weights):
    """As releases wrote it that knew none."""
    old = replace(sheet, shown=[replace(one(sheet, "attend", 3), scores=None)])
    (whole,) = answer_sheet(old, language_model(), Adapters(attend=weights))
    (apart,) = answer_sheet(replace(sheet, shown=[one(sheet, "attend", 3)]), language_model(), Adapters(attend=weights))
    assert whole.prompt_tokens < apart.prompt_tokens and whole.passages == apart.passages == 3
    assert whole.predictions != apart.predictions


def test_kept_answers_belong_to_these_codes_and_these_weights(sheet, weights, tmp_path):
    only = replace(sheet, shown=[one(sheet, "attend", 1)])
    path = tmp_path / "kept.jsonl"
    answer_sheet(only, language_model(), Adapters(attend=weights), kept=KeptAnswers(path))
    answer_sheet(only, language_model(), Adapters(attend=weights), kept=KeptAnswers(path))
    assert len(path.read_text().splitlines()) == 1
    other = write_weights(tmp_path / "other", seed=1)
    answer_sheet(only, language_model(), Adapters(attend=other), kept=KeptAnswers(path))
    changed = replace(only, codes=(only.codes or {}) | {"more": 1})
    answer_sheet(changed, language_model(), Adapters(attend=weights), kept=KeptAnswers(path))
    assert len(path.read_text().splitlines()) == 3


def test_a_sheet_without_its_codebooks_and_weights_for_another_encoder_are_refused(sheet, tmp_path):
    path = tmp_path / "sheet.gz"
    save_sheet(path, sheet)
    fields = json.loads(gzip.decompress(path.read_bytes()))
    del fields["codes"]
    path.write_bytes(gzip.compress(json.dumps(fields).encode()))
    with pytest.raises(DamagedFile, match="lacks the codebooks"):
        load_sheet(path)
    with pytest.raises(DamagedFile, match="the codes of a question sheet cannot be read"):
        ShownCodes.from_json({"slots": 24})
    foreign = write_weights(tmp_path / "foreign", "another-model@1/float32/rule")
    with pytest.raises(IncompatibleBank, match="another encoder"):
        answer_sheet(sheet, language_model(), Adapters(attend=foreign))


def test_banks_of_other_profiles_share_the_rows(tmp_path):
    memories = {name: memory_of(tmp_path / name, QA, name) for name in ("compact", "default")}
    made = sheet_of_banks(QA, memories, BagOfWords(), Wanted(reads=("attend", "recall"), ks=(2,)))
    assert [(shown.read, shown.profile) for shown in made.shown] == [
        ("recall", "compact"), ("recall", "default"), ("attend", f"T{SLOTS}")
    ]  # fmt: skip
    assert Bank.open(tmp_path / "compact").manifest.slots == SLOTS
