"""`loraplex plan`: what a base with adapters needs, and what has room for it. Loads weights only to measure them."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from loraplex.cli.options import errors_to_exit, quiet_libraries, stdout, tell
from loraplex.cli.remote import JsonOption
from loraplex.config import MOST
from loraplex.errors import ConfigurationError

if TYPE_CHECKING:
    from loraplex.planning.asked import Asked


def _number(what: str, least: int = 1) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(help=what, min=least, max=10**9, metavar="<number>")
    return option


def plan(
    path: Annotated[
        str | None,
        typer.Argument(
            metavar="[BUNDLE]", help="A bundle: its base, and its adapters' real sizes.", show_default=False
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="A base's config.json, or its folder. No weights are needed.", show_default=False),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A well-known base, such as mistral-7b-v0.3 or its hub id.", show_default=False)
    ] = None,
    adapters: Annotated[
        int | None,
        _number("How many adapters (default: the bundle's, or 16). Beside a bundle: as large as its largest.", 0),
    ] = None,
    rank: Annotated[int, _number("Their rank, without a bundle.")] = 16,
    targets: Annotated[
        str, typer.Option(help="Their layers, without a bundle: all-linear, attention, or names with commas.")
    ] = "all-linear",
    gpu: Annotated[
        str, typer.Option(help="a10g, l4, l40s, a100, a100-80gb, h100, h200 …, or cpu: this machine.")
    ] = "cpu",
    count: Annotated[int, _number("How many of them, each with the base and all adapters.")] = 1,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16 (default: bfloat16 on a GPU; on a CPU what it computes in).")
    ] = None,
    classifiers: Annotated[
        int | None, _number("How many judge a conversation together (default: all adapters, 16 at most).")
    ] = None,
    conversation_tokens: Annotated[
        int | None, _number("Tokens of a conversation (default: 500, or what the base takes).")
    ] = None,
    suffix_tokens: Annotated[int, _number("Tokens of a classifier's own question.")] = 20,
    turns: Annotated[int, _number("Turns in which the conversation arrives.")] = 10,
    rate: Annotated[
        float | None, typer.Option(help="Conversations/s at the busiest time: how many devices that takes.")
    ] = None,
    fit: Annotated[bool, typer.Option("--fit", help="Choose max_adapters, kv_cache and max_step_tokens.")] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Load the bundle on this CPU in another process, ask it, and compare.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Plan the memory and the time of a base with adapters, for this machine or for a GPU that you do not have.

    Example: [bold]loraplex plan examples/support_desk/bundle[/]

    Example: [bold]loraplex plan --model mistral-7b-v0.3 --adapters 16 --rank 32 --gpu a10g --fit[/]
    """
    given = [one for one in (path, config, model) if one is not None]
    if len(given) != 1:
        raise typer.BadParameter("give one of BUNDLE, --config and --model", param_hint="BUNDLE")
    if dtype not in (None, "float32", "bfloat16"):
        raise typer.BadParameter(f"{dtype!r} is not float32 or bfloat16", param_hint="--dtype")
    if turns > (500 if conversation_tokens is None else conversation_tokens):
        raise typer.BadParameter("is more than --conversation-tokens", param_hint="--turns")
    if rate is not None and not 0 < rate <= MOST:
        raise typer.BadParameter(f"{rate} is not a number above 0, and at most {MOST}", param_hint="--rate")
    with errors_to_exit():
        if measure and (path is None or gpu.lower() != "cpu"):
            raise ConfigurationError(
                "--measure",
                "needs a bundle, and this machine's CPU",
                remedy="give BUNDLE without --gpu, or leave --measure out",
            )
        from loraplex.cli.plan_measure import KV_CACHE, measure_apart
        from loraplex.planning.asked import read_asked
        from loraplex.planning.plan_json import as_json_report
        from loraplex.planning.rates import measure_rates

        quiet_libraries()
        if measure:
            tell("measuring this machine's rates …")
        asked = read_asked(
            bundle=path,
            config=config,
            model=model,
            num_adapters=adapters,
            rank=rank,
            targets=targets,
            gpu=gpu,
            count=count,
            dtype=dtype,
            num_classifiers=classifiers,
            conversation_tokens=conversation_tokens,
            suffix_tokens=suffix_tokens,
            turns=turns,
            kv_cache=KV_CACHE if measure else None,
            fits=fit,
            measure=measure_rates if measure else None,
        )
        measured = None
        if measure and path is not None:
            tell("loading the bundle in another process, and asking it …")
            measured = measure_apart(path, asked.dtype)
        if as_json:
            typer.echo(json.dumps(as_json_report(asked, measured, rate, fits=fit)))
        else:
            _show(asked, measured, rate, fit)
    if asked.plan.short_bytes:
        raise typer.Exit(2)


def _show(asked: "Asked", measured: dict[str, int] | None, rate: float | None, fit: bool) -> None:
    from loraplex.planning import report

    for line in report.title(asked):
        stdout.print(line, markup=False)
    _table(("memory", "where", "limit", "expected", "measured here", ""), report.memory_rows(asked, measured), 3)
    stdout.print("")
    for sentence in report.fit_sentences(asked, rate):
        stdout.print(f"* {sentence}", markup=False)
    stdout.print("")
    _table(("time", "tokens", "TFLOP", "floor ms", "expected ms", "most/s"), report.time_rows(asked), 5)
    for sentence in report.time_sentences(asked):
        stdout.print(f"* {sentence}", markup=False)
    rows = report.instance_rows(asked)
    if rows:
        stdout.print("")
        _table(("has room for this plan, cheapest first", "device", "USD an hour", "read"), rows, 0)
    if fit and not asked.plan.short_bytes:
        stdout.print("")
        for line in report.settings_lines(asked):
            stdout.print(line, markup=False)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]], num_figures: int) -> None:
    """Print a table. The figures begin with the third column, or the second where there are five."""
    table = Table(*head, box=None)
    first = len(head) - num_figures - (1 if head[-1] == "" else 0)
    for column in table.columns[first : first + num_figures]:
        column.justify = "right"
    for row in rows:
        table.add_row(*map(escape, row))
    stdout.print(table)
