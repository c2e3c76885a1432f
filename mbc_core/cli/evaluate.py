"""`mbc eval`: a QA file read from a bank in many ways, with paired intervals; the stream protocol with retention."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mbc_core.cli.eval_table import show_eval
from mbc_core.cli.options import device_option, json_option, resolve_device, seed_option
from mbc_core.cli.output import note, only_json, out, print_json, progress_bar
from mbc_core.errors import UsageError
from mbc_core.evaluation.sheet import READS, Sheet
from schemas.manifest import PROFILES

if TYPE_CHECKING:
    from mbc_core.evaluation.answers import Adapters
    from mbc_core.evaluation.asking import Wanted
    from mbc_core.evaluation.protocols import Builder
    from mbc_core.evaluation.qa_file import QaSet
    from mbc_core.reader.language_model import LanguageModel

MakeBuilder = Callable[[Path, str, Callable[[str], None]], "Builder"]
"""(temporary folder, device, say) → what builds banks."""

BUILT_PROFILES = ("compact", "default", "rich")
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_FILE = click.Path(dir_okay=False, path_type=Path)

HELP = """Read the questions of a QA file in many ways and compare them.

The QA file is JSON Lines (plain or .gz), one question a row: `id` or `doc_id`, `text`, `timestamp` if there is one,
`question`, `answer` or `answers`. Without --bank its documents are ingested through the pipeline into temporary banks,
one a profile.

