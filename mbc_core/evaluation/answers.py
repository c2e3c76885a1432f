"""Answers a question sheet with a language model and scores it: rows with paired intervals, retention.

Needs torch, transformers and peft; no bank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from mbc_core.errors import UsageError
from mbc_core.evaluation.kept_answers import KeptAnswers, made_of
from mbc_core.evaluation.metrics import exact_match, f1, prefix_match
from mbc_core.evaluation.sheet import READS, Adapter, Sheet, Shown
from mbc_core.evaluation.shown_codes import ShownCodes
from mbc_core.evaluation.whole_bank import answer_whole_bank
from mbc_core.reader.aggregate import AggregateReader
from mbc_core.reader.attend import PROJECTOR_FILE, AttendProjector, load_projector
from mbc_core.reader.attend_prompt import answer_attend
from mbc_core.reader.attend_reader import shared_copy
from mbc_core.reader.generate import NEW_TOKENS, answer_prompts
from mbc_core.reader.kv_lora import load_adapter
from mbc_core.reader.language_model import LanguageModel
from mbc_core.reader.prompt import Prompt, PromptFormat

Float64 = NDArray[np.float64]
MAX_PROMPT = 4096
"""Tokens of a prompt at most, if the model reads as many: ten whole passages fit."""


@dataclass(frozen=True, slots=True)
class Adapters:
    """Folders of the adapters that answer; None: the base model as it is for ``own``, otherwise not given."""

    own: Path | None = None
    closed: Path | None = None
    text: Path | None = None
    attend: Path | None = None
    aggregate: Path | None = None

    def has(self, adapter: Adapter) -> bool:
        """Whether reads of this adapter can be answered."""
        return adapter == "own" or self.folder(adapter) is not None

    def folder(self, adapter: Adapter) -> Path | None:
        """Where it lies."""
        return cast("Path | None", getattr(self, adapter))


@dataclass(frozen=True, eq=False)
class Answered:
    """One read with its answers.

    Attributes:
        em, prefix, f1: float64 [questions], per cent of each question.
        prompt_tokens, passages: means a question.
        generate_ms: a question.
    """

    shown: Shown
    predictions: list[str]
    em: Float64
    prefix: Float64
    f1: Float64
    prompt_tokens: float
    passages: float
    generate_ms: float


def answer_sheet(
    sheet: Sheet,
    base: LanguageModel,
    adapters: Adapters,
    *,
    max_prompt: int = MAX_PROMPT,
    batch_tokens: int | None = None,
    kept: KeptAnswers | None = None,
    progress: Callable[[int], None] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Answered]:
    """Answer every read whose adapter is given, in the sheet's order.

    Args:
        base: the language model, without adapter.
        batch_tokens: most tokens of a batch; what suits the device when None.
        kept: answers of an earlier run of this sheet; what is there is not asked again, what is new is added.
        progress: told how many more questions are answered.
        say: told each read when it is done.

    Raises:
        UsageError: the sheet asks nothing.
        ModelError, DamagedFile: an adapter belongs to another model or is damaged.
    """
    chosen = [one for one in sheet.shown if adapters.has(one.adapter) and one.questions]
    if not chosen:
        raise UsageError("there is nothing to answer", value=len(sheet.shown), fix="give a sheet with questions")
    done: dict[int, Answered] = {}
    form = PromptFormat(base.tokenizer)
    asking = (max_prompt, NEW_TOKENS, form.build(["a line"], "A question?", max_prompt).ids)
    for adapter in dict.fromkeys(one.adapter for one in chosen):
        whole = AggregateReader(cast("Path", adapters.aggregate), shared_copy(base)) if adapter == "aggregate" else None
        with adapted(base, adapters.folder(adapter) if whole is None else None) as model:
            projector = _projector(sheet, base, adapters.attend) if adapter == "attend" else None
            for one in (one for one in chosen if one.adapter == adapter):
                name = made_of(sheet, one, base.digest, adapters.folder(adapter), asking) if kept else ""
                told = kept.get(name) if kept else None
                if told is None:
                    told = _answer(sheet, one, model, form, max_prompt, batch_tokens, progress, projector, whole)
                    if kept is not None:
                        kept.add(name, label(one), told)
                elif progress is not None:
                    progress(len(one.questions))
                done[id(one)] = answered = _scored(sheet, one, told)
                say(f"{label(one)}: F1 {answered.f1.mean():.1f}, EM {answered.em.mean():.1f}")
    return [done[id(one)] for one in chosen]


@contextmanager
def adapted(base: LanguageModel, folder: Path | None) -> Iterator[LanguageModel]:
    """``base`` with the adapter of ``folder`` while inside; the base itself for None, and again afterwards."""
    if folder is None:
        yield base
        return
    model, _ = load_adapter(base.model, folder, base_digest=base.digest)
    try:
        yield replace(base, model=model.eval())
    finally:
        model.unload()
        if hasattr(base.model, "peft_config"):
            del base.model.peft_config  # else the next adapter is taken for a second one


def label(shown: Shown) -> str:
    """Unique name of a row: ``recall/default@5``, ``text@5``, ``closed``."""
    profile = f"/{shown.profile}" if shown.profile not in ("-", "text") else ""
    k = f"@{shown.k}" if shown.k else ""
    stream = f" after {shown.documents}" if shown.documents is not None else ""
    return f"{shown.read}{profile}{k}{stream}"


def score(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> Mapping[str, Float64]:
    """Per cent of every question: strict EM, the paper's prefix EM, F1."""
    pairs = list(zip(predictions, answers, strict=True))
    metrics = {"em": exact_match, "prefix": prefix_match, "f1": f1}
    return {name: 100 * np.array([metric(*pair) for pair in pairs]) for name, metric in metrics.items()}


