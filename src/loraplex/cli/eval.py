"""`loraplex eval`: how well the classifiers of a bundle or a server answer labelled conversations."""

import json
import os
import time
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from loraplex.amounts import counted
from loraplex.cli.asked import (
    INTERRUPTED,
    OPTION,
    ClassifiersOption,
    ConversationsOption,
    DataOption,
    figures_table,
    loaded,
    names_of,
    progress,
)
from loraplex.cli.options import (
    AdapterOption,
    BackendOption,
    DeviceOption,
    DtypeOption,
    errors_to_exit,
    named_adapters,
    origins,
    stderr,
    stdout,
)
from loraplex.cli.remote import JsonOption
from loraplex.errors import ConfigurationError, ForbiddenError, NotFoundError

if TYPE_CHECKING:
    from loraplex.bundle import AdapterSource
    from loraplex.evaluation.asking import Outcome, Plan
    from loraplex.evaluation.judged import Judged

CONCURRENCY = 8  # conversations that a server is asked about at once
TIMEOUT_S = 300.0
# The columns that 80 characters hold. --json and --html have all figures.
SHOWN = ("n", "accuracy", "f1", "auc", "ece", "coverage", "wrong_above_gate")

Evaluated = tuple[dict[str, "Judged"], dict[str, Any]]  # by classifier, and the report


