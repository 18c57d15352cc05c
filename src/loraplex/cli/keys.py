"""`loraplex keys …`: makes API keys for `loraplex serve`."""

from typing import Annotated

import typer

from loraplex.cli.options import errors_to_exit, stderr

app = typer.Typer(
    help="Make API keys.\n\nExample: [bold]loraplex keys new --name ci --scope infer >> keys.txt[/]",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


@app.callback()
def keys() -> None:
    pass


@app.command()
def new(
    name: Annotated[str, typer.Option(help="Who uses the key; the log shows this name.", show_default=False)],
    scope: Annotated[str, typer.Option(help="infer, or admin, which allows everything.")] = "infer",
) -> None:
    """Make an API key.

    The key is shown once, on standard error. Its line for `loraplex serve --api-key-file` goes to standard output and
    holds only a hash.

    Example: [bold]loraplex keys new --name ci --scope infer >> keys.txt[/]
    """
    with errors_to_exit():
        from loraplex.server.keys import new_key

        secret, line = new_key(name, scope.lower())
    stderr.print(f"the key, shown only once: {secret}", markup=False)
    typer.echo(line)
