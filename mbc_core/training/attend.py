"""``mbc train attend``: a projector that reads address codes as vectors, and the KV-LoRA that reads its soft tokens."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from mbc_core.codebook.files import Codebook
from mbc_core.codes import Rotation
from mbc_core.errors import UsageError
from mbc_core.evaluation.addresses import AddressIndex
from mbc_core.lexicon import Lexicon
from mbc_core.reader.attend import PROJECTOR_FILE, save_projector
from mbc_core.reader.kv_lora import add_kv_lora, load_adapter, save_adapter
from mbc_core.reader.language_model import LanguageModel
from mbc_core.reader.prompt import PromptFormat
from mbc_core.training.attend_data import AttendData, encoder_of, joined
from mbc_core.training.attend_dictionary import TextEmbedder
from mbc_core.training.attend_loop import AttendTrainer, Projectors
from mbc_core.training.attend_reads import FULL_READS, QUICK_READS, AttendRead, Vectors, read_prepared
from mbc_core.training.attend_run import AttendRun
from mbc_core.training.attend_samples import AttendBatch, AttendSource
from mbc_core.training.attend_setup import attend_data, named_projectors
from mbc_core.training.data import LICENCES
from mbc_core.training.loop import Schedule, load_checkpoint
from mbc_core.training.pools import train_pools
from mbc_core.training.prepared import Prepared, load_prepared

_POOL_STEPS = 16
_HELD_OUT_SAMPLES = 1024


def train_attend(
    prepared: Sequence[Path],
    lexicon: Lexicon,
    codebooks: Sequence[Codebook],
    rotation: Rotation,
    language_model: LanguageModel,
    out_dir: Path,
    run: AttendRun,
    *,
    encoder: TextEmbedder,
    encoder_id: str | None = None,
    start: Path | None = None,
    targets: Sequence[str] | None = None,
    evaluate: Mapping[str, Path] | None = None,
    resume: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, object]:
    """Train, evaluate and write projector and adapter with their card.

    Args:
        prepared: what ``mbc train prepare`` wrote; further folders may hold passages without questions. Their ``dev``
            passages are held out.
        codebooks: of address codes; the first finds distractors and is evaluated with, all are trained on.
        encoder: the one that the prepared folders were made with; it embeds the dictionary, sentences and cloze
            questions.
        encoder_id: of the encoder whose vectors are read; what the first prepared folder says when None.
        start: folder of an adapter to start from, such as the one that reads words; None: a fresh one.
        language_model: the base, without adapter; it is adapted in place.
        out_dir: gets the adapter's files, ``projector.safetensors``, ``card.json``, ``curve.jsonl`` and, while the
            run lasts, ``checkpoint/``.
        evaluate: name → prepared folder of question sets, read at the end; the first also during the run.
        resume: take up the checkpoint in ``out_dir`` when there is one.

    Returns:
        the card; ``finished`` is False when ``call_minutes`` ended this call early.

    Raises:
        DamagedFile: prepared data or the checkpoint cannot be read.
        UsageError: no codebook, or as many variants as there are codebooks, and one more, were not given.
        ModelError: the projections cannot be found.
    """
    _check(run, codebooks)
    out_dir.mkdir(parents=True, exist_ok=True)
    data = joined([load_prepared(folder) for folder in prepared])
    say(f"loaded {len(data):,} passages, {len(data.questions):,} questions")
    device, form = language_model.device, PromptFormat(language_model.tokenizer)
    made, held_out, dictionary = attend_data(
        data, lexicon, form, codebooks, rotation, run, encoder, language_model.pad_id, device, say
    )
    projectors, naming = named_projectors(
        made, held_out, dictionary, run, rotation.width, language_model, out_dir, say, resume=resume
    )
    trainer, adapted = _trainer(language_model, projectors, made, run, targets, start)
    if resume and load_checkpoint(out_dir / "checkpoint", trainer):
        say(f"resumed at step {trainer.progress.step:,} after {trainer.progress.seconds:.0f} s of training")
    reads = _Reads(adapted, trainer, run, rotation, codebooks[0], say)
    sets = {"held_out": data.split("dev"), **{name: load_prepared(one) for name, one in (evaluate or {}).items()}}
    look = _Look(trainer, held_out, reads, sets, run)
    finished = _train(trainer, made.source, run, out_dir, say, look)
    trainer.finish()
    save_adapter(adapted.model, out_dir, run.kv_lora, base_digest=language_model.digest, base_name=language_model.name)
    encoder_id = encoder_id or encoder_of(prepared[0])
    if not run.closed:
        save_projector(
            out_dir / PROJECTOR_FILE, trainer.projector, base_digest=language_model.digest, encoder=encoder_id,
            rotation=rotation.digest,
        )  # fmt: skip
    tables = {name: reads.all(one, FULL_READS) for name, one in sets.items()} if finished else {}
    card = _card(trainer, run, data, adapted, codebooks, rotation, encoder_id, finished, tables)
    card["naming"], card["started_from"] = naming, str(start.name) if start is not None else None
    card["files"] = {one.name: hashlib.sha256(one.read_bytes()).hexdigest() for one in out_dir.glob("*.safetensors")}
    (out_dir / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    return card


def _check(run: AttendRun, codebooks: Sequence[Codebook]) -> None:
    if not codebooks or len(run.variants) != len(codebooks) + 1:
        raise UsageError(
            "the shares of the passage vectors do not fit the codebooks",
            value=f"{len(run.variants)} shares, {len(codebooks)} codebooks",
            cause="each codebook has a share, and the float embedding the last one",
            fix="give one share more than codebooks, such as 0.7,0.15,0.15 for two",
        )


def _trainer(
    language_model: LanguageModel,
    projectors: Projectors,
    data: AttendData,
    run: AttendRun,
    targets: Sequence[str] | None,
    start: Path | None,
) -> tuple[AttendTrainer, LanguageModel]:
    if start is not None:
        adapted, config = load_adapter(language_model.model, start, base_digest=language_model.digest)
        if (config.r, config.alpha) != (run.kv_lora.r, run.kv_lora.alpha):
            raise UsageError(
                "the adapter to start from has another size",
                value=f"r = {config.r}, alpha = {config.alpha}",
                cause=f"this run trains r = {run.kv_lora.r}, alpha = {run.kv_lora.alpha}",
                fix="give the same --rank, or start afresh",
            )
    else:
        adapted = add_kv_lora(language_model.model, run.kv_lora, names=targets, seed=run.seed)
    adapted_lm = LanguageModel(adapted, language_model.tokenizer, language_model.digest, language_model.name)
    projectors.whole.likely.requires_grad_(True)
    schedule = Schedule(run.steps, run.minutes * 60 if run.minutes else None, run.lr)
    compiled = run.compile_layers and language_model.device.type == "cuda"
    return AttendTrainer(
        adapted_lm, projectors, data.tables, schedule, seed=run.seed, compile_layers=compiled
    ), adapted_lm


def _train(
    trainer: AttendTrainer,
    source: AttendSource,
    run: AttendRun,
    out_dir: Path,
    say: Callable[[str], None],
    look: Callable[[], dict[str, float]],
) -> bool:
    """Steps until the schedule is done (True) or this call's time is up (False)."""
    passes = max(1, round(run.batch / run.rows))
    if run.steps == 0 or trainer.schedule.progress(trainer.progress.step, trainer.progress.seconds) >= 1:
        return True

    def make(number: int) -> list[list[AttendBatch]]:
        batches = source.pool(run.seed, number, run.rows * passes * _POOL_STEPS, run.rows)
        return [batches[start : start + passes] for start in range(0, len(batches), passes)]

    return train_pools(trainer, make, run, out_dir, say, look, leave_compiling_out=trainer.compiled, look_last=True)