def evaluate(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="BUNDLE|URL",
            help="A bundle, or a base; or a running server. Set its API key in LORAPLEX_API_KEY.",
            show_default=False,
        ),
    ],
    data: DataOption,
    classifiers: ClassifiersOption = None,
    conversations: ConversationsOption = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page with plots, and the texts of the worst mistakes.")
    ] = None,
    as_json: JsonOption = False,
    bare_base: Annotated[
        bool, typer.Option("--bare-base", help="Ask the base without its adapters: what do they add?")
    ] = False,
    concurrency: Annotated[
        int | None, typer.Option(metavar="N", min=1, help=f"With a URL: ask so many at once. Default: {CONCURRENCY}.")
    ] = None,
    adapter: AdapterOption = None,
    backend: BackendOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Compare classifiers' answers with labels: accuracy, F1, AUC, calibration, and what the abstain gate lets through.

    Each line of FILE is {"text": "…", "labels": {"isDone": true}}; "conversation" or "messages" may stand in place of
    "text". A classifier is asked about the conversations that have a label for it.

    Example: [bold]loraplex eval examples/support_desk/bundle --data dev.jsonl.gz --html report.html[/]

    Example: [bold]loraplex eval http://127.0.0.1:8000 --data dev.jsonl.gz --classifier isFraud --json[/]

    Exit code 0: every question was answered; 1: an error, told with its remedy, or a question without an answer; 2: an
    error of the command line, told with its usage; 130: interrupted.
    """
    given, wanted, adapters = origins(context), names_of(classifiers), named_adapters(adapter)
    is_url = source.startswith(("http://", "https://"))
    for name in ("adapter", "backend", "bare_base", "device", "dtype") if is_url else ("concurrency",):
        if given.get(name, "").startswith("--"):  # variables of the environment may be meant for others
            raise typer.BadParameter(
                f"has no effect on a {'running server' if is_url else 'bundle'}", param_hint=given[name].strip()
            )
    with errors_to_exit():
        if html is not None:
            _check_page(html, data)
        try:
            if is_url:
                judged, report = _at_server(source, data, wanted, conversations, concurrency or CONCURRENCY)
            else:
                engine = {"backend": backend, "device": device, "dtype": dtype}
                judged, report = _in_process(source, data, wanted, conversations, engine, given, adapters, bare_base)
        except KeyboardInterrupt:
            stderr.print("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        if as_json:
            typer.echo(json.dumps(report, ensure_ascii=False, allow_nan=False))
        else:
            _show(report)
        if html is not None:  # at the end, so that an error costs no figures
            _write(html, judged, report)
    if report["mean"]["failed"]:
        raise typer.Exit(1)


def _check_page(path: Path, data: Path) -> None:
    """Raise ConfigurationError where the page could not be written, or would replace the data."""
    what = ""
    if not path.absolute().parent.is_dir():
        what = "there is no such folder"
    elif os.path.isdir(path):  # unlike Path's own, it takes names that are too long
        what = "is a folder"
    elif os.path.exists(path) and os.path.exists(data) and path.samefile(data):
        what = "is the file of --data"
    elif not os.access(path.absolute().parent, os.W_OK):
        what = "its folder cannot be written to"
    if what:
        raise ConfigurationError(f"--html {path}", what, remedy="name another file, such as report.html")


def _in_process(
    path: str,
    data: Path,
    wanted: Seq[str],
    num: int | None,
    engine: Mapping[str, Any],
    given: Mapping[str, str],
    adapters: Mapping[str, str],
    bare_base: bool,
) -> Evaluated:
    from loraplex.evaluation.asking import ask_in_process

    with loaded(path, data, wanted, num, engine, given, adapters) as found:
        started = time.monotonic()
        with progress(len(found.plan.questions)) as advance:
            outcomes = ask_in_process(found.loraplex, found.plan.questions, advance, bare_base=bare_base)
        seconds = time.monotonic() - started
    about = {**found.about, "bare_base": bare_base}
    asked = {name for one in found.plan.questions for name in one.classifiers}
    trained = [] if bare_base else _trained_on(data, [one for one in found.bundle.adapters if one.name in asked])
    return _evaluated(found.plan, outcomes, found.labels, data, path, seconds, about, trained)


def _trained_on(data: Path, sources: "Seq[AdapterSource]") -> list[str]:
    """Return the names of the adapters that `loraplex train` made of this very file."""
    from loraplex.measuring.files import sha256
    from loraplex.training.output import RECORD

    def trained_on(folder: Path) -> Any:
        try:
            return json.loads((folder / RECORD).read_bytes())["data"]["sha256"]
        except (OSError, ValueError, LookupError, TypeError):  # none, or another program's
            return None

    own = sha256(data)
    return [one.name for one in sources if trained_on(one.path) == own]


def _at_server(url: str, data: Path, wanted: Seq[str], num: int | None, concurrency: int) -> Evaluated:
    from loraplex.client import Client
    from loraplex.evaluation.asking import ask_server, plan, sample
    from loraplex.labelled import read_labelled
    from loraplex.measuring.about import command, now, versions

    about = {"started": now(), "command": command(), "versions": versions(("loraplex",))}
    with Client(url, timeout=TIMEOUT_S) as client:
        try:
            names = [one.id for one in client.models() if one.parent is not None]
        except NotFoundError as exc:
            raise ConfigurationError(
                url, f"has no models: {exc.message}", remedy="give the server's URL without a path"
            ) from None
        try:
            found = {one.name: one for one in client.adapters()}
            leads_to = {one.name: next(iter(one.targets)) for one in client.routes()}
        except (
            ForbiddenError
        ):  # a key with the scope `infer`: a classifier's labels are then those of its first verdict
            found, leads_to = {}, {}
        listed = {name: found.get(leads_to.get(name, name)) for name in names}
        labels = {name: one.labels for name, one in listed.items() if one is not None and one.labels is not None}
        known = {name: one is None or one.state != "ready" or name in labels for name, one in listed.items()}
        checked = {name: labels[name] for name in wanted or labels if name in labels}
        all_rows = read_labelled(data, checked, wanted[0] if len(wanted) == 1 else None, option=OPTION)
        planned = plan(sample(all_rows, num, data), known, wanted, data)
        started = time.monotonic()
        with progress(len(planned.questions)) as advance:
            outcomes = ask_server(client, planned.questions, concurrency, advance)
        seconds = time.monotonic() - started
    return _evaluated(planned, outcomes, labels, data, url, seconds, about)


def _evaluated(
    planned: "Plan",
    outcomes: "Seq[Outcome]",
    labels: Mapping[str, Seq[str]],
    data: Path,
    source: str,
    seconds: float,
    about: Mapping[str, Any],
    trained: Seq[str] = (),
) -> Evaluated:
    from loraplex.evaluation.judged import judge
    from loraplex.evaluation.report import report

    judged, without = judge(planned.questions, outcomes, labels, data)
    return judged, report(
        judged, planned, without, source=source, data=data, seconds=seconds, about=about, trained=trained
    )


def _write(path: Path, judged: "Mapping[str, Judged]", report: Mapping[str, Any]) -> None:
    from loraplex.evaluation.page import html
    from loraplex.measuring.files import write_text

    try:
        write_text(path, html(report, judged), is_private=True)
    except OSError as exc:
        raise ConfigurationError(
            f"--html {path}", f"cannot be written: {exc.strerror}", remedy="give another file"
        ) from None
    stderr.print(f"{path} holds texts of conversations: treat it as you treat the conversations", markup=False)


def _show(report: Mapping[str, Any]) -> None:
    from loraplex.evaluation.report import HEAD, remarks, rows

    table = figures_table("classifier", *(HEAD[name] for name in SHOWN))
    for row in rows(report, ("f1",), SHOWN):
        table.add_row(*map(escape, row))
    stdout.print(table)
    for line in remarks(report):
        stdout.print(line, markup=False)
    stdout.print(
        f"{counted(report['data']['conversations'], 'conversation')}, {counted(report['verdicts'], 'verdict')} in "
        f"{report['seconds']:.1f} s: {report['verdicts_per_s']:.1f} a second; all figures: --json, --html"
    )
