"""`mbc train paper` as a function: pieces from files, training, measuring, and the folder that is written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from numpy.typing import NDArray

from mbc_core.errors import UsageError
from mbc_core.paper.config import PaperConfig
from mbc_core.paper.files import WEIGHTS_FILE, save_paper_model, set_paper_weights
from mbc_core.paper.model import PaperModel
from mbc_core.reader.language_model import LanguageModel, load_language_model
from mbc_core.reader.prompt import PromptFormat
from mbc_core.training.paper import PaperTrainer, train_paper
from mbc_core.training.paper_batches import OnDevice
from mbc_core.training.paper_card import card_of, paper_card, read_curve, require_same_data, require_shippable
from mbc_core.training.paper_data import PaperData
from mbc_core.training.paper_eval import CodeSet, code_set, evaluate_paper
from mbc_core.training.paper_files import sentence_encoder
from mbc_core.training.paper_ranks import Ranks
from mbc_core.training.paper_run import PaperRun, as_long_as

Say = Callable[[str], None]
_SOFT = 0.3

_STRANGERS = 4096
"""Training passages that shuffled banks are drawn from: as many as the largest set to measure on, or more."""


@dataclass(frozen=True, slots=True)
class PaperOptions:
    """The command line of `mbc train paper`; names and meanings are those of its options."""

    data_file: Path
    encoder: Path
    source: str
    gguf_file: str | None
    out_dir: Path
    start_from: Path | None
    codes: Literal["learned", "address"]
    codebook_file: Path | None
    codewords: int
    tokens: int
    code_width: int | None
    codebook_by: Literal["gradient", "ema"]
    usage_decay: float
    reset: bool
    kv_lora: bool
    quantize: bool
    train_encoder: bool
    closed: bool
    like: Path | None
    rank: int
    feed_forward: int
    prefix_hidden: int
    backprop_keep: float
    steps: int | None
    minutes: float
    call_minutes: float | None
    documents: int
    questions: int
    banks: str
    held_out_bank: int
    grow_every: int
    cue_steps: int
    standardize: bool
    slot_marks: bool
    lr: float
    encoder_lr: float
    lora_lr: float
    codebook_lr: float
    burst: float
    beta2: float
    warm_up: int
    cool_down: float
    look_every: int
    flat: float
    keep_best: bool
    precision: str
    compile_layers: bool
    lambda_vq: float
    evaluate: tuple[str, ...]
    evaluate_questions: int
    research: bool
    resume: bool
    seed: int
    device: str

    def run(self, *, bf16: bool) -> PaperRun:
        """Size and speed.

        Raises:
            UsageError: the bank sizes are no numbers, or the run cannot equal the one it is to be like.
        """
        parts = [part.strip() for part in self.banks.split(",")]
        if not all(part.isdigit() and int(part) for part in parts):
            raise UsageError("the bank sizes are not a list of numbers", value=self.banks, fix="write such as 1,4,16")
        run = PaperRun(
            steps=self.steps or None,
            minutes=self.minutes or None,
            call_minutes=self.call_minutes,
            documents=self.documents,
            questions=self.questions,
            banks=tuple(int(part) for part in parts),
            held_out_bank=self.held_out_bank,
            grow_every=self.grow_every,
            cue_steps=self.cue_steps,
            lr=self.lr,
            encoder_lr=self.encoder_lr,
            lora_lr=self.lora_lr,
            codebook_lr=self.codebook_lr,
            burst=self.burst or None,
            beta2=self.beta2,
            warm_up=self.warm_up,
            cool_down=self.cool_down,
            look_every=self.look_every,
            flat=self.flat or None,
            keep_best=self.keep_best,
            closed=self.closed,
            bf16=bf16,
            compile_layers=self.compile_layers,
            seed=self.seed,
        )
        return run if self.like is None else as_long_as(run, card_of(self.like), self.like)

    def config(self, width: int, encoder_width: int) -> PaperConfig:
        """The model's sizes and switches.

        Args:
            width: of the language model. encoder_width: of the sentence encoder's embeddings.
        """
        shared: dict[str, Any] = {
            "kv_lora": self.kv_lora,
            "lora_r": self.rank,
            "lora_alpha": 2 * self.rank,
            "feed_forward": self.feed_forward,
            "prefix_hidden": self.prefix_hidden,
            "slot_marks": self.slot_marks,
            "backprop_keep": self.backprop_keep,
            "seed": self.seed,
        }
        if self.codes == "address":
            return PaperConfig.address(self.tokens, encoder_width, **shared)
        return PaperConfig(
            tokens=self.tokens,
            codewords=self.codewords,
            code_width=self.code_width or width,
            latent_width=width,
            embedding_width=encoder_width,
            quantize=self.quantize,
            reset=self.reset,
            codebook_by=self.codebook_by,
            usage_decay=self.usage_decay,
            lambda_vq=self.lambda_vq,
            train_encoder=self.train_encoder,
            standardize=self.standardize,
            **shared,
        )


def run_paper(told: PaperOptions, say: Say) -> dict[str, Any] | None:
    """Train, measure, and write ``paper.safetensors``, ``paper.json``, ``card.json`` and ``curve.jsonl``.

    Returns:
        the card; None on all processes but the first.

    Raises:
        UsageError: options that do not go together.
        DamagedFile, ModelError: files that cannot be used.
    """
    device = told.device if told.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    ranks = Ranks.join(device)
    if device == "cuda":
        device = f"cuda:{torch.cuda.current_device() if ranks.count == 1 else ranks.rank % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    say = say if ranks.rank == 0 else lambda line: None
    data = PaperData.load(told.data_file)
    if not told.research:
        require_shippable(data)
    base = load_language_model(told.source, told.gguf_file, dtype=told.precision, device=device)
    model = build_model(told, base)
    if told.start_from is not None:
        set_paper_weights(model, told.start_from)
    run = told.run(bf16=base.model.dtype == torch.bfloat16)
    if told.like is not None:
        require_same_data(data, card_of(told.like), told.like)
    on_device = _on_device(told, data, base, torch.device(device), run.chunks)
    trainer = PaperTrainer(model, data, on_device, run, ranks)
    say(f"{sum(one.numel() for one in trainer.parameters.values()):,} parameters learn on {device}, rank 1 of "
        f"{ranks.count}; {trainer.draw.steps_per_epoch:,} steps an epoch, {trainer.draw.left_out:,} questions too long"
    )  # fmt: skip
    finished = train_paper(trainer, told.out_dir, resume=told.resume, say=say)
    if ranks.rank:
        return None
    save_paper_model(model, told.out_dir, dtype=torch.float16)
    with torch.compiler.set_stance("force_eager"):  # generation's caches have another form than what was compiled
        results = _measure(told, model, data, on_device, base, say) if finished else {}
    stored = (told.out_dir / WEIGHTS_FILE).read_bytes()
    file = {"file_sha256": hashlib.sha256(stored).hexdigest(), "bytes": len(stored)}
    earlier: dict[str, Any] = {"started_from": _earlier(told.start_from)} if told.start_from is not None else {}
    if told.like is not None:
        earlier["like"] = told.like.name
    card = paper_card(trainer, data, read_curve(told.out_dir), results=results, **earlier, **file)
    (told.out_dir / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    return card


def _earlier(folder: Path) -> dict[str, Any]:
    """What the card of the weights that a run started from says of their training."""
    card = card_of(folder)
    names = ("file_sha256", "command", "device", "steps", "seconds", "epochs", "finished", "ended_by", "curve", "made")
    return {name: card[name] for name in names if name in card}


def build_model(told: PaperOptions, base: LanguageModel) -> PaperModel:
    """A fresh model on the language model's device."""
    from mbc_core.codebook.files import Codebook

    encoder_width = int(json.loads((told.encoder / "config.json").read_text())["hidden_size"])
    config = told.config(int(base.model.config.hidden_size), encoder_width)
    if told.codes == "learned":
        encoder = sentence_encoder(told.encoder, base.device)
        asker = sentence_encoder(told.encoder, base.device) if config.train_encoder else encoder
        return softened(PaperModel(config, base, encoder=encoder, question_encoder=asker))
    if told.codebook_file is None:
        raise UsageError("address codes need their codebook", value="none given", fix="name it with --codebook FILE")
    words = Codebook.from_bytes(told.codebook_file.read_bytes(), str(told.codebook_file)).codewords
    config = replace(config, codewords=len(words))
    model = softened(PaperModel(config, base, codewords=torch.from_numpy(words).to(base.device)))
    model.aggregator.fit_scale(model.code_vectors())
    return model


