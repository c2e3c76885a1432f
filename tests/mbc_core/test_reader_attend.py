"""The projector and its prompts: shapes, order, equality with plain prompts, files, and what is refused by name."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mbc_core.codes import Rotation, pack, quantize, to_slots, unpack
from mbc_core.errors import DamagedFile, IncompatibleBank, ModelError, UsageError
from mbc_core.reader.attend import (
    ANSWER,
    TOPIC,
    AttendConfig,
    AttendProjector,
    four_bits,
    load_projector,
    passage_vectors,
    save_projector,
    to_four_bits,
)
from mbc_core.reader.attend_prompt import answer_attend, attend_prompt, put, read_vectors, soft_embedding, soft_places
from mbc_core.reader.generate import answer_prompts, greedy
from mbc_core.reader.prompt import PromptFormat
from tests.mbc_core.tiny_reader import language_model, tokenizer

pytestmark = pytest.mark.usefixtures("single_thread")

CONFIG = AttendConfig(width=6, lm_width=32, words=9, answers=2, topics=3, hidden=16, dropout=0.5)
RNG = np.random.default_rng(0)
TOKENS = torch.tensor([[n + 1, n + 31 if n % 2 else -1] for n in range(9)])  # odd words have two tokens
EMBEDDINGS = torch.randn(60, 32, generator=torch.Generator().manual_seed(1))


def projector(config: AttendConfig = CONFIG, seed: int = 0) -> AttendProjector:
    """Random weights everywhere, also where training starts from zero."""
    torch.manual_seed(seed)
    made = AttendProjector(config, torch.from_numpy(unit(config.words, config.width)), TOKENS).eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return made


def unit(*shape: int) -> np.ndarray:
    vectors = np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def pair(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(unit(count, 6)), torch.from_numpy(unit(count + 1, 6)[1:].copy())


def test_a_passage_becomes_the_tokens_of_the_likeliest_words_of_each_head():
    """By a plain loop: sort the words, write their tokens one after the other, cut at the head's room."""
    made = projector()
    passages, questions = pair(4)
    likelihood = made.logits(passages, questions).log_softmax(-1)
    ids, likely = made.chosen(passages, questions)
    soft = made(passages, questions, EMBEDDINGS)
    assert ids.shape == likely.shape == (4, 5) and soft.shape == (4, 5, 32)
    for row in range(4):
        expected = []
        for head, room in ((ANSWER, 2), (TOPIC, 3)):
            spelled = []
            for word in likelihood[row, head].argsort(descending=True).tolist():
                spelled += [(n, head, word) for n in TOKENS[word].tolist() if n >= 0]
            expected += spelled[:room]
        assert ids[row].tolist() == [n for n, _, _ in expected]
        for place, (n, head, word) in enumerate(expected):
            here = float(likelihood[row, head, word].detach())
            assert float(likely[row, place].detach()) == pytest.approx(here, abs=1e-5)
            moved = EMBEDDINGS[n] + made.likely[head] * (here / 8 + 1)
            assert torch.allclose(soft[row, place], moved, atol=1e-5)


def test_the_logits_are_inner_products_with_the_dictionary():
    made = projector()
    passages, questions = pair(3)
    features = torch.stack(
        [4 * (passages * questions).sum(1), 4 * torch.cosine_similarity(passages, questions), 4 * passages.norm(dim=1)],
        1,
    )
    both = made.norm(torch.cat([passages, questions, 10 * passages * questions], 1))
    hidden = made.outer(torch.nn.functional.gelu(made.inner(torch.cat([both, features], 1)))).view(3, 2, 6)
    for row in range(3):
        for head in range(2):
            pointed = (
                passages[row] @ made.from_passage[head] + questions[row] @ made.from_question[head] + hidden[row, head]
            )
            expected = made.scale * (made.dictionary @ pointed) + made.bias[head]
            assert torch.allclose(made.logits(passages, questions)[row, head], expected, atol=1e-4)


def test_without_the_question_it_cannot_matter():
    made = projector(replace(CONFIG, question=False))
    passages, questions = pair(4)
    assert torch.equal(made.logits(passages, questions), made.logits(passages, questions.flip(0)))
    asked = projector()
    assert not torch.equal(asked.logits(passages, questions), asked.logits(passages, questions.flip(0)))


def test_a_fresh_projector_asks_the_dictionary_for_the_passage_itself():
    made = AttendProjector(CONFIG, torch.from_numpy(unit(9, 6)), TOKENS).eval()
    passages, questions = pair(4)
    for head in (ANSWER, TOPIC):
        found = made.logits(passages, questions)[:, head]
        assert torch.allclose(found, 9 * passages @ made.dictionary.T, atol=1e-5)


@pytest.mark.parametrize("named", [True, False])
def test_the_gradient_reaches_every_weight(named):
    """Naming moves everything but the direction of likelihood; what is shown moves that, and through it the rest."""
    made = projector().train()
    passages, questions = pair(4)
    if named:
        made.logits(passages, questions).log_softmax(-1)[..., 0].sum().backward()
    else:
        made(passages, questions, EMBEDDINGS).square().sum().backward()
    reached = {
        name for name, weight in made.named_parameters() if weight.grad is not None and weight.grad.abs().sum() > 0
    }
    assert reached == {name for name, _ in made.named_parameters()} - ({"likely"} if named else set())


def test_four_bits_keep_a_vector_and_are_kept_themselves():
    vectors = torch.from_numpy(unit(50, 96))
    once = four_bits(*to_four_bits(vectors))
    assert torch.cosine_similarity(once, vectors).min() > 0.98
    assert torch.equal(four_bits(*to_four_bits(once)), once)
    assert torch.equal(four_bits(*to_four_bits(torch.zeros(1, 4))), torch.zeros(1, 4))


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
    embeddings = model.model.get_input_embeddings().weight
    (soft,) = read_vectors(made, [passages], question, embeddings)
    alone = made(torch.from_numpy(passages[1:]), torch.from_numpy(question), embeddings)[0]
    assert torch.allclose(soft[1], alone, atol=1e-6)
    prompt = attend_prompt(form, 2, "Who?", 5, model.pad_id)
    shown = soft_embedding(model, form, [prompt], [soft])([0], torch.tensor([prompt.ids]))[0]
    line = 5 + len(form.newline)
    assert soft_places(form, prompt, 5) == [0, line]
    assert torch.equal(shown[0:5], soft[0]) and torch.equal(shown[line : line + 5], soft[1])


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
    for name, value in found.projector.named_parameters():
        assert torch.equal(value, made.get_parameter(name).half().float())
    assert torch.equal(found.projector.dictionary, made.dictionary) and torch.equal(found.projector.tokens, made.tokens)
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
        read_vectors(projector(), [unit(2, 7)], unit(1, 6), EMBEDDINGS)
    with pytest.raises(ModelError, match="cannot have this shape"):
        AttendConfig(width=6, lm_width=32, words=9, answers=0, topics=0)
