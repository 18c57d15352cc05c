"""`loraplex calibrate`: fits the contracts of a bundle's classifiers to labelled conversations."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from loraplex.amounts import counted
from loraplex.cli.asked import (
    INTERRUPTED,
    ClassifiersOption,
    ConversationsOption,
    DataOption,
    figures_table,
    loaded,
    names_of,
    progress,
)
from loraplex.cli.options import (
    BackendOption,
    DeviceOption,
    DtypeOption,
    PathArgument,
    errors_to_exit,
    origins,
    stderr,
    stdout,
)
from loraplex.cli.remote import JsonOption
from loraplex.errors import ConfigurationError
from loraplex.service.preparation import is_installed

if TYPE_CHECKING:  # they import numpy
    from loraplex.evaluation.asking import Plan
    from loraplex.evaluation.recalibration import Recalibration

SHOWN = {
    "f1": "F1",
    "accuracy": "accuracy",
    "log_loss": "log-loss",
    "ece": "ECE",
    "coverage": "let through",
    "wrong_above_gate": "wrong of these",
}


def calibrate(
    context: typer.Context,
    path: PathArgument,
    data: DataOption,
    classifiers: ClassifiersOption = None,
    conversations: ConversationsOption = None,
    objective: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="What the threshold is best at: f1, precision-at-recall=R, recall-at-precision=P, cost=RATIO (a "
            "missed positive costs RATIO false alarms), or none, which leaves it.",
        ),
    ] = "f1",
    abstain_error: Annotated[
        float | None,
        typer.Option(
            metavar="E",
            help="Set abstain_below, so that a share E of what it lets through is wrong. Default: leave it.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would change, and write nothing.")] = False,
    as_json: JsonOption = False,
    backend: BackendOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Fit temperature, bias and threshold of contracts to labelled conversations, and write them into classifier.yaml.

    Give conversations that the adapters were not trained on. One half of them is fitted to; the figures before and
    after are of the other half. Weights are never changed. Comments in classifier.yaml stay, but for those within a
    value that changes. A classifier whose golden examples would come out wrong is left as it is.

    Example: [bold]loraplex calibrate bundle --data labelled.jsonl --dry-run[/]

    Example: [bold]loraplex calibrate bundle --data labelled.jsonl --objective cost=5 --abstain-error 0.01[/]

    Exit code 0: all were fitted; 1: an error, told with its remedy, or one was left as it is; 2: an error of the
    command line, told with its usage; 130: interrupted.
    """
    if abstain_error is not None and not 0 <= abstain_error < 1:
        raise typer.BadParameter(f"{abstain_error} is not a share from 0 to below 1", param_hint="--abstain-error")
    with errors_to_exit():
        if path.startswith(("http://", "https://")):
            raise ConfigurationError(
                path,
                "is a server's URL, and contracts are files of a bundle",
                remedy="give the bundle; then let the server read it again: loraplex adapters load NAME NAME",
            )
        if not is_installed("scipy"):
            raise ConfigurationError("calibrate", "SciPy is not installed", remedy="pip install 'loraplex[train]'")
        from loraplex.evaluation.asking import ask_in_process
        from loraplex.evaluation.contract_file import changed, write
        from loraplex.evaluation.judged import judge
        from loraplex.evaluation.objective import read_objective
        from loraplex.evaluation.recalibration import golden_questions, recalibrate_all

        wanted = read_objective(objective)
        engine = {"backend": backend, "device": device, "dtype": dtype}
        try:
            with loaded(path, data, names_of(classifiers), conversations, engine, origins(context)) as found:
                questions = found.plan.questions
                sources = {one.name: one for one in found.bundle.adapters if one.name in found.labels}
                golden = golden_questions(sources)
                with progress(len(questions) + len(golden)) as advance:
                    outcomes = ask_in_process(found.loraplex, [*questions, *golden], advance)
        except KeyboardInterrupt:
            stderr.print("interrupted; no contract was changed")
            raise typer.Exit(INTERRUPTED) from None
        num = len(questions)
        judged, _ = judge(questions, outcomes[:num], found.labels, data)
        answers = [*zip(golden, outcomes[num:], strict=True)]
        done, kept = recalibrate_all(sources, judged, answers, wanted, abstain_error)
        texts = {
            sources[name].contract_path: changed(sources[name].contract_path, one.keys) for name, one in done.items()
        }
        for file, text in () if dry_run else texts.items():
            write(file, text)
    failed = {name: len(one.failed) for name, one in judged.items() if one.failed}
    if as_json:
        typer.echo(json.dumps(_json(done, kept, failed, is_written=not dry_run), ensure_ascii=False, allow_nan=False))
    else:
        _show(done, kept, failed, found.plan)
        for line in ["nothing was written (--dry-run)"] if dry_run else [f"{file}: written" for file in texts]:
            stdout.print(line, markup=False)
    if kept or failed:
        raise typer.Exit(1)


def _json(
    done: "Mapping[str, Recalibration]", kept: Mapping[str, str], failed: Mapping[str, int], *, is_written: bool
) -> dict[str, Any]:
    from loraplex.evaluation.report import figures_json

    return {
        "classifiers": {
            name: {
                "contract": dict(one.keys),
                "num_fitted": one.num_fitted,
                "before": figures_json(one.before),
                "after": figures_json(one.after),
            }
            for name, one in done.items()
        },
        "left_as_it_is": dict(kept),
        "failed": dict(failed),
        "is_written": is_written,
    }


def _show(
    done: "Mapping[str, Recalibration]", kept: Mapping[str, str], failed: Mapping[str, int], plan: "Plan"
) -> None:
    from loraplex.evaluation.report import cell, left_out_lines, number, stranger_lines

    for line in stranger_lines(plan.unknown, [*done, *kept, *plan.left_out]):
        stdout.print(line, markup=False)
    table = figures_table("classifier", "contract", *SHOWN.values())
    for name, one in done.items():
        table.add_row(escape(name), "before", *(cell(number(one.before, key)) for key in SHOWN))
        table.add_row("", "after", *(cell(number(one.after, key)) for key in SHOWN))
    if done:
        stdout.print(table)
    for name, one in done.items():
        stdout.print(
            f"{name}: fitted to {counted(one.num_fitted, 'conversation')}, judged on {one.after.n:,}: "
            f"{json.dumps(one.keys, ensure_ascii=False)[1:-1]}",
            markup=False,
        )
        worse = [title for key, title in SHOWN.items() if key in ("f1", "log_loss") and _is_worse(key, one)]
        if worse:
            stdout.print(f"warning: {name}: {' and '.join(worse)} became worse on the other half", markup=False)
    for name, why in kept.items():
        stdout.print(f"{name}: left as it is, because {why}", markup=False)
    for line in left_out_lines(plan.left_out, "left as they are"):
        stdout.print(line, markup=False)
    for name, num in failed.items():
        stdout.print(f"{name}: {counted(num, 'question')} not answered", markup=False)


def _is_worse(key: str, one: "Recalibration") -> bool:
    from loraplex.evaluation.report import number

    before, after = number(one.before, key), number(one.after, key)
    if before is None or after is None:
        return False
    return after < before if key == "f1" else after > before
