"""The projector and its prompts: shapes, order, equality with plain prompts, files, and what is refused by name."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mbc_core.codes import Rotation, pack, quantize, to_slots, unpack
from mbc_core.errors import DamagedFile, IncompatibleBank, ModelError, UsageError
from mbc_core.reader.attend import (
    AttendConfig,
    AttendProjector,
    embedding_scale,
    load_projector,
    passage_vectors,
    save_projector,
)
from mbc_core.reader.attend_prompt import answer_attend, attend_prompt, put, read_vectors, soft_embedding, soft_places
from mbc_core.reader.generate import answer_prompts, greedy
from mbc_core.reader.prompt import PromptFormat
from tests.mbc_core.tiny_reader import language_model, tokenizer

pytestmark = pytest.mark.usefixtures("single_thread")

CONFIG = AttendConfig(width=6, lm_width=32, soft_tokens=3, hidden=16, rank=5, dropout=0.5)
RNG = np.random.default_rng(0)


def projector(config: AttendConfig = CONFIG, seed: int = 0) -> AttendProjector:
    torch.manual_seed(seed)
    return AttendProjector(config, scale=0.3).eval()


def unit(*shape: int) -> np.ndarray:
    vectors = RNG.standard_normal(shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("question", [True, False])
def test_a_passage_becomes_soft_tokens_as_long_as_embeddings(rank, question):
    made = projector(replace(CONFIG, rank=rank, question=question))
    passages, questions = torch.from_numpy(unit(4, 6)), torch.from_numpy(unit(4, 6))
    soft = made(passages, questions)
    assert soft.shape == (4, 3, 32)
    assert soft.detach().square().mean(-1).sqrt().numpy() == pytest.approx(np.full((4, 3), 0.3), rel=1e-3)
    assert torch.allclose(made(passages[2:3], questions[2:3]), soft[2:3], atol=1e-6)
    other = made(passages, torch.from_numpy(unit(4, 6)))
    assert torch.equal(other, soft) is not question, "without the question's vector it cannot matter"


def test_the_gradient_reaches_every_weight():
    made = projector().train()
    made(torch.from_numpy(unit(4, 6)), torch.from_numpy(unit(4, 6)))[..., 0].sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in made.parameters())


def test_scatter_is_a_plain_loop():
    embedded, soft = torch.randn(2, 9, 4), torch.randn(3, 2, 4)
    first = torch.tensor([1, 6, 9 + 4])
    expected = embedded.clone()
    for line, (row, place) in enumerate([(0, 1), (0, 6), (1, 4)]):
        for offset in range(2):
            expected[row, place + offset] = soft[line, offset]
    assert torch.equal(put(embedded, soft, first), expected)


def test_vectors_come_back_whatever_the_codebook_and_the_number_of_slots():
    rotation = Rotation.random(6, seed=1)
    vectors = unit(5, 6)
    for slots, width in ((1, 6), (3, 2)):
        codewords = np.ascontiguousarray(to_slots(vectors, rotation, slots).reshape(-1, width))
        codes = quantize(to_slots(vectors, rotation, slots), codewords)
        packed = pack(codes)
        found = passage_vectors(unpack(packed, slots), codewords, rotation)
        assert found == pytest.approx(vectors, abs=1e-5), "every slot vector is a codeword here"
        order = RNG.permutation(len(codewords))  # another version: the same vectors under other numbers
        renamed = passage_vectors(np.argsort(order)[codes].astype(np.uint16), codewords[order], rotation)
        assert np.array_equal(found, renamed), "codes are read through their vectors, never by number"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_soft_tokens_that_are_word_embeddings_are_the_plain_prompt(kind):
    """A line whose soft tokens are the embeddings of its words is that line."""
    model, form = language_model(kind), PromptFormat(tokenizer())
    lines, questions = [["abc", "xyz"], [], ["uvw"]], ["Who founded Avalon?", "Why?", "Where is it?"]
    plain = [form.build(memory, asked).ids for memory, asked in zip(lines, questions, strict=True)]
    size = len(form.line("abc")) - len(form.newline)
    prompts = [
        attend_prompt(form, len(memory), asked, size, model.pad_id)
        for memory, asked in zip(lines, questions, strict=True)
    ]
    look_up = model.model.get_input_embeddings()
    soft = [
        torch.stack([look_up(torch.tensor(form.line(line)[:size])) for line in memory])
        if memory
        else torch.zeros(0, size, 32)
        for memory in lines
    ]
    assert [len(one.ids) for one in prompts] == [len(one) for one in plain]
    embed = soft_embedding(model, form, prompts, soft)
    assert answer_prompts(model, form, [one.ids for one in prompts], embed=embed) == answer_prompts(model, form, plain)
    logits = model.model(inputs_embeds=embed([0], torch.tensor([prompts[0].ids]))).logits
    assert torch.equal(logits, model.model(torch.tensor([plain[0]])).logits)


def test_the_order_of_passages_is_the_order_of_lines():
    model, form, made = language_model(), PromptFormat(tokenizer()), projector()
    passages, question = unit(2, 6), unit(1, 6)
    (soft,) = read_vectors(made, [passages], question, model.device)
    assert torch.allclose(soft[1], made(torch.from_numpy(passages[1:]), torch.from_numpy(question))[0], atol=1e-6)
    prompt = attend_prompt(form, 2, "Who?", 3, model.pad_id)
    shown = soft_embedding(model, form, [prompt], [soft])([0], torch.tensor([prompt.ids]))[0]
    line = 3 + len(form.newline)
    assert soft_places(form, prompt, 3) == [0, line]
    assert torch.equal(shown[0:3], soft[0]) and torch.equal(shown[line : line + 3], soft[1])


def test_a_question_gets_the_same_answer_alone_and_in_company():
    model, form, made = language_model(), PromptFormat(tokenizer()), projector()
    passages, questions = [unit(3, 6), unit(0, 6), unit(1, 6)], unit(3, 6)
    asked = ["Who founded Avalon in the year 1500?", "Why?", "Where is it?"]
    together, prompts = answer_attend(model, made, form, passages, asked, questions)
    assert [one.lines for one in prompts] == [3, 0, 1]
    alone = [answer_attend(model, made, form, [passages[n]], [asked[n]], questions[n : n + 1])[0][0] for n in range(3)]
    assert together == alone
    closed = greedy(model, [form.build([], asked[1]).ids], form.stop_ids, 14)
    assert together[1] == form.text(closed[0]), "no passages: the plain question"


def test_passages_go_when_room_is_short_never_the_question():
    form = PromptFormat(tokenizer())
    whole = attend_prompt(form, 5, "Who?", 3, 0)
    line = 3 + len(form.newline)
    cut = attend_prompt(form, 5, "Who?", 3, 0, max_tokens=len(whole.ids) - line)
    assert (whole.lines, cut.lines) == (5, 4) and len(cut.ids) == len(whole.ids) - line
    with pytest.raises(UsageError, match="the question is too long"):
        attend_prompt(form, 1, "Who?", 3, 0, max_tokens=3)


def test_a_projector_comes_back_from_disk_in_half_precision(tmp_path):
    path = tmp_path / "deep" / "projector.safetensors"
    made = projector()
    save_projector(path, made, base_digest="b" * 64, encoder="model@1/bfloat16/rule", rotation="r" * 64)
    found = load_projector(path, base_digest="b" * 64, encoder="model@1/float32/rule")
    assert found.projector.config == CONFIG and found.rotation == "r" * 64 and not found.projector.training
    for name, value in found.projector.state_dict().items():
        assert torch.equal(value, made.state_dict()[name].half().float())
    save_projector(tmp_path / "again", found.projector, base_digest="b" * 64, encoder="model@1", rotation="r" * 64)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_missing_foreign_and_damaged_weights_are_refused_by_name(tmp_path):
    path = tmp_path / "projector.safetensors"
    with pytest.raises(ModelError, match="there are no weights for the read `attend`"):
        load_projector(path)
    save_projector(path, projector(), base_digest="b" * 64, encoder="model@1/float32/rule", rotation="")
    with pytest.raises(ModelError, match="trained for another language model"):
        load_projector(path, base_digest="c" * 64)
    with pytest.raises(IncompatibleBank, match="another encoder"):
        load_projector(path, encoder="model@2/float32/rule")
    whole = path.read_bytes()
    for bad in (whole[:-20], b"nothing", whole.replace(b"mbc-attend/1", b"mbc-attend/9")):
        path.write_bytes(bad)
        with pytest.raises(DamagedFile, match="the attend weights cannot be read"):
            load_projector(path)


def test_vectors_of_another_width_and_impossible_shapes_are_refused():
    with pytest.raises(UsageError, match="do not fit the attend projector"):
        read_vectors(projector(), [unit(2, 7)], unit(1, 6), torch.device("cpu"))
    with pytest.raises(ModelError, match="cannot have this shape"):
        AttendConfig(width=6, lm_width=32, soft_tokens=0)


def test_the_scale_of_embeddings_is_their_root_mean_square():
    assert embedding_scale(torch.tensor([[3.0, 4.0], [0.0, 0.0]])) == pytest.approx(2.5)
