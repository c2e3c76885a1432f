"""A running reader follows promotions and rollbacks: whole adapters only, one base, and the old one when one is bad."""

from __future__ import annotations

import itertools
import json
import logging
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from tiny_reader import BagOfWords, documents, language_model, lexicon, make_bank, pieces

from mbc_core import answering, defaults
from mbc_core.adapters import AdapterRegistry
from mbc_core.answering import Reader
from mbc_core.memory import Memory
from mbc_core.reader import generate
from mbc_core.reader.kv_lora import KVLoraConfig, add_kv_lora, save_adapter, trainable

pytestmark = pytest.mark.usefixtures("single_thread")
DOCS = documents(12)
QUESTIONS = [one.question for one in DOCS[:6]]


@pytest.fixture(autouse=True)
def nothing_shipped(monkeypatch):
    monkeypatch.setattr(defaults, "reader_adapter", lambda: None)


@pytest.fixture
def opened(tmp_path) -> Memory:
    bank = make_bank(tmp_path / "bank", DOCS)
    return Memory.open(bank, BagOfWords(), lexicon=lexicon(), rotation=pieces()[0])


@pytest.fixture
def registry(opened) -> AdapterRegistry:
    return AdapterRegistry(opened.bank)


def folder_of(folder: Path, seed: int, r: int = 2, kind: str = "llama", digest: str | None = None) -> Path:
    base, config = language_model(kind), KVLoraConfig(r=r, alpha=32 * r)
    adapted = add_kv_lora(base.model, config, seed=seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in trainable(adapted).values():
            weight.add_(torch.randn_like(weight))
    save_adapter(adapted, folder, config, base_digest=digest or base.digest, base_name=base.name)
    return folder


def add(registry: AdapterRegistry, folder: Path) -> str:
    return registry.save_candidate_folder(folder, {}, language_model().digest)


def reader_of(opened: Memory, **options) -> Reader:
    return Reader(opened, language_model=language_model(), **({"refresh": 0.0} | options))


def told(reader: Reader) -> list[str]:
    return [one.answer for one in reader.ask_many(QUESTIONS, k=2)]


def weights(reader: Reader) -> dict[str, int]:
    """Where the base's own tensors lie in memory."""
    named = reader.language_model.model.named_parameters()
    plain = {name.replace("base_model.model.", "").replace(".base_layer", ""): one for name, one in named}
    return {name: one.data_ptr() for name, one in plain.items() if "lora_" not in name}


def test_a_reader_follows_promotions_and_rollbacks_without_loading_its_base_again(
    opened, registry, tmp_path, monkeypatch
):
    loads = []
    monkeypatch.setattr(defaults, "language_model", lambda device: loads.append(1) or language_model())
    reader = Reader(opened, refresh=0.0)
    plain, where, before = told(reader), weights(reader), language_model().model.state_dict()
    assert reader.adapter is None
    one, two = (add(registry, folder_of(tmp_path / name, seed)) for seed, name in enumerate("ab"))
    wider = add(registry, folder_of(tmp_path / "c", 3, r=5))
    expected = {None: plain}
    for version in (one, two, wider):
        registry.promote(version, "better")
        expected[version] = told(Reader(opened, language_model=language_model()))
        assert told(reader) == expected[version] and reader.adapter == version
    assert len({tuple(answers) for answers in expected.values()}) == 4
    for version in (two, one, None):
        assert registry.rollback(language_model().digest, "worse") == version
        assert told(reader) == expected[version] and reader.adapter == version
    assert weights(reader) == where and loads == [1]
    now = reader.language_model.model.state_dict()
    assert now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)


def test_threads_that_ask_while_adapters_change_get_whole_answers_of_one_of_them(opened, registry, tmp_path):
    one, two = (add(registry, folder_of(tmp_path / name, seed)) for seed, name in enumerate("ab"))
    expected = {}
    for version in (one, two):
        registry.promote(version, "better")
        expected[version] = tuple(told(Reader(opened, language_model=language_model())))
    assert expected[one] != expected[two]
    reader, ended = reader_of(opened), threading.Event()
    where, found, errors = weights(reader), [], []

    def ask() -> None:
        try:
            while not ended.is_set():
                found.append(tuple(told(reader)))
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for turn in range(12):
        if turn % 2:
            registry.promote(two, "again")
        else:
            registry.rollback(language_model().digest, "worse")
        seen, until = len(found), time.monotonic() + 30
        while len(found) < seen + 3 and not errors and time.monotonic() < until:
            time.sleep(0.005)
    ended.set()
    for thread in threads:
        thread.join(30)
    assert errors == []
    assert set(found) == set(expected.values()), "both were seen, and never a mixture"
    changes = sum(before != after for before, after in itertools.pairwise(found))
    assert changes >= 6 and weights(reader) == where


def test_a_new_adapter_reads_from_the_next_batch_on(opened, registry, tmp_path, monkeypatch):
    one, two = (add(registry, folder_of(tmp_path / name, seed)) for seed, name in enumerate("ab"))
    registry.promote(one, "better")
    reader = reader_of(opened)
    first = told(reader)
    answer, batches = generate.answer_prompts, []

    def promoting(*args, **options):
        batches.append(len(args[2]))
        if len(batches) == 2:
            registry.promote(two, "better")  # while this batch is being answered
        return answer(*args, **options)

    monkeypatch.setattr(generate, "answer_prompts", promoting)
    monkeypatch.setattr(answering, "_BATCH", 2)
    found = told(reader)
    monkeypatch.setattr(generate, "answer_prompts", answer)
    assert batches == [2, 2, 2]
    assert found == first[:4] + told(reader)[4:] and reader.adapter == two