@torch.no_grad()
def softened(model: PaperModel) -> PaperModel:
    """A fresh model whose prefix starts out small: at full size it costs SmolLM2 three nats a token to begin with."""
    for name, one in model.prefix.named_parameters():
        if name.startswith(("outer", "skip")):
            one.mul_(_SOFT)
    return model


def question_embeddings(data: PaperData, folder: Path, device: torch.device) -> NDArray[Any]:
    """Embeddings of the questions, float32 [Q, d], by the sentence encoder in ``folder``."""
    from mbc_core.encoder import PassageEncoder

    return data.embed_questions(PassageEncoder.load(folder, None, device=str(device)))


def _on_device(told: PaperOptions, data: PaperData, base: LanguageModel, device: torch.device, chunks: int) -> OnDevice:
    address = told.codes == "address"
    return OnDevice(
        data,
        device,
        slots=told.tokens if address else None,
        embeddings=question_embeddings(data, told.encoder, device) if address else None,
        pad_id=base.pad_id,
        chunks=chunks,
    )


def _measure(
    told: PaperOptions, model: PaperModel, data: PaperData, on_device: OnDevice, base: LanguageModel, say: Say
) -> dict[str, Any]:
    """Rows of every set to measure on, by name."""
    form = PromptFormat(base.tokenizer)
    strangers: CodeSet | None = None
    found: dict[str, Any] = {}
    for named in told.evaluate:
        name, equals, file = named.partition("=")
        if not equals or not Path(file).is_file():
            raise UsageError("--evaluate is not NAME=FILE", value=named, fix="name a file of `mbc train paper-data`")
        other = PaperData.load(Path(file))
        if strangers is None and not told.closed:
            rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(told.seed))[:_STRANGERS].numpy()
            strangers = code_set(model, on_device, rows)
        there = _on_device(told, other, base, on_device.device, 1)
        say(f"--- {name}: {len(other):,} passages, {len(other.rows):,} questions")
        found[name] = evaluate_paper(
            model, other, there, form, strangers=strangers, closed=told.closed, limit=told.evaluate_questions,
            seed=told.seed, say=say,
        )  # fmt: skip
    return found
