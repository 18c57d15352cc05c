"""`loraplex sagemaker`: from a bundle to an endpoint on Amazon SageMaker. Gathers the commands."""

import typer

from loraplex.cli import pack

app = typer.Typer(help="Deploy to Amazon SageMaker.", no_args_is_help=True, rich_markup_mode="rich")
app.command("pack")(pack.pack)
app.command("verify")(pack.verify)
