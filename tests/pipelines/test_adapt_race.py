"""Two whole adaptations of one bank at once: the one that ends first goes live, the other stays with its reason."""

from __future__ import annotations

import pytest
import tiny_reader
from test_adapt import RUN, by_decree, pieces
from tiny import corpus, settings, write_corpus

from mbc_core.adapters import AdapterRegistry
from mbc_core.bank import Bank
from mbc_core.errors import LostRace
from pipelines.adapt import run_adapt
from pipelines.ingest import run_ingest


@pytest.mark.slow
def test_the_adaptation_that_ends_later_is_not_promoted_over_what_it_was_not_compared_with(tmp_path, monkeypatch):
    given = settings(tmp_path / "w", replay_per_window=64)
    run_ingest([write_corpus(tmp_path / "a.jsonl", corpus(60))], str(tmp_path / "bank"), given, show_progress=False)
    by_decree(monkeypatch, True)
    ended = []

    def meanwhile(line: str) -> None:
        """The whole second job, while the first one is under way."""
        if not ended:
            ended.append("begun")
            ended[0] = run_adapt(tmp_path / "bank", RUN, **pieces())

    with pytest.raises(LostRace, match="was not compared with the adapter that is live"):
        run_adapt(tmp_path / "bank", RUN, say=meanwhile, **pieces())
    (first,) = ended
    assert first["promoted"]
    registry = AdapterRegistry(Bank.open(tmp_path / "bank"))
    infos = {info.state: info for info in registry.list()}
    assert set(infos) == {"live", "candidate"} and infos["live"].version == first["candidate"]
    assert registry.live(tiny_reader.language_model().digest) == first["candidate"]
    lineage = infos["candidate"].lineage
    assert (lineage.promote, lineage.reason, lineage.parent) == (True, "promoted", None)
    assert lineage.sentence == "promoted by decree"
