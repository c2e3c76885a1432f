"""What the demo prints: the bank's figures, its sizes beside the rivals', answers with their sources, scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from mbc_core.bank import Bank
from mbc_core.cli.output import escape, table
from mbc_core.sizes import Compressed, mac_bytes, ratios

if TYPE_CHECKING:
    from mbc_core.evaluation.scored_set import Scored, ScoredQuestion
    from mbc_core.memory import Recalled

MODEL, WIDTH = "SmolLM2-135M", 576  # whose width MAC's floats are counted with
_SHOWN_WORDS = 160


def show_bank(console: Console, bank: Bank, found: Mapping[str, Any]) -> None:
    """Documents, passages, windows, and every codebook version."""
    per_window = found["documents"] / max(found["windows"], 1)
    console.print(
        f"{found['documents']:,} documents, {found['passages']:,} passages, {found['windows']:,} windows of about"
        f" {per_window:,.0f} documents, {found['dead_letters']:,} dead letters"
    )
    rows = sorted(bank.read("codebook_versions").to_pylist(), key=lambda row: row["version"])
    size = found["codebook"]["K"]
    columns = ["version", "learned from windows", "vectors", "codes used", "perplexity", "resets"]
    shown = [
        [
            row["version"],
            _windows(row["built_from"]) if row["version"] else "shipped with the release",
            row["vectors"] or "–",
            f"{row['used']} of {size}",
            f"{row['perplexity']:.1f}",
            row["resets"] if row["version"] else "–",
        ]
        for row in rows
    ]
    console.print(table("\nCodebook versions", columns, shown))
    console.print(
        "A window uses the newest version learned from windows at least two before it; the statistics wait until they"
        f" hold {20 * size:,} vectors."
    )


def show_sizes(console: Console, bank: Bank, found: Mapping[str, Any], texts: Compressed) -> None:
    """Bytes a passage beside text, zstd and MAC's floats, and the labelled ratios."""
    per, slots = found["bytes_per_passage"], found["codebook"]["T"]
    rows = [
        ["address codes", per["address"]],
        ["word codes", per["words"]],
        ["codes table, as stored (both, with keys, times, logs)", per["codes_table"]],
        ["all-in: codes and documents tables (ids, titles, links)", per["all_in"]],
        ["the text, UTF-8", texts.text],
        ["the text, zstd -19, each passage alone", texts.zstd],
        [f"the same with a {texts.dictionary / 1024:,.0f} KB dictionary trained on it", texts.zstd_dictionary],
        [f"MAC's floats on {MODEL}, T = 12", mac_bytes(12, WIDTH)],
        [f"MAC's floats on {MODEL}, T = 24", mac_bytes(24, WIDTH)],
    ]
    console.print(table("\nBytes a passage", ["", "bytes"], [[name, f"{size:,.1f}"] for name, size in rows]))
    books = [one for one in bank.storage.list("codebooks") if one.path.count("/") == 1]
    share = ratios(
        documents=found["documents"],
        slots=slots,
        width=WIDTH,
        address=per["address"] * found["passages"],
        codebooks=sum(one.size for one in books),
        stored=found["bytes"],
    )
    labelled = [
        ["indices: address codes alone", share.indices],
        [
            f"with the codebook: and its files, {len(books)} in all",
            share.with_codebook,
        ],
        ["all-in: tables codes and documents, with logs", share.all_in],
        ["everything on disk: and replay, ledger, adapters", share.on_disk],
    ]
    title = f"\nShare of MAC's floats ({share.mac:,} B a document on {MODEL}, T = {slots})"
    console.print(table(title, ["", "share"], [[name, f"{100 * value:.3f}%"] for name, value in labelled]))


