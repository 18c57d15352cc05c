"""`loraplex routes …`: manages the routes of a running server, and shows how their targets answer."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from loraplex.amounts import counted, duration_s
from loraplex.cli.examples import check_file, rows_of, write_rows
from loraplex.cli.options import stderr, stdout
from loraplex.cli.remote import URL, JsonOption, NameArgument, UrlOption, asking, print_fields, print_json
from loraplex.errors import ConfigurationError
from loraplex.types import Example, TargetStats

app = typer.Typer(
    help="Manage routes, which split requests between adapters by weight: canaries, A/B tests, shadows.\n\n"
    "Example: [bold]loraplex routes set issueResolved issueResolved-v1=95 issueResolved-v2=5[/]",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


def _weights(given: list[str]) -> dict[str, float]:
    """Return target -> weight from arguments TARGET or TARGET=WEIGHT. Raises a usage error if one has another form, or
    a target comes twice."""
    weights: dict[str, float] = {}
    for item in given:
        target, separator, text = item.rpartition("=")
        target = target if separator else item
        try:
            weight = float(text) if separator else 1.0
        except ValueError:
            weight = math.nan
        if not target or not 0 <= weight < math.inf:
            raise typer.BadParameter(f"{item!r} is not TARGET=WEIGHT", param_hint="TARGET")
        if target in weights:
            raise typer.BadParameter(f"{target!r} is given twice", param_hint="TARGET")
        weights[target] = weight
    return weights


def _shares(weights: Mapping[str, float]) -> str:
    total = sum(weights.values()) or 1.0
    return ", ".join(f"{name} {100 * weight / total:.4g} %" for name, weight in weights.items())


@app.command("list")
def list_routes(url: UrlOption = URL, as_json: JsonOption = False) -> None:
    """List all routes with their targets' shares.

    Example: [bold]loraplex routes list[/]
    """
    with asking(url) as client:
        routes = client.routes()
    if as_json:
        print_json(routes)
        return
    table = Table("name", "targets", "shadows", "revision", box=None)
    for one in routes:
        table.add_row(escape(one.name), escape(_shares(one.targets)), escape(", ".join(one.shadows)), str(one.revision))
    stdout.print(table)


@app.command()
def show(name: NameArgument, url: UrlOption = URL, as_json: JsonOption = False) -> None:
    """Show one route.

    Example: [bold]loraplex routes show issueResolved[/]
    """
    with asking(url) as client:
        print_fields(client.route(name), as_json)


@app.command("set")
def set_route(
    name: NameArgument,
    target: Annotated[
        list[str],
        typer.Argument(metavar="TARGET[=WEIGHT]", help="Adapters that answer, and their weights. Default weight: 1."),
    ],
    shadow: Annotated[
        list[str] | None,
        typer.Option(help="Also run this adapter; its verdicts are recorded, not returned. Repeatable."),
    ] = None,
    url: UrlOption = URL,
    as_json: JsonOption = False,
) -> None:
    """Create a route, or replace it.

    Example: [bold]loraplex routes set issueResolved issueResolved-v1=95 issueResolved-v2=5[/]

    Example: [bold]loraplex routes set issueResolved issueResolved-v1 --shadow issueResolved-v2[/]
    """
    weights = _weights(target)
    with asking(url) as client:
        print_fields(client.set_route(name, weights, shadow or ()), as_json)


@app.command()
def delete(name: NameArgument, url: UrlOption = URL) -> None:
    """Delete a route. Its adapters stay loaded.

    Example: [bold]loraplex routes delete issueResolved[/]
    """
    with asking(url) as client:
        client.delete_route(name)
    stderr.print(f"deleted {name}", markup=False)


@app.command()
def rollback(name: NameArgument, url: UrlOption = URL, as_json: JsonOption = False) -> None:
    """Undo the last change of a route, also its deletion.

    Example: [bold]loraplex routes rollback issueResolved[/]
    """
    with asking(url) as client:
        print_fields(client.rollback_route(name), as_json)


@app.command()
def stats(name: NameArgument, url: UrlOption = URL, as_json: JsonOption = False) -> None:
    """Show how each target and shadow answers: labels, confidence, latency, agreement, and accuracy by feedback.

    Example: [bold]loraplex routes stats issueResolved[/]
    """
    with asking(url) as client:
        found = client.route_stats(name)
    if as_json:
        print_json(found)
        return
    columns = ("target", "version", "role", "verdicts", "errors", "labels", "confidence", "p50/p99 ms")
    table = Table(*columns, "agreement", "accuracy (95 %)", box=None)
    for one in found.targets:
        table.add_row(*map(escape, _row(one)))
    stdout.print(table)


def _row(stats: TargetStats) -> tuple[str, ...]:
    latency, agreement, accuracy = stats.latency_ms, stats.agreement, stats.accuracy
    return (
        stats.target,
        stats.version or "",
        stats.role,
        str(stats.num_verdicts),
        str(stats.num_errors),
        ", ".join(f"{label} {share:.1%}" for label, share in stats.label_shares.items()),
        "" if stats.mean_confidence is None else f"{stats.mean_confidence:.3f}",
        "" if latency is None else f"{latency.p50:.1f}/{latency.p99:.1f}",
        "" if agreement is None else f"{agreement.share:.1%} of {agreement.num_compared}",
        ""
        if accuracy is None
        else f"{accuracy.share:.1%} ({accuracy.low:.1%} to {accuracy.high:.1%}) of {accuracy.num_labelled}",
    )


@app.command()
def feedback(
    id: Annotated[
        str, typer.Argument(metavar="ID", help="The `id` of a verdict; with --request, the id of a request.")
    ],
    label: Annotated[str, typer.Argument(metavar="LABEL", help="The label that the verdict should have had.")],
    is_request: Annotated[
        bool,
        typer.Option(
            "--request",
            help="ID is a request's X-Amzn-SageMaker-Inference-Id or X-Request-ID. Give --classifier, too, if the "
            "request asked several.",
        ),
    ] = False,
    classifier: Annotated[
        str | None, typer.Option(metavar="NAME", help="With --request: the classifier or route that was requested.")
    ] = None,
    url: UrlOption = URL,
    as_json: JsonOption = False,
) -> None:
    """Record the right label of a verdict, for the accuracy in `stats`.

    Example: [bold]loraplex routes feedback cls-5f0c7d2e-0 yes[/]

    Example: [bold]loraplex routes feedback order-4711-turn-3 yes --request --classifier issueResolved[/]
    """
    if classifier is not None and not is_request:
        raise typer.BadParameter("is for a request's id", param_hint="--classifier")
    with asking(url) as client:
        if is_request:
            num_answers = client.feedback_on_request(id, label, classifier)
        else:
            num_answers = client.feedback(id, label)
    if as_json:
        kind = "request_id" if is_request else "verdict_id"
        typer.echo(json.dumps({kind: id, "num_answers": num_answers}))
    else:
        stderr.print(f"the label applies to {num_answers} answers")


@app.command()
def export(
    name: Annotated[
        list[str],
        typer.Argument(metavar="NAME", help="Routes, or classifiers that were asked by their own names; '*' for all."),
    ],
    since: Annotated[
        str, typer.Option(metavar="DURATION", help="Only requests of the last 30m, 12h or 7d.", show_default=False)
    ],
    only: Annotated[
        str,
        typer.Option(
            metavar="[corrected|all]",
            help="corrected: labels that feedback gave. all: also what was answered and nobody corrected; a model that "
            "is trained on that learns its own mistakes.",
        ),
    ] = "corrected",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A new .jsonl or .jsonl.gz file. Default: standard output.")
    ] = None,
    url: UrlOption = URL,
) -> None:
    """Write kept texts with the labels of their verdicts, as `loraplex train --data` reads them.

    Needs a server with --keep-inputs, and an admin key where there are keys.

    Example: [bold]loraplex routes export issueResolved --since 7d --out corrected.jsonl[/]
    """
    seconds = duration_s(since)
    if not seconds:
        raise typer.BadParameter(f"{since!r} is no duration: write 30m, 12h or 7d", param_hint="--since")
    if only not in ("corrected", "all"):
        raise typer.BadParameter(f"{only!r} is neither corrected nor all", param_hint="--only")
    with asking(url) as client:
        if out is not None:
            check_file(out)
        found: list[Example] = []
        after: str | None = None
        while True:
            page = client.examples(name, since_s=seconds, is_corrected=only == "corrected", after=after)
            found += page.examples
            if (after := page.after) is None:
                break
        rows = rows_of(found)
        if not rows:
            raise ConfigurationError(
                f"--since {since}",
                f"no kept text of {', '.join(name)} has a label that feedback gave"
                if only == "corrected"
                else f"no text of {', '.join(name)} is kept",
                remedy="give feedback first: loraplex routes feedback VERDICT_ID LABEL; or export --only all"
                if only == "corrected"
                else "ask it first; texts are kept from the start with --keep-inputs on, for the time that it says",
            )
        write_rows(rows, out)
    num_labels = sum(len(row["labels"]) for row in rows)
    where = "" if out is None else f" in {out}"
    stderr.print(f"{counted(len(rows), 'conversation')} with {counted(num_labels, 'label')}{where}", markup=False)
    stderr.print(
        "these are texts of your users: delete the file after the training, which writes none of them into a contract",
        markup=False,
    )
