"""Options and error handling that several commands share."""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer
from pydantic import BaseModel
from rich.console import Console

from loraplex.config import EngineConfig
from loraplex.environment import variable
from loraplex.errors import LoraplexError
from loraplex.exhaustion import exhaustion

Command = TypeVar("Command", bound=Callable[..., Any])

WIDEST = 22  # characters of choices in a table of options that is 80 wide; wider ones cut all others

stderr = Console(stderr=True, soft_wrap=True, highlight=False)
stdout = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 240)

PathArgument = Annotated[
    str,
    typer.Argument(metavar="PATH", help="The folder of a bundle, or a base: a folder or a hub id.", show_default=False),
]
AdapterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="NAME=SOURCE",
        help="Also load this adapter: a folder or an archive, org/name on the hub, hf://… or s3://…. Repeatable.",
    ),
]


def _setting(name: str, model: type[BaseModel], *, has_variable: bool = True) -> Any:
    """Return the option for a field of `model`. Its help shows the field's description and default; None means not
    given. has_variable: whether a variable in the environment sets it, too."""
    field = model.model_fields[name]
    kind: Any = field.annotation
    shown = "|".join(_choices(kind))
    if get_origin(kind) is tuple:
        kind = list[str]
    elif get_origin(kind) is Literal:
        kind = str
    elif get_origin(kind) is UnionType:
        [kind] = [one for one in get_args(kind) if one is not NoneType]
    number = kind.__name__ if kind in (int, float) else None
    if number is not None:
        kind = str  # read by the settings, whose message shows the value and says where it was given
    has_default = field.default is not None and field.default is not False and field.default != ()
    default = f" (default: {field.default})" if has_default else ""
    what = field.description or ""
    repeatable = " Repeatable." if kind == list[str] else ""
    return Annotated[
        kind | None,
        typer.Option(
            f"--{name.replace('_', '-')}",
            envvar=variable(name) if has_variable else None,
            help=f"{what[:1].upper()}{what[1:]}{default}.{repeatable}",
            metavar=f"[{shown}]" if shown and len(shown) <= WIDEST else None if number is None else f"<{number}>",
            show_default=False,
        ),
    ]


def _choices(kind: Any) -> tuple[str, ...]:
    """Return the values of the Literal in a type; none if there is none."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    return next((found for part in get_args(kind) if (found := _choices(part))), ())


def origins(context: typer.Context) -> dict[str, str]:
    """Return what stands before the value of each setting that the user gave: `--port ` or `LORAPLEX_PORT=`."""
    return {
        one.name: f"{one.opts[0]} " if _source(context, one.name) == "COMMANDLINE" else f"{one.envvar}="
        for one in context.command.params
        if one.name is not None and _source(context, one.name) in ("COMMANDLINE", "ENVIRONMENT")
    }


def _source(context: typer.Context, name: str) -> str:
    source = context.get_parameter_source(name)
    return "" if source is None else source.name


BackendOption = _setting("backend", EngineConfig)
DeviceOption = _setting("device", EngineConfig)
DtypeOption = _setting("dtype", EngineConfig)


def settings_options(*models: type[BaseModel], has_variables: bool = True) -> Callable[[Command], Command]:
    """Return a decorator that adds an option for each field of `models`. The command takes them as `**settings`.
    has_variables: whether variables in the environment set them, too."""

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
        added = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=_setting(name, model, has_variable=has_variables),
            )
            for model in models
            for name in model.model_fields
        ]
        command.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
        return command

    return decorate


def print_error(error: LoraplexError) -> None:
    stderr.print(f"[bold red]error[/] [bold]{error.code}[/]:", end=" ")
    stderr.print(error.message, markup=False)
    stderr.print("[bold]remedy:[/]", end=" ")
    stderr.print(error.remedy, markup=False)


@contextmanager
def errors_to_exit(report: Callable[[LoraplexError], None] = print_error) -> Iterator[None]:
    """Report a LoraplexError, and the machine's lack of memory or threads, and end with exit code 1. By default, the
    report is two lines on stderr."""
    try:
        yield
    except Exception as exc:
        error = exc if isinstance(exc, LoraplexError) else exhaustion(exc)
        if error is None:
            raise
        report(error)
        raise typer.Exit(1) from None


def tell(line: str) -> None:
    """Print a line about a download."""
    stderr.print(line, markup=False)


def named_adapters(given: list[str] | None) -> dict[str, str]:
    """Return name -> source from NAME=SOURCE options. Raises a usage error if an option has another form, or a name
    comes twice."""
    adapters: dict[str, str] = {}
    for item in given or ():
        name, separator, source = item.partition("=")
        if not (name and separator and source):
            raise typer.BadParameter(f"{item!r} is not NAME=SOURCE", param_hint="--adapter")
        if name in adapters:
            raise typer.BadParameter(f"{name!r} is given twice", param_hint="--adapter")
        adapters[name] = source
    return adapters


def quiet_libraries() -> None:
    """Make transformers log errors only, and show its progress bars only on a terminal."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    logging.set_verbosity_error()
