"""Options and error handling that the commands share."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from loraplex.errors import LoraplexError

stderr = Console(stderr=True, soft_wrap=True, highlight=False)
stdout = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 240)

PathArgument = Annotated[
    str,
    typer.Argument(metavar="PATH", help="A bundle's folder, or a base: a folder or a hub id.", show_default=False),
]
AdapterOption = Annotated[
    list[str] | None,
    typer.Option("--adapter", metavar="NAME=FOLDER", help="Serve this adapter too. Repeatable."),
]
DeviceOption = Annotated[str | None, typer.Option(envvar="LORAPLEX_DEVICE", help="auto, cpu, cuda or cuda:N.")]
DtypeOption = Annotated[str | None, typer.Option(envvar="LORAPLEX_DTYPE", help="auto, float32 or bfloat16.")]


@contextmanager
def errors_to_exit() -> Iterator[None]:
    """A LoraplexError becomes two lines on stderr and exit code 1."""
    try:
        yield
    except LoraplexError as exc:
        stderr.print(f"[bold red]error[/] [bold]{exc.code}[/]:", end=" ")
        stderr.print(exc.message, markup=False)
        stderr.print("[bold]remedy:[/]", end=" ")
        stderr.print(exc.remedy, markup=False)
        raise typer.Exit(1) from None


def named_adapters(given: list[str] | None) -> dict[str, Path]:
    """NAME=FOLDER options; usage error where one is not of that form or a name comes twice."""
    adapters: dict[str, Path] = {}
    for item in given or ():
        name, separator, folder = item.partition("=")
        if not (name and separator and folder):
            raise typer.BadParameter(f"{item!r} is not NAME=FOLDER", param_hint="--adapter")
        if name in adapters:
            raise typer.BadParameter(f"{name!r} is given twice", param_hint="--adapter")
        adapters[name] = Path(folder)
    return adapters


def quiet_libraries() -> None:
    """Progress bars only where somebody watches."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    logging.set_verbosity_error()
