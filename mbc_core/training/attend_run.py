"""Size and speed of a run of ``mbc train attend``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from mbc_core.reader.kv_lora import KVLoraConfig
from mbc_core.training.attend_naming import NamingPhase
from mbc_core.training.samples import Mixture

ATTEND_MIXTURE = Mixture(cloze=0.4, passages=(1, 3, 5), weights=(0.55, 0.3, 0.15), full_text=0.0, text_tokens=1)


@dataclass(frozen=True, slots=True)
class AttendRun:
    """Size and speed of a run.

    Attributes:
        steps, minutes: the whole run ends at whichever comes first; minutes are of the language model's training alone.
            0 steps: the projector learns to name words, and the adapter that the run starts from reads them as it is.
        call_minutes: stop after so many minutes of training in this call and leave a checkpoint to resume from.
        batch: samples a step; rows: samples of one forward pass.
        words: in the dictionary.
        answers, topics, hidden, question, dropout: of the projector (:class:`AttendConfig`).
        variants: share of lines shown by each codebook's codes, and last by the float embedding.
        closed: train the adapter without memory on the very same questions: the equally trained closed book.
        as_found: share of samples that show what recall finds, the true passage among it or not.
        sentences: of each passage that are passages too, at most.
        cloze_each: cloze questions made of a passage, at most.
        naming: the projector's own training.
        mixture: passages a question, cloze questions, distractors.
    """

    steps: int | None = None
    minutes: float | None = 6.0
    call_minutes: float | None = None
    batch: int = 512
    rows: int = 256
    lr: float = 7e-4
    seed: int = 0
    compile_layers: bool = True
    evaluate_every: float = 0.25
    evaluate_questions: int = 500
    words: int = 16_384
    answers: int = 8
    topics: int = 8
    hidden: int = 768
    question: bool = True
    dropout: float = 0.3
    variants: tuple[float, ...] = (0.7, 0.15, 0.15)
    closed: bool = False
    as_found: float = 0.25
    sentences: int = 2
    cloze_each: int = 2
    naming: NamingPhase = field(default_factory=NamingPhase)
    kv_lora: KVLoraConfig = field(default_factory=KVLoraConfig)
    mixture: Mixture = ATTEND_MIXTURE

    @property
    def shown(self) -> Mixture:
        """What samples show."""
        return replace(self.mixture, no_memory=1.0) if self.closed else self.mixture
