"""What a run of ``mbc train attend`` starts with: data on the device, and projectors that can name words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mbc_core.codebook.files import Codebook
from mbc_core.codes import Rotation
from mbc_core.errors import DamagedFile
from mbc_core.lexicon import Lexicon
from mbc_core.reader.attend import AttendConfig, AttendProjector
from mbc_core.reader.language_model import LanguageModel
from mbc_core.reader.prompt import PromptFormat
from mbc_core.training.attend_data import AttendData, Shown, attend_source, joined
from mbc_core.training.attend_dictionary import Dictionary, TextEmbedder
from mbc_core.training.attend_loop import Projectors
from mbc_core.training.attend_naming import learn_to_name, start_from_frequencies
from mbc_core.training.attend_run import AttendRun
from mbc_core.training.attend_sentences import sentence_passages
from mbc_core.training.prepared import Prepared


def attend_data(
    data: Prepared,
    lexicon: Lexicon,
    form: PromptFormat,
    codebooks: Sequence[Codebook],
    rotation: Rotation,
    run: AttendRun,
    encoder: TextEmbedder,
    pad_id: int,
    device: torch.device,
    say: Callable[[str], None],
) -> tuple[AttendData, AttendData, Dictionary]:
    """What is trained on, what is held out, and the dictionary of the former."""
    train = data.split("train")
    dictionary = Dictionary.of(train, run.words, encoder, form)
    say(f"made a dictionary of {len(dictionary.words):,} words")
    folds = np.random.default_rng([run.seed, 13]).integers(0, 2, len(train))
    if run.sentences:
        sentences, owners = sentence_passages(train, encoder, run.sentences, run.seed)
        train, folds = joined([train, sentences]), np.concatenate([folds, folds[owners]])
        say(f"with their sentences {len(train):,} passages")
    size = run.answers + run.topics
    made = attend_source(
        train, lexicon, form, codebooks, rotation, run.shown, Shown(size, run.variants, pad_id, run.as_found),
        dictionary, encoder=encoder, folds=folds, cloze_each=run.cloze_each, seed=run.seed, device=device, say=say,
    )  # fmt: skip
    plain = Shown(size, (1.0, *(0.0 for _ in run.variants[1:])), pad_id)
    held_out = attend_source(
        data.split("dev"), lexicon, form, codebooks, rotation, replace(run.shown, cloze=0.0), plain, dictionary,
        encoder=None, seed=run.seed, device=device,
    )  # fmt: skip
    return made, held_out, dictionary


def named_projectors(
    data: AttendData,
    held_out: AttendData,
    dictionary: Dictionary,
    run: AttendRun,
    width: int,
    language_model: LanguageModel,
    out_dir: Path,
    say: Callable[[str], None],
    *,
    resume: bool,
) -> tuple[Projectors, list[dict[str, float]]]:
    """Three projectors that can name words, taken up from ``out_dir`` if they are there; and the kept one's curve."""
    lm_width = int(language_model.model.get_input_embeddings().weight.shape[1])
    config = AttendConfig(
        width, lm_width, len(dictionary.words), run.answers, run.topics, run.hidden, run.question, run.dropout
    )
    found: list[AttendProjector] = []
    curve: list[dict[str, float]] = []
    told = json.dumps(
        [asdict(config), asdict(run.naming), run.variants, run.seed, len(data.naming.rows), *dictionary.words]
    )
    tag = hashlib.sha256(told.encode()).hexdigest()[:12]
    names = (("whole", None), ("half-0", 0), ("half-1", 1))
    for name, fold in names if run.steps != 0 else names[:1]:  # halves are for the language model's training alone
        with torch.random.fork_rng():
            torch.manual_seed(run.seed)
            projector = AttendProjector(config, dictionary.vectors, dictionary.tokens).to(language_model.device)
            kept = out_dir / "naming" / f"{name}-{tag}.safetensors"
            if not run.closed and not (resume and _take_up(projector, kept)):
                start_from_frequencies(projector, data.naming)
                phase = run.naming if fold is None else replace(run.naming, steps=(run.naming.steps + 1) // 2)
                line = learn_to_name(
                    projector, data.naming, held_out.naming, phase, run.variants, fold=fold, seed=run.seed, say=say
                )
                curve = line if fold is None else curve
                _keep(projector, kept)
        found.append(projector.eval().requires_grad_(False))
    return Projectors(found[0], (found[-2], found[-1]) if len(found) > 2 else (found[0], found[0])), curve


def _keep(projector: AttendProjector, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.writing")
    save_file({name: one.detach().cpu().contiguous() for name, one in projector.state_dict().items()}, staging)
    staging.replace(path)


def _take_up(projector: AttendProjector, path: Path) -> bool:
    if not path.exists():
        return False
    try:
        projector.load_state_dict(load_file(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise DamagedFile(
            "a projector that had learnt to name words cannot be taken up",
            value=str(path),
            cause=f"{type(error).__name__}: {error}",
            fix="remove the file to train it again",
        ) from error
    return True
