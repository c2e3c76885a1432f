"""Does the codebook collapse? Learned heads on real text, reset on and off, from one seed."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mbc_core.corpus import demo_documents, load_articles
from mbc_core.encoder import PassageEncoder
from mbc_core.paper.config import PaperConfig
from mbc_core.paper.model import PaperBatch, PaperModel
from mbc_core.paper.vector_quantizer import perplexity
from mbc_core.reader.prompt import PromptFormat
from tests.mbc_core.paper_parts import with_answers
from tests.mbc_core.tiny_reader import language_model, tokenizer

DOCUMENTS, HELD_OUT, STEPS, ROWS, LONGEST = 320, 64, 100, 16, 64


class FrozenStates(nn.Module):
    """The frozen encoder's states of known passages, computed once: "ids" hold the passage's number."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=states.shape[2])
        self.register_buffer("states", states)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.states[input_ids[:, 0]])


@pytest.fixture(scope="module")
def passages(assets):
    """Encoder states [n, S, 384], mask [n, S], embeddings [n, 384] and title and first words of demo passages."""
    encoder = PassageEncoder.load(assets.minilm, None, precision="float32")
    documents = list(demo_documents(load_articles(assets.wiki), count=2 * DOCUMENTS))
    order = np.random.default_rng(0).permutation(len(documents))[:DOCUMENTS]
    chosen = [documents[place] for place in order]
    states = torch.zeros(DOCUMENTS, LONGEST, 384)
    mask = torch.zeros(DOCUMENTS, LONGEST, dtype=torch.int64)
    ids = [one.ids[:LONGEST] for one in encoder.tokenize([document["text"][:400] for document in chosen])]
    for found in encoder.hidden_states(ids, (6,)):
        for row, place in enumerate(found.batch.places):
            count = len(ids[place])
            states[place, :count], mask[place, :count] = found.states[0][row, :count].float(), 1
    questions = torch.from_numpy(encoder.encode_questions([f"What is {one['title']}?" for one in chosen]))
    return states, mask, questions, [(one["title"], one["text"][:24]) for one in chosen]


def batch(passages, places: np.ndarray) -> PaperBatch:
    _, mask, questions, texts = passages
    form = PromptFormat(tokenizer())
    asked = [form.question(f"What is {texts[place][0][:24]}?") for place in places]
    answers = [form.answer(texts[place][1]) for place in places]
    rows = torch.from_numpy(places)
    ids = rows[:, None].expand(-1, LONGEST)
    return PaperBatch(
        *with_answers(asked, answers), question_embeddings=questions[rows], document_ids=ids, document_mask=mask[rows]
    )


def train(passages, **switches: bool) -> tuple[PaperModel, int]:
    config = PaperConfig(
        **switches, code_width=32, latent_width=32, question="embedding", heads=4, prefix_hidden=64,
        amortizer_blocks=1, lora_r=4, lora_alpha=8, lora_dropout=0.0, seed=1,
    )  # fmt: skip
    model = PaperModel(config, language_model(), encoder=FrozenStates(passages[0])).train()
    optimizer = torch.optim.Adam(model.learned_parameters().values(), lr=1e-3)
    model.quantizer.watch(optimizer)
    cooling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    draw = np.random.default_rng(2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(batch(passages, draw.choice(DOCUMENTS - HELD_OUT, ROWS, replace=False))).total.backward()
        optimizer.step()
        cooling.step()
    shown = batch(passages, np.arange(DOCUMENTS - HELD_OUT))
    model.eval().calibrate([(shown.document_ids, shown.document_mask)])
    return model, int(model.quantizer.resets)


@torch.no_grad()
def measured(passages, model: PaperModel) -> dict[str, float]:
    """On held-out passages: codes used, their perplexity, answer loss, and quantization error by z's energy."""
    losses, rows, counts, error, energy = [], set(), torch.zeros(512, dtype=torch.int64), 0.0, 0.0
    for start in range(DOCUMENTS - HELD_OUT, DOCUMENTS, ROWS):
        shown = batch(passages, np.arange(start, start + ROWS))
        found = model(shown)
        z = model.quantizer.standardized(model.amortize(shown.document_ids, shown.document_mask))
        error += float((found.quantized.vectors - z).square().sum())
        energy += float(z.square().sum())
        counts += torch.bincount(found.quantized.indices.flatten(), minlength=512)
        losses.append(float(found.answer))
        rows |= {tuple(row) for row in found.quantized.indices.tolist()}
    return {
        "rows": len(rows),
        "used": int((counts > 0).sum()),
        "perplexity": float(perplexity(counts)),
        "loss": float(np.mean(losses)),
        "error": error / energy,
    }


@pytest.mark.slow
def test_reset_keeps_the_codebook_alive(passages):
    """Used codes, perplexity and held-out loss, printed; and the second way to collapse, which reset does not see.

    With the paper's rule alone the codes that stay alive tell tokens apart, not passages: nearly all of z's variance
    lies between the T tokens at first, and each token keeps one code whatever the passage. Standardized vectors differ
    between passages from the first step.
    """
    found = {}
    for reset, standardize in ((True, False), (False, False), (True, True), (False, True)):
        model, resets = train(passages, reset=reset, standardize=standardize)
        found[reset, standardize] = one = measured(passages, model)
        print(
            f"\nreset {'on ' if reset else 'off'}, {'standardized' if standardize else 'as the paper'}: {resets} "
            f"resets; {HELD_OUT} held-out passages have {one['rows']} different rows of codes and use {one['used']} "
            f"of 512 codes, perplexity {one['perplexity']:.1f}, answer loss {one['loss']:.3f} nats a token, "
            f"quantization error {one['error']:.3f} of the energy",
            end="",
        )
    for standardize in (False, True):
        on, off = found[True, standardize], found[False, standardize]
        assert on["used"] > 2 * off["used"]
        assert on["perplexity"] > (1.2 if standardize else 3) * off["perplexity"]  # spread z keeps more alive by itself
        assert on["error"] < off["error"]
    assert found[True, False]["rows"] < 0.1 * HELD_OUT < 0.9 * HELD_OUT < found[True, True]["rows"]