def show_answer(console: Console, answer: Mapping[str, Any], expected: str, right: bool, most: int = 3) -> None:
    """Question, answer, whether it is right, and the sources with the words that were recalled."""
    console.print(f"\n[bold]Q[/bold] {escape(answer['question'])}")
    verdict = "[green]right[/green]" if right else f"[red]wrong[/red]: the text says {escape(expected)}"
    spent = answer["milliseconds"]
    console.print(
        f"[bold]A[/bold] {escape(answer['answer']) or '(nothing)'}   {verdict}"
        f"   [dim]recall {spent['recall']:.0f} ms, generate {spent['generate']:.0f} ms[/dim]"
    )
    for source in answer["sources"][:most]:
        console.print(
            f"  [cyan]{escape(source['title'] or source['doc_id'])}[/cyan] {_day(source['event_time'])}"
            f" {source['score']:.2f}  {escape(shorten(source['words']))}"
        )


def show_found(
    console: Console, asked: Sequence[ScoredQuestion], recalled: Sequence[Sequence[Recalled]]
) -> dict[str, float]:
    """How often the question's own document is recalled, first and among all; returns the shares."""
    ranks = [[one.doc_id for one in found] for found in recalled]
    first = sum(found[:1] == [question.doc_id] for question, found in zip(asked, ranks, strict=True))
    among = sum(question.doc_id in found for question, found in zip(asked, ranks, strict=True))
    console.print(
        f"Recall by the codes alone: the right document first for {first}, among the first {len(ranks[0])} for {among}"
        f" of {len(asked)} questions"
    )
    return {"first": first / len(asked), "among": among / len(asked), "questions": len(asked)}


def show_scores(console: Console, scored: Scored, profile: str) -> None:
    """One row a way of reading."""
    names = {
        "recall": f"recall: word codes of the bank ({profile})",
        "closed": "closed book: the same model without memory",
        "text": "full text of the same passages",
    }
    rows = [
        [
            names[row["read"]],
            f"{row['em']:.0f} [{row['em_low']:.0f}, {row['em_high']:.0f}]",
            f"{row['f1']:.0f} [{row['f1_low']:.0f}, {row['f1_high']:.0f}]",
            f"{row['bytes_per_passage']:,.0f}",
            f"{row['prompt_tokens']:,.0f}",
            f"{row['milliseconds']:,.0f}",
        ]
        for row in scored.rows
    ]
    columns = ["read", "exact match, % [95%]", "F1, % [95%]", "bytes a passage", "prompt tokens", "ms a question"]
    title = f"{len(scored.questions)} seeded fill-in-the-blank questions about documents that no adapter was trained on"
    console.print(table(title, columns, rows))


def show_wrong(console: Console, scored: Scored, recalled: Sequence[Sequence[Recalled]], most: int) -> None:
    """The first wrong answers, with what was recalled and whether the answer was among it."""
    from mbc_core.evaluation.metrics import exact_match, normalise

    wrong = [
        (question, said, found)
        for question, said, found in zip(scored.questions, scored.predictions["recall"], recalled, strict=True)
        if not exact_match(said, [question.answer])
    ]
    total = len(scored.questions)
    console.print(f"\n{len(wrong)} of {total} answers by recall are not an exact match; the first {most}:")
    for question, said, found in wrong[:most]:
        console.print(f"\n[bold]Q[/bold] {escape(question.question)}")
        console.print(f"[bold]A[/bold] {escape(said) or '(nothing)'}   [red]wrong[/red]: {escape(question.answer)}")
        own = [one for one in found if one.doc_id == question.doc_id]
        if not own:
            console.print(f"  {escape(question.title or question.doc_id)} was not among the recalled passages")
            continue
        kept = normalise(question.answer) in normalise(own[0].words)
        console.print(f"  [cyan]{escape(own[0].title or own[0].doc_id)}[/cyan]  {escape(shorten(own[0].words))}")
        console.print(f"  [dim]{'its words hold the answer: the model misread' if kept else 'its words lack it'}[/dim]")


def shorten(text: str, most: int = _SHOWN_WORDS) -> str:
    """Text cut at a word, with … when it was cut."""
    return text if len(text) <= most else text[: text.rfind(" ", 0, most)] + " …"


def _windows(names: Sequence[str]) -> str:
    days = sorted(name[:10] for name in names)
    return days[0] if len(days) == 1 else f"{days[0]} … {days[-1]}" if days else "–"


def _day(time: str | None) -> str:
    return f"[dim]{time[:10]}[/dim]" if time else ""
