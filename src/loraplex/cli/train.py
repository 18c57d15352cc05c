"""`loraplex train`: from labelled conversations to a bundle."""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from loraplex.cli.options import errors_to_exit, origins, quiet_libraries, settings_options, stderr, stdout
from loraplex.config import read_yaml, resolve
from loraplex.errors import ConfigurationError
from loraplex.training.settings import TrainSettings

if TYPE_CHECKING:  # they import torch
    from loraplex.training.fit import Told
    from loraplex.training.scores import Quality
    from loraplex.training.split import DataReport


@settings_options(TrainSettings, has_variables=False)
def train(
    context: typer.Context,
    base: Annotated[str, typer.Option("--base", metavar="DIR|HUB-ID", help="The base to train adapters for.")],
    data: Annotated[Path, typer.Option("--data", metavar="FILE", help="Labelled conversations: .jsonl or .jsonl.gz.")],
    out: Annotated[Path, typer.Option("--out", metavar="BUNDLE", help="The folder to write the adapters into.")],
    classifier: Annotated[
        list[str] | None,
        typer.Option(
            "--classifier", metavar="NAME", help="Train this one; all that have labels by default. Repeatable."
        ),
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option("--questions", metavar="FILE", help="YAML: classifier -> its question, or keys of its contract."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="YAML with these options; options given here win.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Report on the data, and end.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run of the same ended.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace adapters that --out already holds.")] = False,
    **settings: Any,
) -> None:
    """Train the classifiers of a file of labelled conversations, all at once, and write them as a bundle.

    Example: [bold]loraplex train --base path/to/base --data dialogues.jsonl --out bundle[/]

    Each line of FILE is {"text": "…", "labels": {"isDone": true, "mood": "calm"}}; "conversation" or "messages" may
    stand in place of "text". A label may be missing, and may be shares of votes: {"calm": 0.7, "angry": 0.3}.
    """
    with errors_to_exit():
        file = {} if config is None else read_yaml(config, ConfigurationError)
        resolved = resolve(TrainSettings, file, settings, origins(context))
        quiet_libraries()
        from loraplex.training import run
        from loraplex.training.contracts import read_questions

        asked = {} if questions is None else read_questions(questions)
        prepared = run.prepare(base, data, resolved, classifier or (), asked)
        there = [task.name for task in prepared.tasks if (out / task.name).exists()]
        if there and not overwrite:
            raise ConfigurationError(
                f"--out {out}", f"already holds {there[0]!r}", remedy="give another folder, or --overwrite"
            )
        watcher = _Screen()
        if dry_run:
            return watcher.data(prepared.report, {})
        try:
            run.train(prepared, out, resolved, watcher, resume=resume)
        except KeyboardInterrupt:
            watcher.close()
            stderr.print(f"interrupted; {out} holds the best adapters so far, and --resume goes on")
            raise typer.Exit(130) from None
        finally:
            watcher.close()
        stdout.print(watcher.results)
        stderr.print(f"serve it: loraplex serve {out}", markup=False)


class _Screen:
    """Shows a run on the terminal."""

    def __init__(self) -> None:
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=stderr,
        )
        self._names: Seq[str] = ()
        self.results = Table("classifier", "F1 on dev", "AUC", "accuracy", "log-loss", "n", box=None)

    def data(self, report: "DataReport", weights: Mapping[str, Mapping[str, float]]) -> None:
        sides = ", ".join(f"{count} {side}" for side, count in report.split.items())
        stderr.print(f"{report.num_conversations} conversations: {sides}", markup=False)
        table = Table("classifier", "labels", "without a label", "weights in the loss", box=None)
        for name, counts in report.counts.items():
            total = sum(counts.values()) or 1
            labels = ", ".join(f"{label} {count:g} ({count / total:.0%})" for label, count in counts.items())
            given = ", ".join(f"{label} {weight:.2f}" for label, weight in weights.get(name, {}).items())
            table.add_row(name, labels, str(report.missing[name]), given)
        stderr.print(table)
        for count, what in (
            (report.num_duplicates, "are there twice; both copies stay on one side of the split"),
            (sum(report.contradictions.values()), "labels contradict those of the same conversation elsewhere"),
            (report.num_cut, "prompts are too long and lose their oldest turns"),
            (report.num_left_out, "prompts do not fit at all and are left out"),
        ):
            if count:
                stderr.print(f"warning: {count} {what}", markup=False)
        for name, counts in report.counts.items():
            rare = [label for label, count in counts.items() if count < 10]
            if rare:
                stderr.print(f"warning: {name} has fewer than 10 conversations with {', '.join(rare)}", markup=False)

    def started(self, names: Seq[str], num_parameters: int, num_steps: int, first_step: int) -> None:
        self._names = names
        stderr.print(f"training {len(names)} adapters at once: {num_parameters / 1e6:.1f} M parameters", markup=False)
        self._bars.start()
        self._bars.add_task("steps", total=num_steps, completed=first_step, note="")

    def step(self, told: "Told") -> None:
        losses = [one for one in told.losses if one is not None]
        note = f"loss {sum(losses) / max(1, len(losses)):.3f}, {told.num_tokens / told.seconds:,.0f} tokens/s"
        self._bars.update(self._bars.task_ids[0], completed=told.step, note=note)
        if told.quality is not None:
            found = [one.f1 for one in told.quality if one is not None and one.f1 is not None]
            mean = sum(found) / max(1, len(found))
            each = ", ".join(
                f"{name} {one.f1:.3f}" + ("*" if best else "") + (" stopped" if stopped else "")
                for name, one, best, stopped in zip(self._names, told.quality, told.is_best, told.stopped, strict=True)
                if one is not None and one.f1 is not None
            )
            self._bars.print(f"step {told.step}: mean F1 on dev {mean:.3f} ({each})")

    def finished(self, name: str, before: "Quality | None", after: "Quality | None", folder: Path) -> None:
        one = after
        figures = (
            ["", "", "", "", "0"]
            if one is None
            else ["" if value is None else f"{value:.3f}" for value in (one.f1, one.auc, one.accuracy, one.log_loss)]
            + [str(one.n)]
        )
        self.results.add_row(name, *figures)

    def close(self) -> None:
        self._bars.stop()
