"""Options and output that the commands for a running server share."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraplex.cli.options import errors_to_exit, stdout

if TYPE_CHECKING:
    from loraplex.client import Client

UrlOption = Annotated[
    str, typer.Option(envvar="LORAPLEX_URL", help="The server's URL. Set its API key in LORAPLEX_API_KEY.")
]
NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="The name of the adapter or route.", show_default=False)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
URL = "http://127.0.0.1:8000"


@contextmanager
def asking(url: str) -> Iterator["Client"]:
    """Yield a client of the server at `url`. A LoraplexError becomes two lines on stderr and exit code 1. The client
    does not retry, because the user can."""
    with errors_to_exit():
        from loraplex.client import Client

        with Client(url, max_retries=0) as client:
            yield client


def print_json(value: Any) -> None:
    """Print a dataclass, or a tuple of dataclasses, as JSON."""
    typer.echo(json.dumps([asdict(one) for one in value] if isinstance(value, tuple) else asdict(value)))


def print_fields(info: Any, as_json: bool) -> None:
    """Print a dataclass with one line for each field that is not None, or as JSON."""
    if as_json:
        print_json(info)
        return
    for key, value in asdict(info).items():
        if value is not None:
            shown = json.dumps(value) if isinstance(value, list | tuple | dict) else value
            stdout.print(f"{key}: {shown}", markup=False)