def _answer(
    sheet: Sheet,
    shown: Shown,
    model: LanguageModel,
    form: PromptFormat,
    max_prompt: int,
    batch_tokens: int | None,
    progress: Callable[[int], None] | None,
    projector: AttendProjector | None,
    whole: AggregateReader | None,
) -> dict[str, object]:
    """Predictions and what they cost, as they are kept."""
    room = min(max_prompt, model.context - NEW_TOKENS)
    asked = [sheet.questions[place] for place in shown.questions]
    began = time.perf_counter()
    if whole is not None:
        codes = ShownCodes.from_json(sheet.codes or {})
        predictions = answer_whole_bank(whole, codes, sheet.memory(shown), asked, shown.questions)
        prompts = [Prompt(ids, 0) for ids in whole.prompts(asked)]
        if progress is not None:
            progress(len(asked))
    elif projector is not None and READS[shown.read].store == "address":
        codes = ShownCodes.from_json(sheet.codes or {})
        predictions, prompts = answer_attend(
            model, projector, form, [codes.passages(lines) for lines in sheet.memory(shown)], asked,
            codes.asked(shown.questions), shown.scores, max_tokens=room, batch_tokens=batch_tokens, progress=progress,
        )  # fmt: skip
    else:
        prompts = [form.build(lines, asked[place], room) for place, lines in enumerate(sheet.memory(shown))]
        ids = [one.ids for one in prompts]
        predictions = answer_prompts(model, form, ids, batch_tokens=batch_tokens, progress=progress)
    spent = 1e3 * (time.perf_counter() - began) / len(asked)
    return {
        "predictions": predictions,
        "prompt_tokens": float(np.mean([len(one.ids) for one in prompts])),
        "passages": float(np.mean([one.lines for one in prompts])),
        "generate_ms": spent,
    }


def _projector(sheet: Sheet, base: LanguageModel, folder: Path | None) -> AttendProjector | None:
    """The projector beside attend's adapter; None for a sheet that shows no codes."""
    if folder is None or sheet.codes is None:
        return None
    encoder = str(sheet.codes.get("encoder", ""))
    return load_projector(folder / PROJECTOR_FILE, base_digest=base.digest, encoder=encoder).projector


def _scored(sheet: Sheet, shown: Shown, told: Mapping[str, object]) -> Answered:
    predictions = cast("list[str]", told["predictions"])
    return Answered(
        shown,
        predictions,
        **score(predictions, [sheet.answers[place] for place in shown.questions]),
        prompt_tokens=cast("float", told["prompt_tokens"]),
        passages=cast("float", told["passages"]),
        generate_ms=cast("float", told["generate_ms"]),
    )
