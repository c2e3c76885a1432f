"""What each idea brought: one adapter reads the same questions with one piece at a time as it was before.

    python -m tests.bench.bench_ideas SET=PREPARED … --before SET=PREPARED … --lm FOLDER --adapter FOLDER

``PREPARED`` folders are of ``mbc train prepare`` with the salience head of now, ``--before`` ones with the head of
before. Rows: as it is; 16 bits a code; the salience head of before; the rotation and codebook of before; all of
before; the word code without classes of words; and other choices of words: salience alone, first words alone, no
bridges. Figures are of one run, one seed and the same questions, so the differences are paired.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import click
import numpy as np

from mbc_core.codebook.files import Codebook
from mbc_core.codes import Rotation
from mbc_core.evaluation.addresses import AddressIndex
from mbc_core.evaluation.reads import Choose, Read, ReadSet, evaluate_reads
from mbc_core.lexicon import Lexicon
from mbc_core.reader.kv_lora import load_adapter
from mbc_core.reader.language_model import LanguageModel, load_language_model
from mbc_core.training.prepared import Prepared, load_prepared
from mbc_core.words import choose_words

READS = (Read("recall", 5, 24), Read("recall", 5, 41), Read("right", 1, 24), Read("right", 1, 41))


@dataclass(frozen=True)
class Pieces:
    """What a row is made with."""

    data: Prepared
    lexicon: Lexicon
    rotation: Rotation
    codebook: Codebook
    choose: Choose = choose_words


CHOICES: dict[str, Choose] = {
    "salience alone": partial(choose_words, opening=0, bridged=0),
    "first words alone": partial(choose_words, opening=1, bridged=0),
    "no bridges": partial(choose_words, bridged=0),
    "bridges of two": partial(choose_words, bridged=2),
    "a third first words": partial(choose_words, opening=0.35),
    "two thirds first words": partial(choose_words, opening=0.65),
}


@click.command()
@click.argument("now", nargs=-1, required=True)
@click.option("--before", multiple=True, help="SET=PREPARED with the salience head of before.")
@click.option("--lm", required=True)
@click.option("--gguf", default=None)
@click.option("--adapter", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--lexicon", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--lexicon-before", type=click.Path(exists=True, path_type=Path), default=None)
@click.option("--rotation", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--codebook", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--rotation-before", type=click.Path(exists=True, path_type=Path), default=None)
@click.option("--codebook-before", type=click.Path(exists=True, path_type=Path), default=None)
@click.option("--questions", type=int, default=1000, show_default=True)
@click.option("--device", default="cpu", show_default=True)
def main(
    now: tuple[str, ...], before: tuple[str, ...], lm: str, gguf: str | None, adapter: Path, lexicon: Path,
    lexicon_before: Path | None, rotation: Path, codebook: Path, rotation_before: Path | None,
    codebook_before: Path | None, questions: int, device: str,
) -> None:  # fmt: skip
    base = load_language_model(lm, gguf, device=device)
    model, _ = load_adapter(base.model, adapter, base_digest=base.digest)
    reader = replace(base, model=model.eval())
    earlier = dict(one.split("=", 1) for one in before)
    words, turn, book = Lexicon.load(lexicon), Rotation.load(rotation), _codebook(codebook)
    turn_before = Rotation.load(rotation_before) if rotation_before else turn
    book_before = _codebook(codebook_before) if codebook_before else book
    for name, folder in (one.split("=", 1) for one in now):
        full = Pieces(load_prepared(Path(folder)), words, turn, book)
        plain = Lexicon(words.merges)
        old_data = load_prepared(Path(earlier[name])) if name in earlier else full.data
        rows = {"as it is": full, "16 bits a code": replace(full, lexicon=plain)}
        rows |= {label: replace(full, choose=choose) for label, choose in CHOICES.items()}
        if lexicon_before:
            rows["the word code of before"] = replace(full, lexicon=Lexicon.load(lexicon_before))
        if name in earlier:
            rows["salience of before"] = replace(full, data=old_data)
            rows["all of before"] = Pieces(old_data, plain, turn_before, book_before)
        if codebook_before:
            rows["address codes of before"] = replace(full, rotation=turn_before, codebook=book_before)
        for label, pieces in rows.items():
            for row in _measure(reader, pieces, questions, device):
                print(json.dumps({"set": name, "idea": label, **row}), flush=True)


def _codebook(path: Path) -> Codebook:
    return Codebook.from_bytes(path.read_bytes(), str(path))


def _measure(reader: LanguageModel, pieces: Pieces, questions: int, device: str) -> list[dict[str, object]]:
    data, book = pieces.data, pieces.codebook
    search = AddressIndex(data.embeddings, pieces.rotation, book.codewords, pieces.rotation.width // book.width, device)
    asked = ReadSet(
        data.table["text"].to_pylist(),
        data.table["words"].to_pylist(),
        [np.array(one, dtype=np.float32) for one in data.table["scores"].to_pylist()],
        data.questions,
        data.answers,
        data.rows,
        data.question_embeddings,
    ).sample(questions, 0)
    tokens = 131_072 if device != "cpu" else 8192
    found = evaluate_reads(
        reader,
        asked,
        READS,
        search=search,
        lexicon=pieces.lexicon,
        max_tokens=2048,
        batch_tokens=tokens,
        choose=pieces.choose,
    )
    return [dict(row) for row in found]


if __name__ == "__main__":
    main()
