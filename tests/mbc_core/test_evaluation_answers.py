"""A sheet is answered by the right adapter for each read, the same way every time; adapters leave no trace."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mbc_core.errors import ModelError, StorageError, UsageError
from mbc_core.evaluation import answers as answers_module
from mbc_core.evaluation.answers import Adapters, adapted, answer_sheet, label, score
from mbc_core.evaluation.kept_answers import KeptAnswers
from mbc_core.evaluation.metrics import exact_match, f1, prefix_match
from mbc_core.evaluation.sheet import Lines, Sheet, Shown
from mbc_core.reader.generate import answer_prompts
from mbc_core.reader.kv_lora import KVLoraConfig, add_kv_lora, save_adapter, trainable
from mbc_core.reader.language_model import LanguageModel
from tests.mbc_core.tiny_reader import language_model

pytestmark = pytest.mark.usefixtures("single_thread")

IDS = torch.tensor([[5, 9, 200, 31, 77, 12]])


def write_adapter(folder: Path, kind: str, seed: int, rank: int = 4) -> Path:
    """A random adapter that changes answers."""
    base = language_model(kind)
    config = KVLoraConfig(r=rank, alpha=2 * rank, dropout=0.0)
    model = add_kv_lora(base.model, config, seed=seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in trainable(model).items():
            if "lora_B" in name:
                rows = slice(weight.shape[0] // 3, None) if kind == "gpt2" else slice(None)
                weight[rows] = torch.randn_like(weight[rows])
    save_adapter(model, folder, config, base_digest=base.digest, base_name=base.name)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("adapters")
    return {name: write_adapter(place / name, "llama", seed, rank=seed + 2) for seed, name in enumerate("abc")}


@pytest.fixture
def sheet() -> Sheet:
    lines = Lines()
    both = [lines.places(["Ann Rome", "Bob Oslo"]), lines.places(["Bob Oslo"])]
    shown = [
        Shown("closed", "-", 0, [0, 1], [[], []], 0.0, 0.0),
        Shown("recall", "default", 2, [0, 1], both, 75.0, 1.5),
        Shown("closed-equal", "-", 0, [0, 1], [[], []], 0.0, 0.0),
        Shown("text-equal", "text", 2, [0, 1], both, 300.0, 1.5),
        Shown("right-text", "text", 1, [0, 1], [one[:1] for one in both], 300.0, 0.0),
    ]
    return Sheet(["Where is Ann?", "Where is Bob?"], [["Rome"], ["Oslo", "x"]], lines.all(), shown)


def test_a_run_that_was_cut_off_goes_on_where_it_stopped(sheet, folders, tmp_path, monkeypatch):
    base = language_model("llama")
    adapters = Adapters(folders["a"], folders["b"], folders["c"])
    whole = answer_sheet(sheet, base, adapters)
    path = tmp_path / "answers.jsonl"
    asked: list[int] = []

    def cut_off_after_two(model, form, ids, **options):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(ids))
        return answer_prompts(model, form, ids, **options)

    monkeypatch.setattr(answers_module, "answer_prompts", cut_off_after_two)
    with pytest.raises(KeyboardInterrupt):
        answer_sheet(sheet, base, adapters, kept=KeptAnswers(path))
    with path.open("a") as stream:
        stream.write('{"made_of": "cut sh')  # the line that was being written
    asked.clear()
    monkeypatch.setattr(answers_module, "answer_prompts", lambda *a, **o: asked.append(1) or answer_prompts(*a, **o))
    told: list[int] = []
    again = answer_sheet(sheet, base, adapters, kept=KeptAnswers(path), progress=told.append)
    assert len(asked) == 3 and sum(told) == 10, "three of five reads are asked, all ten answers are told"
    assert [one.predictions for one in again] == [one.predictions for one in whole]
    assert [one.f1.tolist() for one in again] == [one.f1.tolist() for one in whole]
    asked.clear()
    answer_sheet(sheet, base, adapters, kept=KeptAnswers(path))
    assert not asked
    answer_sheet(sheet, base, Adapters(folders["b"], folders["b"], folders["c"]), kept=KeptAnswers(path))
    assert len(asked) == 3, "another adapter's answers are not taken for this one's"


def test_a_file_of_something_else_is_refused(tmp_path):
    with pytest.raises(StorageError, match="the file of kept answers cannot be used"):
        KeptAnswers(tmp_path)


def logits(model: LanguageModel) -> torch.Tensor:
    with torch.no_grad():
        return model.model(input_ids=IDS).logits


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_adapter_is_put_on_and_taken_off_without_a_trace(kind, tmp_path):
    base = language_model(kind)
    first, second = (write_adapter(tmp_path / str(seed), kind, seed, rank=seed + 3) for seed in (1, 2))
    before = logits(base)
    seen = []
    for folder in (first, second, first):
        with adapted(base, folder) as model:
            seen.append(logits(model))
            assert not torch.equal(seen[-1], before)
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])
    with adapted(base, None) as model:
        assert model is base and torch.equal(logits(model), before)
    assert not any("lora" in name for name, _ in base.model.named_parameters())


def test_an_adapter_of_another_model_is_refused(folders):
    base = language_model("llama", seed=1)
    with pytest.raises(ModelError, match="trained for another base model"), adapted(base, folders["a"]):
        pass
    assert not any("lora" in name for name, _ in base.model.named_parameters())


@pytest.fixture
def asked(monkeypatch):
    """Which adapter answered which prompts; an answer is the prompt's first line."""
    told: list[tuple[float, list[str]]] = []

    def answer(model, form, prompts, *, batch_tokens, progress):
        texts = [form.tokenizer.decode(ids) for ids in prompts]
        told.append((float(logits(model).sum()), texts))
        if progress is not None:
            progress(len(prompts))
        return [text.splitlines()[0].strip() for text in texts]

    monkeypatch.setattr(answers_module, "answer_prompts", answer)
    return told