def test_a_damaged_adapter_is_told_once_and_the_old_one_goes_on(opened, registry, tmp_path):
    one, two = (add(registry, folder_of(tmp_path / name, seed)) for seed, name in enumerate("ab"))
    registry.promote(one, "better")
    warnings: list[str] = []
    reader = reader_of(opened, warn=warnings.append)
    first = told(reader)
    path = tmp_path / "bank" / "adapters" / two / "adapter_model.safetensors"
    whole = path.read_bytes()
    registry.promote(two, "better")
    path.write_bytes(whole[:-3])
    assert [told(reader) for _ in range(3)] == [first] * 3 and reader.adapter == one
    assert len(warnings) == 1 and f"adapter {two} cannot be used, {one} goes on reading" in warnings[0]
    assert "does not match its digest" in warnings[0]
    assert not reader.refresh() and len(warnings) == 1, "asked to look again, it is not told again"
    path.write_bytes(whole)
    assert told(reader) == first, "not tried again at once by itself"
    assert reader.refresh() and reader.adapter == two and told(reader) != first


def other_weights(folder: Path) -> Path:
    """Whole files, the right base, but weights that fit no projection: found only when they are put on."""
    path = folder / "adapter_model.safetensors"
    tensors = {name: value[..., :1].contiguous() for name, value in load_file(path).items()}
    from safetensors import safe_open

    with safe_open(path, "pt") as stored:
        metadata = stored.metadata()
    path.write_bytes(save(tensors, metadata=metadata))
    return folder


@pytest.mark.parametrize("fault", ["another base", "other weights", "no store"])
def test_whatever_is_wrong_with_the_new_adapter_the_old_one_stays_bit_for_bit(
    opened, registry, tmp_path, monkeypatch, caplog, fault
):
    one = add(registry, folder_of(tmp_path / "a", 0))
    registry.promote(one, "better")
    reader = reader_of(opened)
    first, where = told(reader), weights(reader)
    adapter = {name: value.clone() for name, value in reader.language_model.model.named_parameters() if "lora" in name}
    if fault == "another base":
        bad = add(registry, folder_of(tmp_path / "b", 1, digest="e" * 64))
    else:
        bad = add(registry, other_weights(folder_of(tmp_path / "b", 1)))
    registry.promote(bad, "better")
    if fault == "no store":

        def refused(*arguments):
            raise PermissionError("no more")

        monkeypatch.setattr(AdapterRegistry, "live", refused)
    with caplog.at_level(logging.WARNING):
        assert told(reader) == first and reader.adapter == one
    assert len(caplog.records) == 1 and "goes on reading" in caplog.text
    now = {name: value for name, value in reader.language_model.model.named_parameters() if "lora" in name}
    assert now.keys() == adapter.keys() and all(torch.equal(now[name], adapter[name]) for name in adapter)
    assert weights(reader) == where


def test_a_bad_first_promotion_leaves_the_base_alone(opened, registry, tmp_path):
    warnings: list[str] = []
    reader = reader_of(opened, warn=warnings.append)
    plain = told(reader)
    registry.promote(add(registry, other_weights(folder_of(tmp_path / "b", 1))), "better")
    assert told(reader) == plain and reader.adapter is None and len(warnings) == 1


def test_looks_at_the_registry_are_as_far_apart_as_asked(opened, registry, tmp_path):
    reader = reader_of(opened, refresh=3600.0)
    plain = told(reader)
    registry.promote(add(registry, folder_of(tmp_path / "a", 0)), "better")
    assert told(reader) == plain and reader.adapter is None
    assert reader.refresh() and told(reader) != plain


def test_a_given_adapter_or_moment_is_never_replaced(opened, registry, tmp_path):
    from datetime import UTC, datetime

    given = folder_of(tmp_path / "given", 4)
    readers = [reader_of(opened, adapter=given), reader_of(opened, as_of=datetime.now(UTC))]
    before = [(told(one), one.adapter) for one in readers]
    registry.promote(add(registry, folder_of(tmp_path / "a", 0)), "better")
    assert [one.refresh() for one in readers] == [False, False]
    assert [(told(one), one.adapter) for one in readers] == before


@pytest.mark.slow
def test_a_process_that_goes_on_answers_with_what_another_process_promotes(opened, registry, tmp_path):
    script = str(Path(__file__).with_name("live_reader.py"))
    versions = [add(registry, folder_of(tmp_path / name, seed)) for seed, name in enumerate("ab")]
    with subprocess.Popen(
        [sys.executable, script, opened.bank.uri], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def ask() -> dict:
            process.stdin.write(QUESTIONS[1] + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        assert process.stdout.readline() == "ready\n"
        answers = [ask()]
        for version in versions:
            registry.promote(version, "better")
            answers.append(ask())
        registry.rollback(language_model().digest, "worse")
        answers.append(ask())
        process.stdin.close()
        assert process.wait(60) == 0
    assert [one["adapter"] for one in answers] == [None, *versions, versions[0]]
    assert answers[1]["answer"] == answers[3]["answer"] != answers[2]["answer"]
    assert all(one["warnings"] == [] for one in answers)