Example: mbc eval --qa questions.jsonl --limit 100
"""


@dataclass(frozen=True)
class Options:
    """The command line of `mbc eval`, parsed; names are those of the options."""

    qa: Path | None
    only: Mapping[str, frozenset[str]]
    documents: int | None
    limit: int | None
    bank: str | None
    profiles: tuple[str, ...]
    reads: tuple[str, ...]
    k: tuple[int, ...]
    retention: bool
    first: int
    lm: str | None
    gguf: str | None
    adapter: Path | None
    rival_text: Path | None
    rival_closed: Path | None
    attend: Path | None
    paper: Path | None
    against: tuple[str, ...]
    float_search: bool
    write_reads: Path | None
    from_reads: Path | None
    keep_answers: Path | None
    seed: int
    device: str


class Names(click.ParamType[tuple[str, ...]]):
    """Comma-separated names, each one of a list."""

    name = "names"

    def __init__(self, known: tuple[str, ...]) -> None:
        self.known = known

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None  # noqa: ANN401 (click's)
    ) -> tuple[str, ...]:  # fmt: skip
        """Split and check."""
        if isinstance(value, tuple):
            return value
        found = tuple(part.strip() for part in str(value).split(",") if part.strip())
        wrong = [name for name in found if name not in self.known]
        if wrong or not found:
            self.fail(f"{', '.join(wrong) or 'nothing'} is not among {', '.join(self.known)}", param, ctx)
        return found


def _numbers(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    """``5`` or ``5,1`` → numbers, each once."""
    parts = [part.strip() for part in value.split(",")]
    if not all(part.isdigit() and int(part) for part in parts):
        raise click.BadParameter(f"{value!r} is not a list of numbers such as 5 or 5,1", context, parameter)
    return tuple(dict.fromkeys(int(part) for part in parts))


def _conditions(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> dict[str, frozenset[str]]:
    """``FIELD=VALUE,VALUE`` options."""
    found: dict[str, frozenset[str]] = {}
    for value in values:
        field, equals, wanted = value.partition("=")
        if not equals or not field or not wanted:
            raise click.BadParameter(f"{value!r} is not FIELD=VALUE", context, parameter)
        found[field] = found.get(field, frozenset()) | frozenset(wanted.split(","))
    return found


def make(build: MakeBuilder | None) -> click.Command:
    """The command; ``build`` None: it can read given banks and question sheets, but build no bank."""

    @click.command("eval", help=HELP)
    @click.option("--qa", type=_FILE, help="The QA file.")
    @click.option(
        "--only",
        multiple=True,
        callback=_conditions,
        metavar="FIELD=VALUE,…",
        help="Rows with these values; repeatable.",
    )
    @click.option("--documents", type=click.IntRange(1), help="Only the file's first so many documents.")
    @click.option("--limit", type=click.IntRange(1), help="At most so many questions, drawn by the seed.")
    @click.option("--bank", metavar="URI", help="Read this bank instead of building one.")
    @click.option(
        "--profiles",
        type=Names(tuple(PROFILES)),
        default=(),
        help=f"Comma-separated; of the banks to build (default {','.join(BUILT_PROFILES)}; with --retention: default).",
    )
    @click.option(
        "--reads", type=Names(tuple(READS)), default=(), help=f"Comma-separated; all by default: {', '.join(READS)}."
    )
    @click.option(
        "--k", callback=_numbers, default="5", show_default=True, help="Passages shown; 5,1 makes rows for both."
    )
    @click.option("--retention", is_flag=True, help="Stream the documents in order and ask about the first ones again.")
    @click.option(
        "--first", type=click.IntRange(1), default=200, show_default=True, help="Documents asked about again."
    )
    @click.option("--lm", metavar="NAME", help="Another language model: a folder or a Hugging Face name.")
    @click.option("--gguf", metavar="FILE", help="Name of the GGUF file inside the folder of --lm.")
    @click.option(
        "--adapter", type=_FOLDER, help="Adapter under test (default: the bank's live one, else the shipped)."
    )
    @click.option("--rival-text", type=_FOLDER, help="Adapter trained equally on full text.")
    @click.option("--rival-closed", type=_FOLDER, help="Adapter trained equally without memory.")
    @click.option("--attend", type=_FOLDER, help="Weights of the read attend (default: the shipped ones).")
    @click.option("--paper", type=_FOLDER, help="Weights of the read aggregate (default: the shipped ones).")
    @click.option(
        "--against", multiple=True, metavar="READ", help="Compare with this row (default: closed book, text)."
    )
    @click.option("--float/--no-float", "float_search", default=True, show_default=True, help="Search embeddings too.")
    @click.option(
        "--write-reads", type=_FILE, help="Write what each read shows, and stop: no language model is loaded."
    )
    @click.option(
        "--from-reads", type=_FILE, help="Answer what --write-reads wrote; no bank and no encoder are needed."
    )
    @click.option(
        "--keep-answers", type=_FILE, help="Add each read's answers to this file; a rerun goes on from there."
    )
    @seed_option
    @device_option
    @json_option
    def evaluate(as_json: bool, **options: Any) -> None:  # noqa: ANN401 (checked by Options)
        """See HELP."""
        told = Options(**options)
        _check(told, build)
        with only_json(as_json) as stream:
            result = run_eval(replace(told, device=resolve_device(told.device)), build)
            if as_json:
                print_json(result, stream)
                return
        if "rows" in result:
            show_eval(result, out())
        else:
            out().print(f"{result['reads']} reads of {result['questions']:,} questions in {result['written']}")

    return evaluate


def run_eval(told: Options, build: MakeBuilder | None) -> dict[str, Any]:
    """What ``mbc eval --json`` prints; with ``--write-reads`` only what was written.

    Raises:
        UsageError: options that do not go together, or texts that nobody has.
        MbcError: banks, adapters or files that cannot be used.
    """
    from mbc_core.evaluation.sheet import load_sheet, save_sheet

    sheet = load_sheet(told.from_reads) if told.from_reads is not None else _make_sheet(told, build)
    if told.write_reads is not None:
        save_sheet(told.write_reads, sheet)
        asked = max(len(one.questions) for one in sheet.shown)
        return {"written": str(told.write_reads), "reads": len(sheet.shown), "questions": asked}
    return _answer(sheet, told)


def _make_sheet(told: Options, build: MakeBuilder | None) -> Sheet:
    """Step one: banks and what they show."""
    from mbc_core.evaluation.asking import Wanted
    from mbc_core.evaluation.protocols import sheet_of_banks, sheet_of_stream
    from mbc_core.evaluation.qa_file import load_qa

    if told.qa is None:
        raise click.UsageError("Give --qa FILE (or --from-reads FILE).")
    qa = load_qa(told.qa, told.only).first_documents(told.documents)
    note(f"{len(qa.documents):,} documents, {len(qa.questions):,} questions in {told.qa}")
    wanted = Wanted(_reads(told), told.k, told.limit, told.seed, told.float_search)
    if told.bank is not None:
        return _sheet_of_bank(qa, told.bank, wanted, told)
    if build is None:
        raise click.UsageError("This command builds no banks: give --bank or --from-reads, or use `mbc eval`.")
    with tempfile.TemporaryDirectory(prefix="mbc-eval-") as folder:
        builder = build(Path(folder), told.device, note)
        if told.retention:
            profile = (told.profiles or ("default",))[0]
            return sheet_of_stream(qa, builder, profile, wanted, first=told.first, say=note)
        memories = {}
        for profile in told.profiles or BUILT_PROFILES:
            builder.add(profile, profile, qa.documents)
            memories[profile] = builder.open(profile)
        return sheet_of_banks(qa, memories, builder.encoder, wanted, note)


def _sheet_of_bank(qa: QaSet, bank: str, wanted: Wanted, told: Options) -> Sheet:
    from mbc_core import defaults
    from mbc_core.bank import Bank
    from mbc_core.evaluation.protocols import sheet_of_banks
    from mbc_core.memory import Memory

    opened = Bank.open(bank)
    profile = opened.manifest.profile
    if told.profiles and told.profiles != (profile,):
        raise UsageError(
            "the bank has another profile",
            value=profile,
            cause=f"--profiles says {', '.join(told.profiles)}",
            fix="leave --profiles out, or leave --bank out to build banks of these profiles",
        )
    encoder = defaults.encoder_for(opened.manifest, device=told.device)
    return sheet_of_banks(qa, {profile: Memory.open(opened, encoder)}, encoder, wanted, note)


def _answer(sheet: Sheet, told: Options) -> dict[str, Any]:
    """Step two: the language model answers."""
    from mbc_core import defaults
    from mbc_core.evaluation.answers import answer_sheet
    from mbc_core.evaluation.kept_answers import KeptAnswers
    from mbc_core.evaluation.report import make_result

    base = defaults.language_model(told.lm, gguf_file=told.gguf, device=told.device)
    with _adapters(base, told, sheet) as (adapters, name):
        total = sum(len(one.questions) for one in sheet.shown if adapters.has(one.adapter))
        note(f"{total:,} answers by {base.name}, adapter {name or 'none'}, on {told.device}")
        with progress_bar("answering", total) as advance:
            kept = KeptAnswers(told.keep_answers) if told.keep_answers is not None else None
            answered = answer_sheet(sheet, base, adapters, kept=kept, progress=advance, say=note)
    result = dict(make_result(sheet, answered, told.against, told.seed))
    result["settings"] = {
        **sheet.figures.get("settings", {}),
        "lm": base.name,
        "lm_digest": base.digest,
        "adapter": name,
        "rival_text": str(told.rival_text) if told.rival_text else None,
        "rival_closed": str(told.rival_closed) if told.rival_closed else None,
        "attend": str(told.attend) if told.attend else "shipped" if adapters.attend else None,
        "paper": str(told.paper) if told.paper else "shipped" if adapters.aggregate else None,
        "device": told.device,
        "bootstrap_seed": told.seed,
    }
    return result


@contextlib.contextmanager
def _adapters(base: LanguageModel, told: Options, sheet: Sheet) -> Iterator[tuple[Adapters, str | None]]:
    """Folders of the adapters, and the name of the one under test: given, the bank's live one, shipped, or none."""
    from mbc_core import defaults
    from mbc_core.evaluation.answers import Adapters
    from mbc_core.evaluation.whole_bank import paper_folder
    from mbc_core.reader.kv_lora import adapter_base

    with tempfile.TemporaryDirectory(prefix="mbc-eval-adapter-") as place:
        own, name = told.adapter, str(told.adapter) if told.adapter is not None else None
        if own is None and told.bank is not None:
            from mbc_core.adapters import AdapterRegistry
            from mbc_core.bank import Bank

            registry = AdapterRegistry(Bank.open(told.bank))
            name = registry.live(base.digest)
            own = registry.load(name, Path(place)) if name is not None else None
        shipped = defaults.reader_adapter()
        if own is None and shipped is not None and adapter_base(shipped) == base.digest:
            own, name = shipped, "shipped"
        paper = paper_folder(sheet, base.digest, told.paper, told.reads)
        attend = _attend(base, told) if told.attend or any(one.adapter == "attend" for one in sheet.shown) else None
        yield Adapters(own, told.rival_closed, told.rival_text, attend, paper), name