@dataclass(slots=True)
class _Reads:
    """Reads question sets with the model as it is now."""

    language_model: LanguageModel
    trainer: AttendTrainer
    run: AttendRun
    rotation: Rotation
    codebook: Codebook
    say: Callable[[str], None]
    vectors: dict[int, Vectors] = field(default_factory=dict)

    def all(self, data: Prepared, reads: Sequence[AttendRead]) -> list[dict[str, object]]:
        """Rows of the table; the closed book's alone for an adapter without memory."""
        if not len(data.questions):
            return []
        reads = [one for one in reads if not self.run.closed or one.kind == "closed"]
        kept = self.vectors.get(id(data))
        if kept is None:
            slots = self.rotation.width // self.codebook.width
            index = AddressIndex(
                data.embeddings, self.rotation, self.codebook.codewords, slots, self.language_model.device
            )
            kept = self.vectors[id(data)] = Vectors.of(index, self.codebook, self.rotation)
        self.language_model.model.eval()
        with torch.compiler.set_stance("force_eager"):
            rows = read_prepared(
                self.language_model, self.trainer.projector, data, kept, reads,
                limit=self.run.evaluate_questions, seed=self.run.seed, say=self.say,
            )  # fmt: skip
        return [dict(row) for row in rows]


@dataclass(slots=True)
class _Look:
    """Held-out loss, and F1 of a few reads of the first question set, for the curve."""

    trainer: AttendTrainer
    held_out: AttendData
    reads: _Reads
    sets: Mapping[str, Prepared]
    run: AttendRun

    def __call__(self) -> dict[str, float]:
        training, tables = self.trainer.tables, self.held_out.tables
        found: dict[str, float] = {}
        self.trainer.tables = tables
        try:
            batches = self.held_out.source.pool(self.run.seed, 0, _HELD_OUT_SAMPLES, self.run.rows)
            found["held_out_loss"] = round(self.trainer.loss(batches), 4)
        finally:
            self.trainer.tables = training
        name = next((one for one in self.sets if one != "held_out"), "held_out")
        for row in self.reads.all(self.sets[name], QUICK_READS):
            found[f"{name}_{row['read']}_f1"] = round(float(str(row["f1"])), 2)
        return found


