"""What the demo prints: the bank's figures, its sizes beside the rivals', answers with their sources, scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from mbc_core.bank import Bank
from mbc_core.cli.output import escape, table
from mbc_core.sizes import Compressed, mac_bytes, ratios

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


def show_sizes(console: Console, found: Mapping[str, Any], texts: Compressed, width: int, model: str) -> None:
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
        [f"MAC's floats on {model}, T = 12", mac_bytes(12, width)],
        [f"MAC's floats on {model}, T = 24", mac_bytes(24, width)],
    ]
    console.print(table("\nBytes a passage", ["", "bytes"], [[name, f"{size:,.1f}"] for name, size in rows]))
    share = ratios(
        documents=found["documents"],
        slots=slots,
        width=width,
        address=per["address"] * found["passages"],
        stored=found["bytes"],
    )
    labelled = [
        ["indices: address codes alone", share.indices],
        [f"with the codebook: and all {found['codebook']['version'] + 1} versions of it", share.with_codebook],
        ["all-in: tables codes and documents, with logs", share.all_in],
        ["everything on disk: and replay, ledger, adapters", share.on_disk],
    ]
    title = f"\nShare of MAC's floats ({share.mac:,} B a document on {model}, T = {slots})"
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


def show_adapter(console: Console, result: Mapping[str, Any], seconds: float) -> None:
    """The short adaptation: before, after, what became of it."""
    before, after = result["before"], result["after"]
    rows = [
        ["held-out questions about new documents", _score(before["new_f1"]), _score(after["new_f1"])],
        ["held-out questions about old documents", _score(before["old_f1"]), _score(after["old_f1"])],
    ]
    console.print(table(None, ["F1", "before", "after"], rows))
    promoted = "promoted: it is live now" if result["promoted"] else "not promoted: the adapter before it stays live"
    console.print(f"Adapter {result['candidate']}, {result['steps']} steps, {seconds:.0f} s. {promoted}.")
    console.print(f"Reason: {result['reason']}", markup=False)


def show_scores(console: Console, rows: Sequence[Sequence[object]], questions: int) -> None:
    """One row a way of reading: name, exact match, F1, bytes, milliseconds."""
    columns = ["read", "exact match", "F1", "bytes a passage", "prompt tokens", "ms a question"]
    console.print(table(f"\n{questions} seeded fill-in-the-blank questions", columns, rows))


def shorten(text: str, most: int = _SHOWN_WORDS) -> str:
    """Text cut at a word, with … when it was cut."""
    return text if len(text) <= most else text[: text.rfind(" ", 0, most)] + " …"


def _windows(names: Sequence[str]) -> str:
    days = sorted(name[:10] for name in names)
    return days[0] if len(days) == 1 else f"{days[0]} … {days[-1]}" if days else "–"


def _day(time: str | None) -> str:
    return f"[dim]{time[:10]}[/dim]" if time else ""


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
