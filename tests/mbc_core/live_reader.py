"""A process that goes on answering: a line in is a question, a line out its answer and the adapter that gave it.

python live_reader.py BANK
"""

from __future__ import annotations

import json
import sys

import torch
from tiny_reader import BagOfWords, language_model, lexicon, pieces

from mbc_core.answering import Reader
from mbc_core.memory import Memory


def main(place: str) -> None:
    torch.set_num_threads(1)
    memory = Memory.open(place, BagOfWords(), lexicon=lexicon(), rotation=pieces()[0])
    warnings: list[str] = []
    reader = Reader(memory, language_model=language_model(), refresh=0.0, warn=warnings.append)
    reader.ask("Is it ready?")
    print("ready", flush=True)
    for line in sys.stdin:
        answer = reader.ask(line.strip()).answer
        print(json.dumps({"answer": answer, "adapter": reader.adapter, "warnings": warnings}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
