"""`loraplex sagemaker`: from a bundle to an endpoint on Amazon SageMaker. Gathers the commands."""

import typer

app = typer.Typer(help="Deploy to Amazon SageMaker.", no_args_is_help=True)
