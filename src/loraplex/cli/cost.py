"""`loraplex cost`: an endpoint for each classifier, one for all, or a hosted API."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from loraplex.cli.options import errors_to_exit, origins, stdout
from loraplex.cli.remote import JsonOption
from loraplex.config import validate
from loraplex.errors import ConfigurationError


def _number(what: str) -> typer.models.OptionInfo:
    """Return an option whose text the demand's validation reads, so that its message shows the value."""
    option: typer.models.OptionInfo = typer.Option(help=what, metavar="<number>", show_default=False)
    return option


def cost(
    context: typer.Context,
    instance: Annotated[
        str, typer.Option(help="The machine of one endpoint, such as ml.g5.2xlarge, or a name in --prices.")
    ] = "ml.g5.2xlarge",
    classifiers: Annotated[
        str | None, _number("How many classifiers there are (default: those of --bench, or 16).")
    ] = None,
    rate: Annotated[
        str | None, _number("Calls/s at the busiest time. A call asks all classifiers about one conversation.")
    ] = None,
    utilisation: Annotated[str | None, _number("The average rate, in percent of --rate (default: 100).")] = None,
    tokens: Annotated[
        str | None, _number("Tokens of a conversation, for hosted APIs (default: those of --bench, else 500).")
    ] = None,
    bench: Annotated[
        Path | None,
        typer.Option(help="A report of `loraplex bench` that reached saturation: how much one instance answers."),
    ] = None,
    system: Annotated[str, typer.Option(help="The system of --bench.")] = "native",
    plan: Annotated[
        Path | None,
        typer.Option(help="What `loraplex plan … --json` printed, where nobody has measured.", show_default=False),
    ] = None,
    capacity: Annotated[
        str | None, _number("Calls/s that one instance answers at most, where there is no --bench.")
    ] = None,
    separate_capacity: Annotated[
        str | None,
        _number("Calls/s that an endpoint with one classifier answers (default: --capacity times the classifiers)."),
    ] = None,
    headroom: Annotated[str | None, _number("Percent of an instance's capacity that stay free (default: 30).")] = None,
    hours: Annotated[
        str | None, _number("Hours of a month (default: 720, which are 30 days; 730 are a twelfth of a year).")
    ] = None,
    prices: Annotated[
        Path | None, typer.Option(help="A YAML file with prices of your own, which go before the built-in ones.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare what classifiers cost a month: an endpoint for each, one endpoint for all, and hosted APIs.

    Example: [bold]loraplex cost --classifiers 16 --instance ml.g5.2xlarge[/]

    Example: [bold]loraplex cost --instance ml.g5.2xlarge --rate 20 --bench results/report.json[/]
    """
    sources = [one for one in (bench, plan, capacity) if one is not None]
    if len(sources) > 1:
        raise typer.BadParameter("give one of --bench, --plan and --capacity", param_hint="--capacity")
    if utilisation is not None and rate is None:
        raise typer.BadParameter("is a share of --rate; give it, too", param_hint="--utilisation")
    if headroom is not None and not sources:
        raise typer.BadParameter(
            "is a share of what one instance answers: give --bench, --plan or --capacity", param_hint="--headroom"
        )
    if separate_capacity is not None and not sources:
        raise typer.BadParameter("needs --bench, --plan or --capacity beside it", param_hint="--separate-capacity")
    with errors_to_exit():
        from loraplex.costs.capacity import read_capacity
        from loraplex.costs.cost import Cost, Demand
        from loraplex.costs.planned import read_planned
        from loraplex.costs.report import Report
        from loraplex.hardware.prices import read_prices

        known = read_prices(prices)
        price = known.of(instance)
        if price is None:
            raise ConfigurationError(
                f"--instance {instance}",
                "its price is not known",
                remedy=f"give it with --prices FILE, which holds `instances: {{{instance}: {{usd_per_hour: …}}}}`",
            )
        given = {
            "classifiers": classifiers, "rate": rate, "utilisation": utilisation, "tokens": tokens,
            "capacity": capacity, "separate_capacity": separate_capacity, "headroom": headroom, "hours": hours,
        }  # fmt: skip
        given = {name: value for name, value in given.items() if value is not None}
        found = None if bench is None else read_capacity(bench, system)
        if plan is not None:
            found = read_planned(plan, instance)
        measured: dict[str, Any] = {}
        if found is not None:
            measured = {"classifiers": found.num_classifiers, "capacity": found.median}
            measured |= {} if found.prompt_tokens is None else {"tokens": found.prompt_tokens}
        demand = validate(Demand, measured | given, "options", origins=origins(context))
        if found is not None and demand.classifiers != found.num_classifiers:
            raise ConfigurationError(
                f"--classifiers {demand.classifiers}",
                f"is not what {found.source} asked: {found.num_classifiers}",
                remedy="leave the option out, or measure or plan with as many",
            )
        report = Report(
            instance=instance,
            price=price,
            cost=Cost(demand=demand, usd_per_hour=price.usd_per_hour),
            capacity=found,
            hosted=known.hosted,
        )
        if as_json:
            typer.echo(json.dumps(report.as_json()))
            return
        stdout.print(report.title(), markup=False)
        table = Table("", "instances", "a month", "1,000 conversations", box=None)
        for column in table.columns[1:]:
            column.justify = "right"
        for row in report.rows():
            table.add_row(*map(escape, row))
        stdout.print(table)
        for sentence in report.sentences():
            stdout.print(f"* {sentence}", markup=False)