def _card(
    trainer: AttendTrainer,
    run: AttendRun,
    data: Prepared,
    language_model: LanguageModel,
    codebooks: Sequence[Codebook],
    rotation: Rotation,
    encoder_id: str,
    finished: bool,
    tables: Mapping[str, list[dict[str, object]]],
) -> dict[str, object]:
    device, sizes = language_model.device, {name: one.numel() for name, one in trainer.weights.items()}
    what = "closed book, trained equally: the attend read's adapter on the same questions without memory"
    return {
        "what": what if run.closed else "attend: passage vectors decoded from address codes → soft tokens, and KV-LoRA",
        "base": {"name": language_model.name, "digest": language_model.digest},
        "encoder": encoder_id,
        "parameters": {
            "projector": 0 if run.closed else sum(one.numel() for one in trainer.projector.parameters()),
            "kv_lora": sum(n for name, n in sizes.items() if "lora_" in name),
        },
        "finished": finished,
        "run": asdict(run),
        "progress": {name: one for name, one in asdict(trainer.progress).items() if one == one or not math.isnan(one)},
        "samples_per_second": round(trainer.progress.samples / max(1e-9, trainer.progress.seconds), 1),
        "compiled": trainer.compiled,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "data": {
            "passages": data.sources,
            "licences": {name: LICENCES.get(name, "see its publisher") for name in data.sources},
            "questions": len(data.questions),
            "held_out": "passages of the split dev",
        },
        "codebooks": [one.digest for one in codebooks],
        "rotation": rotation.digest,
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "results": dict(tables),
    }
