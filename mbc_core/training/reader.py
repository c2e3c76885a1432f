"""Trains KV-LoRA v0: the adapter that lets a frozen language model read telegraphic memory lines; and its rivals."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mbc_core.codebook.files import Codebook
from mbc_core.codes import Rotation
from mbc_core.evaluation.addresses import AddressIndex
from mbc_core.evaluation.reads import DEFAULT_READS, Read, ReadSet, evaluate_reads
from mbc_core.lexicon import Lexicon
from mbc_core.query_map import QueryMap
from mbc_core.reader.kv_lora import KVLoraConfig, add_kv_lora, save_adapter
from mbc_core.reader.language_model import LanguageModel
from mbc_core.reader.prompt import PromptFormat
from mbc_core.training.batches import MicroBatch, micro_batches, steps_of
from mbc_core.training.loop import Schedule, Trainer, load_checkpoint
from mbc_core.training.memory_need import Shape, training_memory
from mbc_core.training.pools import train_pools
from mbc_core.training.prepared import Prepared, load_prepared
from mbc_core.training.rivals import CLOSED_READS, SAYS, TEXT_READS, memory_of
from mbc_core.training.samples import Mixture, SampleSource, build_source, distractors

_POOL_STEPS = 16
_SEARCHED = 25
_MAX_EVALUATED_TOKENS = 2048  # five whole passages fit
_QUICK_READS = (Read("closed", 0, None), Read("recall", 5, 24))


@dataclass(frozen=True, slots=True)
class ReaderRun:
    """Size and speed of a run.

    Attributes:
        steps, minutes: the whole run ends at whichever comes first; minutes are of training alone.
        call_minutes: stop after so many minutes of training in this call and leave a checkpoint to resume from.
        batch: samples a step.
        batch_tokens: padded tokens of one forward pass; bounds memory.
        evaluate_every: share of the run between two looks at the held-out questions.
        evaluate_questions: questions of a look (all the final figures use).
        mixture: what samples show; :func:`mbc_core.training.rivals.mixture_of` makes those of the rivals.
    """

    steps: int | None = None
    minutes: float | None = 5.0
    call_minutes: float | None = None
    batch: int = 256
    batch_tokens: int = 32_768
    lr: float = 7e-4
    seed: int = 0
    compile_layers: bool = True
    evaluate_every: float = 0.34
    evaluate_questions: int = 400
    kv_lora: KVLoraConfig = field(default_factory=KVLoraConfig)
    mixture: Mixture = field(default_factory=Mixture)


def train_reader(
    prepared_dir: Path,
    lexicon: Lexicon,
    codebook: Codebook,
    rotation: Rotation,
    language_model: LanguageModel,
    out_dir: Path,
    run: ReaderRun,
    *,
    targets: Sequence[str] | None = None,
    evaluate: Mapping[str, Path] | None = None,
    query_map: QueryMap | None = None,
    resume: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, object]:
    """Train, evaluate and write the adapter with its card.

    Args:
        prepared_dir: what ``mbc train prepare`` wrote; its ``dev`` passages are held out.
        codebook: address codes for distractors and held-out recall.
        language_model: the base, without adapter; it is adapted in place.
        out_dir: gets ``adapter_model.safetensors``, ``adapter_config.json``, ``card.json``, ``curve.jsonl`` and,
            while the run lasts, ``checkpoint/``.
        targets: last names of the key and value projections, when they cannot be guessed.
        evaluate: name → prepared folder of further question sets, read at the end.
        query_map: how questions are put to the codes; None: the plain score.
        resume: take up the checkpoint in ``out_dir`` when there is one.

    Returns:
        the card; ``finished`` is False when ``call_minutes`` ended this call early.

    Raises:
        DamagedFile: the prepared data or the checkpoint cannot be read.
        ModelError: the projections cannot be found.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    data = load_prepared(prepared_dir)
    say(f"loaded {len(data):,} passages, {len(data.questions):,} questions")
    shape = Shape.of(language_model.model.config)
    say(str(training_memory(shape, batch_tokens=run.batch_tokens, rank=run.kv_lora.r)))
    form = PromptFormat(language_model.tokenizer)
    device = language_model.device
    slots = rotation.width // codebook.width

    def searched(passages: NDArray[np.float32]) -> AddressIndex:
        return AddressIndex(passages, rotation, codebook.codewords, slots, device, query_map)

    train = data.split("train")
    source = _source(train, lexicon, form, searched(train.embeddings), run, say)
    held_out = _read_set(data.split("dev"))
    search = searched(data.split("dev").embeddings)

    adapted = add_kv_lora(language_model.model, run.kv_lora, names=targets, seed=run.seed)
    adapted_lm = LanguageModel(adapted, language_model.tokenizer, language_model.digest, language_model.name)
    schedule = Schedule(run.steps, run.minutes * 60 if run.minutes else None, run.lr)
    trainer = Trainer(adapted_lm, schedule, seed=run.seed, compile_layers=run.compile_layers and device.type == "cuda")
    if resume and load_checkpoint(out_dir / "checkpoint", trainer):
        say(f"resumed at step {trainer.progress.step:,} after {trainer.progress.seconds:.0f} s of training")
    evaluator = _Evaluator(adapted_lm, lexicon, run, say)
    finished = _train(trainer, source, adapted_lm, run, out_dir, say, lambda: evaluator.quick(held_out, search))

    trainer.finish()
    save_adapter(adapted, out_dir, run.kv_lora, base_digest=language_model.digest, base_name=language_model.name)
    tables = {"held_out": evaluator.full(held_out, search)} if finished else {}
    for name, folder in (evaluate or {}).items() if finished else ():
        other = load_prepared(folder)
        index = searched(other.embeddings)
        say(f"--- {name}: {len(other):,} passages")
        tables[name] = evaluator.full(_read_set(other), index)
    card = _card(trainer, run, data, adapted_lm, codebook, lexicon, finished, tables)
    (out_dir / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    return card


def _source(
    train: Prepared,
    lexicon: Lexicon,
    form: PromptFormat,
    index: AddressIndex,
    run: ReaderRun,
    say: Callable[[str], None],
) -> SampleSource:
    others, ranks = distractors(train.rows, index.nearest(train.question_embeddings, _SEARCHED))
    passage_others, _ = distractors(np.arange(len(train)), index.nearest(train.embeddings, _SEARCHED))
    say("found the neighbours by code")
    return build_source(
        train, lexicon, form, others, ranks, passage_others, mixture=run.mixture, seed=run.seed, say=say
    )


def _train(
    trainer: Trainer,
    source: SampleSource,
    language_model: LanguageModel,
    run: ReaderRun,
    out_dir: Path,
    say: Callable[[str], None],
    look: Callable[[], dict[str, float]],
) -> bool:
    """Steps until the schedule is done (True) or this call's time is up (False)."""
    pad = language_model.pad_id

    def make(number: int) -> list[list[MicroBatch]]:
        composed = source.pool(run.seed, number, run.batch * _POOL_STEPS)
        return steps_of(micro_batches(composed, pad, run.batch_tokens, run.batch, (run.seed, number, 1)), run.batch)

    return train_pools(trainer, make, run, out_dir, say, look)


@dataclass(slots=True)
class _Evaluator:
    """Reads held-out questions with the model as it is now."""

    language_model: LanguageModel
    lexicon: Lexicon
    run: ReaderRun
    say: Callable[[str], None]

    def quick(self, questions: ReadSet, search: AddressIndex) -> dict[str, float]:
        """Held-out EM and F1 of the closed book and of what is trained on, for the curve."""
        rows = self._rows(questions.sample(self.run.evaluate_questions, self.run.seed), search, self._reads[0])
        return {f"{row['read']}_{name}": float(str(row[name])) for row in rows for name in ("em", "f1")}

    def full(self, questions: ReadSet, search: AddressIndex) -> list[dict[str, object]]:
        """The whole table."""
        return self._rows(questions.sample(self.run.evaluate_questions, self.run.seed), search, self._reads[1])

    @property
    def _reads(self) -> tuple[Sequence[Read], Sequence[Read]]:
        """Those of a quick look, and all; an adapter is asked for what it was trained to read."""
        kind = memory_of(self.run.mixture)
        if kind == "words":
            return _QUICK_READS, DEFAULT_READS
        return (TEXT_READS[:2], TEXT_READS) if kind == "text" else (CLOSED_READS, CLOSED_READS)

    def _rows(self, questions: ReadSet, search: AddressIndex, reads: Sequence[Read]) -> list[dict[str, object]]:
        if not len(questions.questions):
            return []
        self.language_model.model.eval()
        budget = 131_072 if self.language_model.device.type == "cuda" else 8_192
        with torch.compiler.set_stance("force_eager"):
            rows = evaluate_reads(
                self.language_model,
                questions,
                reads,
                search=search,
                lexicon=self.lexicon,
                max_tokens=_MAX_EVALUATED_TOKENS,
                batch_tokens=budget,
                seed=self.run.seed,
                progress=self.say,
            )
        return [dict(row) for row in rows]


def _read_set(data: Prepared) -> ReadSet:
    words = data.table["words"].to_pylist()
    scores = [np.array(one, dtype=np.float32) for one in data.table["scores"].to_pylist()]
    texts = data.table["text"].to_pylist()
    return ReadSet(texts, words, scores, data.questions, data.answers, data.rows, data.question_embeddings)


def _card(
    trainer: Trainer,
    run: ReaderRun,
    data: Prepared,
    language_model: LanguageModel,
    codebook: Codebook,
    lexicon: Lexicon,
    finished: bool,
    tables: Mapping[str, list[dict[str, object]]],
) -> dict[str, object]:
    device = language_model.device
    return {
        "what": "KV-LoRA: low-rank updates of the key and value projections of every layer",
        "base": {"name": language_model.name, "digest": language_model.digest},
        "parameters": sum(master.numel() for master in trainer.masters),
        "finished": finished,
        "memory": {"kind": memory_of(run.mixture), "says": SAYS[memory_of(run.mixture)]},
        "run": asdict(run),
        "progress": asdict(trainer.progress),
        "samples_per_second": round(trainer.progress.samples / max(1e-9, trainer.progress.seconds), 1),
        "compiled": trainer.compiled,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "data": {"passages": data.sources, "questions": len(data.questions), "held_out": "passages of the split dev"},
        "codebook": codebook.digest,
        "lexicon": lexicon.digest,
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "results": dict(tables),
    }
