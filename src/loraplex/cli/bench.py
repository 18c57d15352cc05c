"""`loraplex bench`: measures systems that answer the same classifiers, and writes a report."""

import asyncio
import signal
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from loraplex.bench.settings import OURS, SYSTEMS, Settings, prepare
from loraplex.cli.options import (
    DeviceOption,
    DtypeOption,
    PathArgument,
    errors_to_exit,
    quiet_libraries,
    stderr,
    stdout,
)
from loraplex.errors import ConfigurationError, shortened
from loraplex.service.preparation import is_installed

INTERRUPTED = 130  # as a shell says of a command that Ctrl-C ended


def bench(
    path: PathArgument,
    data: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help="Conversations, with labels if there are any: .jsonl or .jsonl.gz.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The report's folder.", show_default=False)],
    systems: Annotated[
        str, typer.Option(metavar="NAMES", help=f"With commas, some of: {', '.join(SYSTEMS)}.")
    ] = "native,peft,peft-mixed,vllm",
    classifiers: Annotated[str, typer.Option(metavar="NAMES", help="With commas. Default: all.")] = "",
    conversations: Annotated[
        int | None, typer.Option(metavar="N", help="Ask so many of them. Default: all, 3000 at most.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(metavar="N", help="A closed loop of so many clients. Default: 4.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(metavar="R", help="An open loop: R conversations arrive in a second.")
    ] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Find each system's capacity, then offer more until it is saturated.")
    ] = False,
    in_process: Annotated[
        bool, typer.Option("--in-process/--http", help="Ask in the system's own process, or over HTTP.")
    ] = False,
    ask: Annotated[
        str, typer.Option(metavar="[together|each]", help="All classifiers in one request, or a request for each.")
    ] = "together",
    turns: Annotated[bool, typer.Option("--turns", help="Conversations arrive turn by turn.")] = False,
    slices: Annotated[
        int, typer.Option(help="Parts of a load, in which systems take turns. 1: start one system after the other.")
    ] = 5,
    seconds: Annotated[float, typer.Option(help="Length of a slice of an open loop, and of a sweep.")] = 20.0,
    timeout: Annotated[float, typer.Option(help="Seconds after which a request is given up.")] = 300.0,
    seed: Annotated[int, typer.Option(help="Draws the conversations, the arrivals and the order of the slices.")] = 0,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[SYSTEM:]KEY=VALUE", help="An option of `loraplex serve`, for all systems or for one. Repeatable."
        ),
    ] = None,
    python: Annotated[
        list[str] | None,
        typer.Option(metavar="SYSTEM=PATH", help="The interpreter that runs a system. Repeatable."),
    ] = None,
    url: Annotated[
        list[str] | None,
        typer.Option(metavar="SYSTEM=URL", help="Ask a server that runs already. Repeatable."),
    ] = None,
    llamacpp_server: Annotated[
        Path | None, typer.Option(metavar="PROGRAM", help="llama.cpp's llama-server, for the system llamacpp.")
    ] = None,
    llamacpp_model: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The bundle's base as a GGUF file, for --llamacpp-server.")
    ] = None,
    llamacpp_arg: Annotated[
        list[str] | None, typer.Option(metavar="ARG", help="An argument for --llamacpp-server. Repeatable.")
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Measure a bundle on this machine, beside PEFT and vLLM: latency, throughput, memory, accuracy.

    Every system is a process of its own, and gets the same conversations. A system that is not installed is skipped.
    DIR gets report.json, which has every sample, report.md, report.html with plots, and a log of each system.

    Example: [bold]loraplex bench examples/support_desk/bundle --data dev.jsonl.gz --out report[/]

    Example: [bold]loraplex bench bundle --data dev.jsonl.gz --systems native,vllm --sweep --out report[/]

    Exit code 0: every system was measured or skipped; 1: something failed; 2: wrong usage; 130: interrupted.
    """
    loads = (rate, concurrency, sweep or None)
    for_all, for_one = _engine(engine)
    for name, value in (("device", device), ("dtype", dtype)):
        if value is not None:
            for_all[name] = value
    settings = Settings(
        bundle=path,
        data=data,
        out=out,
        systems=_names(systems),
        classifiers=_names(classifiers),
        conversations=conversations,
        rate=rate,
        concurrency=4 if loads == (None, None, None) else concurrency,
        sweep=sweep,
        transport="in-process" if in_process else "http",
        asking=ask,  # type: ignore[arg-type]  # checked by `prepare`
        turns=turns,
        slices=slices,
        seconds=seconds,
        timeout_s=timeout,
        seed=seed,
        engine=for_all,
        only=for_one,
        python=_pairs(python, "--python"),
        urls=_pairs(url, "--url"),
        llamacpp_server=llamacpp_server,
        llamacpp_model=llamacpp_model,
        llamacpp_arguments=tuple(llamacpp_arg or ()),
    )
    with errors_to_exit():
        if not is_installed("psutil"):
            raise ConfigurationError("bench", "psutil is not installed", remedy="pip install 'loraplex[bench]'")
        # Whatever can be wrong is told before PyTorch is imported, and before a system is started.
        prepared = prepare(settings)
        for name, why in prepared.skipped.items():
            stderr.print(f"skipped {name}: {why}", markup=False)
        with stderr.status("reading the base …"):
            from loraplex.bench.html import html
            from loraplex.bench.markdown import markdown
            from loraplex.bench.report import report, report_text
            from loraplex.bench.run import Run
            from loraplex.measuring.files import write_text

            quiet_libraries()
            run = Run(prepared)
        is_cut_short = not _measure(run)
        if is_cut_short:
            run.drop_unfinished()
        found = report(run, cut_short=is_cut_short)
        if is_cut_short and not any(one.slices for one in run.measured.values()):
            had = (out / OURS[0]).exists()
            stderr.print("interrupted before a slice was measured" + (": the earlier report stays" if had else ""))
            if had:
                raise typer.Exit(INTERRUPTED)
        write_text(out / OURS[0], report_text(found))
        write_text(out / OURS[1], markdown(found))
        write_text(out / OURS[2], html(found))
    _print_summary(found)
    stdout.print(f"{out / OURS[1]}" + (" (interrupted: what was measured until then)" if is_cut_short else ""))
    if is_cut_short:
        raise typer.Exit(INTERRUPTED)
    if any(one["state"].startswith("failed") for one in found["systems"].values()):
        raise typer.Exit(1)


def _measure(run: Any) -> bool:
    """Measure, and show what runs and how long it will take. Returns False where Ctrl-C or SIGTERM ended it."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, speed_estimate_period=3600, refresh_per_second=2) as bar:
        task = bar.add_task("", total=None)

        def show(what: str, done: float, total: float) -> None:
            bar.update(task, description=what, completed=done, total=total)

        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            asyncio.run(run.measure(show))
        except KeyboardInterrupt:
            return False
        finally:
            signal.signal(signal.SIGTERM, before)
    return True


def _names(given: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in given.split(",") if name.strip())


def _pairs(given: list[str] | None, option: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for one in given or ():
        name, separator, value = one.partition("=")
        if not (name and separator and value) or name in pairs:
            raise typer.BadParameter(f"{one!r} is not SYSTEM=VALUE, once for a system", param_hint=option)
        pairs[name] = value
    return pairs


def _engine(given: list[str] | None) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the options for all systems, and those for single ones. Several of a key make a tuple."""
    for_all: dict[str, Any] = {}
    for_one: dict[str, dict[str, Any]] = {}
    for one in given or ():
        key, separator, value = one.partition("=")
        system, is_one, name = key.rpartition(":")
        if not (separator and name) or bool(is_one) != bool(system):
            raise typer.BadParameter(f"{one!r} is not KEY=VALUE or SYSTEM:KEY=VALUE", param_hint="--engine")
        options = for_one.setdefault(system, {}) if system else for_all
        name = name.removeprefix("--").replace("-", "_")
        if name in ("backend", "peft_batching"):
            raise typer.BadParameter(f"{name!r} is what --systems says", param_hint="--engine")
        options[name] = (*options.get(name, ()), value) if name in ("vllm_arg", "adapter_root") else value
    return for_all, for_one


def _print_summary(found: dict[str, Any]) -> None:
    from loraplex.bench.cells import latency, spread_text
    from loraplex.bench.sections import main_load

    head = "system|p50 ms|p99 ms|conversations/s|verdicts/s|memory GB|accuracy|not answered"
    table = Table(*head.split("|"), box=None)
    for name, one in found["systems"].items():
        if not one.get("loads"):
            table.add_row(name, escape(shortened(one["state"])))
            continue
        load, memory, quality = main_load(one), one["memory"], one["quality"]["mean"]
        taken = memory["peak_device_bytes"] or memory["peak_rss_bytes"]
        requests = load["requests"]
        table.add_row(
            name,
            *(latency(load["latency_ms"], key) for key in ("p50", "p99")),
            spread_text(load["conversations_per_s"]),
            spread_text(load["verdicts_per_s"]),
            "-" if taken is None else f"{taken / 1e9:.2f}",
            "-" if quality is None else f"{quality['accuracy']:.1%}",
            str(requests["refused"] + requests["failed"] + requests["timeout"]),
        )
    stdout.print(table)