def mark(folder: Path | None) -> float:
    with adapted(language_model(), folder) as model:
        return float(logits(model).sum())


def test_each_read_is_answered_by_its_adapter_in_the_sheets_order(sheet, folders, asked):
    given = Adapters(own=folders["a"], closed=folders["b"], text=folders["c"])
    counted: list[int] = []
    said: list[str] = []
    found = answer_sheet(sheet, language_model(), given, progress=counted.append, say=said.append)
    assert [one.shown for one in found] == sheet.shown
    who = {name: mark(folders[name]) for name in "abc"}
    assert [told[0] for told in asked] == [who[name] for name in "aaabc"], "one change of adapter for each"
    assert sum(counted) == 10 and len(said) == 5
    assert asked[1][1] == [
        " Ann Rome\n Bob Oslo\nQuestion: Where is Ann?\nAnswer:",
        " Bob Oslo\nQuestion: Where is Bob?\nAnswer:",
    ]
    recall = found[1]
    assert recall.predictions == ["Ann Rome", "Bob Oslo"]
    assert recall.f1.tolist() == pytest.approx([100 * 2 / 3, 100 * 2 / 3]) and recall.em.tolist() == [0, 0]
    assert (recall.passages, found[0].passages) == (1.5, 0)
    assert recall.prompt_tokens == np.mean([len(text) for text in asked[1][1]])


def test_reads_whose_adapter_is_not_given_are_left_out(sheet, folders, asked):
    found = answer_sheet(sheet, language_model(), Adapters(text=folders["c"]))
    assert [one.shown.read for one in found] == ["closed", "recall", "text-equal", "right-text"]
    assert [told[0] for told in asked] == [mark(None)] * 3 + [mark(folders["c"])]
    only = Sheet(sheet.questions, sheet.answers, sheet.lines, [sheet.shown[2]])
    with pytest.raises(UsageError, match="there is nothing to answer"):
        answer_sheet(only, language_model(), Adapters())


def test_passages_go_before_the_question_when_room_is_short(sheet, asked):
    room = len(" Bob Oslo\nQuestion: Where is Bob?\nAnswer:")
    found = answer_sheet(sheet, language_model(), Adapters(), max_prompt=room)
    assert found[1].passages == 1.0, "one of two lines for Ann, the one line for Bob"
    assert all(text.endswith("?\nAnswer:") for _, texts in asked for text in texts)


def test_the_real_loop_is_deterministic(sheet, folders):
    given = Adapters(own=folders["a"], closed=folders["b"], text=folders["c"])
    base = language_model()
    first, second = (answer_sheet(sheet, base, given) for _ in range(2))
    assert [one.predictions for one in first] == [one.predictions for one in second]
    assert len({tuple(one.predictions) for one in first}) > 1
    assert all(one.generate_ms > 0 for one in first)


def test_scores_are_the_metrics_in_per_cent():
    said, given = ["Rome", "Parisian", "in Oslo"], [["Rome"], ["Paris"], ["x", "Oslo"]]
    found = score(said, given)
    for name, metric in (("em", exact_match), ("prefix", prefix_match), ("f1", f1)):
        assert found[name].tolist() == [100 * metric(*pair) for pair in zip(said, given, strict=True)]
    assert found["prefix"].tolist() == [100, 100, 0] and found["em"].tolist() == [100, 0, 0]


def test_labels_are_unique_names():
    told = [
        label(Shown(read, profile, k, [], [], 0, 0, documents))
        for read, profile, k, documents in (
            ("recall", "rich", 5, None), ("text", "text", 1, None), ("closed", "-", 0, None),
            ("recall", "rich", 5, 400),
        )
    ]  # fmt: skip
    assert told == ["recall/rich@5", "text@1", "closed", "recall/rich@5 after 400"]
