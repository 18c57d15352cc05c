"""`loraplex keys …`: API keys for `loraplex serve`."""

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
    name: Annotated[str, typer.Option(help="Whose it is: stands in the log.", show_default=False)],
    scope: Annotated[str, typer.Option(help="infer, or admin, which may do everything.")] = "infer",
) -> None:
    """Make a key. The line for `loraplex serve --api-key-file`, which holds only its hash, goes to standard output; the
    key itself is shown once, on standard error.

    Example: [bold]loraplex keys new --name ci --scope infer >> keys.txt[/]
    """
    with errors_to_exit():
        from loraplex.server.keys import new_key

        secret, line = new_key(name, scope)
    stderr.print(f"the key, which is not shown again: {secret}", markup=False)
    typer.echo(line)
