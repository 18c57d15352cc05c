"""`loraplex sagemaker`: from a bundle to an endpoint on Amazon SageMaker. Gathers the commands."""

import typer

from loraplex.cli import endpoint, endpoint_use, pack

app = typer.Typer(
    help="Deploy to Amazon SageMaker.\n\nExample: [bold]loraplex sagemaker status support[/]",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
for command in (
    pack.pack,
    pack.verify,
    endpoint.deploy,
    endpoint.update,
    endpoint.status,
    endpoint_use.logs,
    endpoint_use.invoke,
    endpoint_use.autoscale,
    endpoint.delete,
):
    app.command()(command)
app.add_typer(endpoint_use.adapter, name="adapter")
