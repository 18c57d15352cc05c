"""Loads a bundle and shows progress, for `loraplex eval` and `loraplex calibrate`."""

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from loraplex.bundle import Bundle, open_bundle
from loraplex.cli.options import quiet_libraries, stderr, tell
from loraplex.config import EngineConfig, resolve
from loraplex.labelled import read_labelled
from loraplex.service.named_adapters import add_adapters
from loraplex.service.preparation import check_effects, prepare

if TYPE_CHECKING:  # they import numpy
    from loraplex.evaluation.asking import Plan
    from loraplex.inprocess import Loraplex

OPTION = "--classifier"  # which names those that are asked
INTERRUPTED = 130  # as a shell says of a command that Ctrl-C ended

DataOption = Annotated[
    Path,
    typer.Option(
        "--data", metavar="FILE", help="Labelled conversations: a .jsonl or .jsonl.gz file.", show_default=False
    ),
]
ClassifiersOption = Annotated[
    list[str] | None,
    typer.Option(
        OPTION,
        "--classifiers",
        metavar="NAMES",
        help="With commas, or repeated. Default: all that the data has labels for.",
    ),
]
ConversationsOption = Annotated[
    int | None,
    typer.Option("--conversations", metavar="N", help="Take so many of them, the same ones each time. Default: all."),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A bundle that was loaded with the adapters that are asked.

    bundle:  as it is on disk, with all of its adapters.
    plan:    what to ask.
    labels:  classifier -> its labels.
    about:   the head of a report.
    """

    loraplex: "Loraplex"
    bundle: Bundle
    plan: "Plan"
    labels: Mapping[str, Seq[str]]
    about: Mapping[str, Any]


def names_of(given: Seq[str] | None) -> tuple[str, ...]:
    """Return the names of an option that takes several, with commas or repeated. Each counts once."""
    return tuple(dict.fromkeys(name.strip() for one in given or () for name in one.split(",") if name.strip()))


def figures_table(*titles: str) -> Table:
    """Return an empty table of figures. It is as narrow as they are: where the terminal is narrower, names fold."""
    table = Table(*(one.replace(" ", "\n", 1) for one in titles), box=None, collapse_padding=True, pad_edge=False)
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    return table


@contextmanager
def progress(num: int) -> Iterator[Callable[[], None]]:
    """Show on standard error, if it is a terminal, how many conversations were asked. Yields a function to call after
    each."""
    if not stderr.is_interactive:  # rich would write an empty line
        yield lambda: None
        return
    columns = (TextColumn("asked"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr) as bars:
        task = bars.add_task("", total=num)
        yield lambda: bars.advance(task)


@contextmanager
def loaded(
    path: str,
    data: Path,
    wanted: Seq[str],
    num: int | None,
    engine: Mapping[str, Any],
    given: Mapping[str, str],
    adapters: Mapping[str, str] | None = None,
) -> Iterator[Loaded]:
    """Load the adapters of a bundle that the data has labels for. Whatever can be wrong is told before that.

    wanted:    the classifiers that the user named; none means all.
    num:       how many conversations to take; None means all.
    engine:    options of EngineConfig; given: where the user gave them, as `origins` returns it.
    adapters:  name -> source of further adapters."""
    from loraplex.evaluation.asking import plan, sample

    bundle = open_bundle(path)
    config = resolve(EngineConfig, bundle.settings.engine, engine, given)
    check_effects(config, given)
    # What was changed at run time belongs to the server, and each adapter that is asked is loaded.
    config = config.model_copy(update={"state_dir": None, "preload": "all"})
    bundle = add_adapters(bundle, adapters or {}, config, tell)
    contracts = {one.name: one.contract.labels for one in bundle.adapters if one.contract is not None}
    checked = {name: contracts[name] for name in wanted or contracts if name in contracts}
    rows = sample(read_labelled(data, checked, wanted[0] if len(wanted) == 1 else None, option=OPTION), num, data)
    names = [one.name for one in bundle.adapters]
    planned = plan(rows, dict.fromkeys(names, True), wanted, data)
    asked = {name for one in planned.questions for name in one.classifiers}
    settings = bundle.settings.model_copy(update={"routes": {}})
    part = replace(bundle, adapters=tuple(one for one in bundle.adapters if one.name in asked), settings=settings)
    preparation = prepare(part, config)
    quiet_libraries()
    with stderr.status("loading …"):
        from loraplex.inprocess import Loraplex
        from loraplex.measuring.about import about
        from loraplex.model.loader import resolve_device, resolve_dtype

        device = resolve_device(config.device)
        head = about(device, resolve_dtype(config.dtype, device)) | {"backend": config.backend}
        loraplex = Loraplex.start(part, config, preparation)
    with loraplex:
        labels = {one.name: one.labels for one in loraplex.adapters()}
        yield Loaded(
            loraplex=loraplex,
            bundle=bundle,
            plan=plan(rows, {name: labels.get(name, ()) is not None for name in names}, wanted, data),
            labels={name: found for name, found in labels.items() if found is not None},
            about=head,
        )