def _attend(base: LanguageModel, told: Options) -> Path | None:
    """Weights of the read attend: given, or shipped for this language model; missing ones are an error when named."""
    from mbc_core import defaults, weights
    from mbc_core.reader.attend import PROJECTOR_FILE, load_projector

    found = defaults.attend_weights(given=told.attend)
    named = told.attend is not None or any(READS[read].adapter == "attend" for read in told.reads)
    if found is None and not named:
        return None
    path = (found or weights.path(defaults.ATTEND)) / PROJECTOR_FILE
    belongs = load_projector(path).base_digest == base.digest
    if named and not belongs:
        load_projector(path, base_digest=base.digest)  # says whose they are
    return path.parent if belongs else None


def _reads(told: Options) -> tuple[str, ...]:
    """The reads named; else all that can be answered, or could be on another machine."""
    if told.reads:
        return told.reads
    from mbc_core import defaults

    attend = defaults.attend_weights(given=told.attend) is not None
    given = {
        "own": True,
        "closed": told.rival_closed is not None,
        "text": told.rival_text is not None,
        "attend": attend,
        "aggregate": told.paper is not None or any(defaults.has_paper_weights(slots) for slots in (12, 24)),
    }
    return tuple(name for name, kind in READS.items() if given[kind.adapter] or told.write_reads is not None)


def _check(told: Options, build: MakeBuilder | None) -> None:
    """Options that do not go together are wrong use, before anything is read."""
    if (told.qa is None) == (told.from_reads is None):
        raise click.UsageError("Give --qa FILE, or --from-reads FILE alone.")
    if told.from_reads is not None and (told.bank or told.write_reads or told.retention or told.reads):
        raise click.UsageError("--from-reads answers what was written: leave out --bank, --reads, --retention.")
    if told.retention and told.bank is not None:
        raise click.UsageError("--retention streams documents into a bank of its own: leave out --bank.")
    if told.retention and len(told.profiles) > 1:
        raise click.UsageError("--retention streams into one bank: name one profile.")
    rivals = {"closed": (told.rival_closed, "--rival-closed"), "text": (told.rival_text, "--rival-text")}
    # attend's weights may be shipped; whether they are is told by name when they are loaded
    for read in told.reads if told.write_reads is None else ():
        folder, option = rivals.get(READS[read].adapter, (Path(), ""))
        if folder is None:
            raise click.UsageError(f"The read {read} is answered by another adapter: give {option} FOLDER.")


evaluate = make(None)
"""Without the pipeline: for given banks and question sheets."""
