"""`mbc adapters add` and `mbc adapters canary`: candidates from another machine, and the questions all are asked."""

from __future__ import annotations

from pathlib import Path

import click

from mbc_core.cli.options import bank_option, device_option, json_option
from mbc_core.cli.output import note, only_json, out, print_json


@click.command("add")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@bank_option
@click.option(
    "--min-questions",
    type=click.IntRange(1),
    help="Fewest new and old questions the gate takes (300). Less is for demonstrations, and noted on the card.",
)
@click.option("--no-promote", is_flag=True, help="Only record the candidate, also when it passes the gate.")
@json_option
def add_adapter(folder: Path, bank: str, min_questions: int | None, no_promote: bool, as_json: bool) -> None:
    """Take a candidate that `mbc adapt --from-set` left in FOLDER into the bank; promote it if the gate lets it pass.

    Example: mbc adapters add candidate --bank my-bank
    """
    from mbc_core.bank import Bank
    from mbc_core.training.candidate import add_candidate
    from mbc_core.training.gate import GateRule

    rule = GateRule() if min_questions is None else GateRule(min_questions=min_questions)
    with only_json(as_json) as stream:
        found = add_candidate(Bank.open(bank), folder, rule, promote=not no_promote)
        if as_json:
            print_json(found, stream)
            return
    fate = "promoted, it is live now" if found["promoted"] else "a candidate, not promoted"
    out().print(f"Adapter {found['candidate']}: {fate}.", markup=False)
    out().print(f"Gate: {found['reason']}. {found['sentence']}", markup=False)


@click.command("canary")
@bank_option
@click.option(
    "--qa",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Trusted questions: JSON Lines with id, text, question, answer. Without it the set is shown.",
)
@device_option
@json_option
def canary(bank: str, qa: Path | None, device: str, as_json: bool) -> None:
    """Show or set the canary questions: always the same, asked of every candidate; one that loses a point is refused.

    Without a set of its own a bank gets one at its first adaptation, from its own held-out questions.

    Example: mbc adapters canary --bank my-bank --qa trusted.jsonl
    """
    from mbc_core.bank import Bank
    from mbc_core.canary import load_canary, set_from_qa
    from mbc_core.cli.options import resolve_device

    opened = Bank.open(bank)
    with only_json(as_json) as stream:
        if qa is not None:
            set_from_qa(opened, qa, device=resolve_device(device))
        found = load_canary(opened)
        name, count = (None, 0) if found is None else (found.name, len(found.rows))
        if as_json:
            print_json({"canary": name, "questions": count}, stream)
            return
    note("the bank has no canary set yet" if name is None else f"canary set {name}: {count} questions")
