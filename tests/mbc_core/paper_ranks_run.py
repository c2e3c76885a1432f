"""One process of several that train a tiny paper model together; started by torchrun or alone, writes its weights."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from mbc_core.training.paper import PaperTrainer, train_paper
from mbc_core.training.paper_ranks import Ranks
from mbc_core.training.paper_run import parameter_groups
from tests.mbc_core.tiny_paper import RUN, config, data, model, on_device


def main(folder: Path, out: Path, by: str) -> None:
    torch.set_num_threads(1)
    encoder_at = folder / f"encoder-{os.environ.get('RANK', '0')}"
    tokens, encoder = data(encoder_at)  # before joining: transformers lets only the first of a group save
    ranks = Ranks.join("cpu")
    built = model(encoder_at, config(codebook_by=by))
    run = replace(RUN, steps=5, banks=(1, 2), held_out_bank=1, lr=0.3, lora_lr=0.3, encoder_lr=0.3, codebook_lr=0.3)
    trainer = PaperTrainer(built, tokens, on_device(tokens, encoder), run, ranks)
    # Adam makes whole steps of the rounding of gradients that are zero (a key's bias under softmax): plain descent.
    trainer.optimizer = torch.optim.SGD(parameter_groups(trainer.parameters, run), lr=run.lr, momentum=0.9)
    save_file(state_of(trainer), out / f"before-{ranks.rank}.safetensors")
    train_paper(trainer, out / "run")
    save_file(state_of(trainer), out / f"rank-{ranks.rank}-of-{ranks.count}.safetensors")


def state_of(trainer: PaperTrainer) -> dict[str, torch.Tensor]:
    """Everything that training changes."""
    state = {name: one.detach().clone() for name, one in trainer.parameters.items()}
    return state | {name: one.clone() for name, one in trainer.buffers.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
