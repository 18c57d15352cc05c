"""`loraplex`: the command line. Gathers the commands; each has a file of its own."""

import inspect

import typer

import loraplex
from loraplex.cli import (
    adapters,
    bench,
    calibrate,
    classify,
    cost,
    eval,
    keys,
    plan,
    routes,
    sagemaker,
    serve,
    train,
    watch,
)

app = typer.Typer(
    help="Serve many fine-tuned LoRA classifiers from one base model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("serve", cls=serve.ServeCommand)(serve.serve)
app.command("classify")(classify.classify)
app.command("bench")(bench.bench)
app.command("cost")(cost.cost)
app.command("plan")(plan.plan)
app.command("train")(train.train)
app.command("eval")(eval.evaluate)
app.command("calibrate")(calibrate.calibrate)
app.command("watch")(watch.watch)
app.add_typer(adapters.app, name="adapters")
app.add_typer(routes.app, name="routes")
app.add_typer(keys.app, name="keys")
app.add_typer(sagemaker.app, name="sagemaker")


def _unwrap(commands: typer.Typer) -> None:
    """Let each paragraph of the commands' help fill the terminal: the docstrings' own line ends would stay."""
    for command in commands.registered_commands:
        paragraphs = inspect.cleandoc(command.help or getattr(command.callback, "__doc__", None) or "").split("\n\n")
        command.help = "\n\n".join(" ".join(one.split()) for one in paragraphs)
    for group in commands.registered_groups:
        if group.typer_instance is not None:
            _unwrap(group.typer_instance)


_unwrap(app)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"loraplex {loraplex.__version__}")
        raise typer.Exit()


@app.callback()
def main(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


if __name__ == "__main__":
    app(prog_name="loraplex")
