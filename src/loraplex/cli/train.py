"""`loraplex train`: from labelled conversations to a bundle."""

import re
import signal
import sys
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from loraplex.amounts import counted
from loraplex.classifier import CONVERSATION, QUESTION
from loraplex.cli.options import errors_to_exit, origins, quiet_libraries, settings_options, stderr, stdout, tell
from loraplex.config import read_yaml, resolve, validate
from loraplex.errors import ConfigurationError, listed
from loraplex.labelled import numbers
from loraplex.problems import unknown_field
from loraplex.service.preparation import is_installed
from loraplex.training.settings import TrainInputs, TrainSettings

if TYPE_CHECKING:  # they import torch
    from loraplex.evaluation.quality import Quality
    from loraplex.training.fit import Told
    from loraplex.training.split import DataReport

FEW = 10  # conversations of a label, or on dev: below it, figures say little
INTERRUPTED = 130  # as a shell says of a command that Ctrl-C ended


@settings_options(TrainInputs, TrainSettings, has_variables=False)
def train(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="YAML file with any of these options; those given here win."),
    ] = None,
    **options: Any,
) -> None:
    """Train the classifiers of a file of labelled conversations, all at once, and write them as a bundle.

    Example: [bold]loraplex train --base path/to/base --data dialogues.jsonl --out bundle[/]

    Each line of the data is {"text": "…", "labels": {"isDone": true, "mood": "calm"}}; "conversation", "item" or
    "messages" may stand in place of "text". A label may be missing, and may be shares of votes: {"calm": 0.7,
    "angry": 0.3}. With one --classifier, a line may be {"text": "…", "label": true}.

    Ctrl-C ends the training after the step, and writes the best adapters so far, if they were evaluated; a second one
    ends it at once.

    Exit code 0: all adapters are written; 1: an error, told with its remedy; 2: an error of the command line, told
    with its usage; 130: interrupted.
    """
    given = origins(context)
    for name in ("load", "resume") if options["dry_run"] else ():
        if name in given:
            raise typer.BadParameter("has no effect with --dry-run", param_hint=given[name].strip())
    with errors_to_exit():
        inputs, settings = _read(config, options, given)
        if inputs.base is None or inputs.data is None:
            raise _missing("base" if inputs.base is None else "data")
        if inputs.out is None and not inputs.dry_run:
            raise _missing("out")
        for package in ("peft", "scipy"):
            if not is_installed(package):
                raise ConfigurationError("train", f"{package} is not installed", remedy="pip install 'loraplex[train]'")
        screen = _Screen()
        try:
            with screen.stopping():
                is_whole = _train(inputs, settings, screen)
        except KeyboardInterrupt:
            screen.close()
            stderr.print("interrupted; --resume goes on where the last evaluation was, if there was one")
            raise typer.Exit(INTERRUPTED) from None
        finally:
            screen.close()
        if inputs.dry_run or inputs.out is None:
            return
        out = Path(inputs.out)
        stdout.print(screen.results)
        if not is_whole:
            written = (
                f"{out} holds the best adapters so far" if screen.results.row_count else "no adapter is written yet"
            )
            stderr.print(f"interrupted: {written}, and --resume goes on", markup=False)
            raise typer.Exit(INTERRUPTED)
        if screen.no_better_than_chance:
            stderr.print(
                f"warning: no better than chance on dev: {listed(screen.no_better_than_chance)}; label more "
                "conversations, or train longer",
                markup=False,
            )
        stderr.print(f"serve it: loraplex serve {out}", markup=False)
        if inputs.load is not None:
            from loraplex.cli.train_load import load_shadows, told

            names = screen.names
            try:
                loaded = load_shadows(inputs.load, out, names, tell)
            except BaseException as exc:
                tell(
                    f"{out} holds the trained adapters; to load them later: loraplex adapters load NAME "
                    f"{out.resolve()}/{names[0]}, below an --adapter-root of the server"
                )
                if not isinstance(exc, KeyboardInterrupt):
                    raise
                tell("interrupted")
                raise typer.Exit(INTERRUPTED) from None
            for line in told(inputs.load, loaded):
                tell(line)


def _train(inputs: TrainInputs, settings: TrainSettings, screen: "_Screen") -> bool:
    """Run, or only report on the data with `dry_run`. Return whether the run came to its own end."""
    quiet_libraries()
    from loraplex.cli.train_load import check_server
    from loraplex.training.contracts import read_questions
    from loraplex.training.prepared import prepare
    from loraplex.training.run import train as run

    asked = {} if inputs.questions is None else read_questions(Path(inputs.questions))
    assert inputs.base is not None and inputs.data is not None
    prepared = prepare(inputs.base, Path(inputs.data), settings, inputs.classifier, asked)
    if strange := set(re.findall(r"\{\w+\}", settings.template or "")) - {CONVERSATION, QUESTION}:
        tell(f"warning: --template holds {listed(sorted(strange))}, which stays in every prompt as it is")
    if inputs.dry_run or inputs.out is None:
        screen.data(prepared.report, prepared.label_weights)
        return True
    out, names = Path(inputs.out), [task.name for task in prepared.tasks]
    screen.names = names
    there = [name for name in names if (out / name).exists()]
    if there and not (inputs.overwrite or inputs.resume):
        raise ConfigurationError(
            f"--out {out}",
            f"already holds {listed(there)}",
            remedy="give another folder, or --overwrite; --resume goes on with an interrupted run",
        )
    if inputs.load is not None:
        check_server(inputs.load, out, names)
    log_dir = None if inputs.log_dir is None else Path(inputs.log_dir)
    return run(prepared, out, settings, screen, resume=inputs.resume, overwrite=inputs.overwrite, log_dir=log_dir)


def _read(
    config: Path | None, options: Mapping[str, Any], given_by: Mapping[str, str]
) -> tuple[TrainInputs, TrainSettings]:
    """Return the options of the command line over those of the YAML file."""
    file = {} if config is None else read_yaml(config, ConfigurationError)
    known = [*TrainInputs.model_fields, *TrainSettings.model_fields]
    if unknown := [unknown_field(str(key), key, known, "key") for key in file if key not in known]:
        raise ConfigurationError(config, "; ".join(what for what, _ in unknown), remedy=unknown[0][1])
    ours = {key: file.pop(key) for key in list(file) if key in TrainInputs.model_fields}
    validate(TrainInputs, ours, config)
    validate(TrainSettings, file, config)  # so that an error names the file
    given = {key: value for key, value in options.items() if value not in (None, [])}
    return (
        resolve(
            TrainInputs, ours, {key: one for key, one in given.items() if key in TrainInputs.model_fields}, given_by
        ),
        resolve(
            TrainSettings, file, {key: one for key, one in given.items() if key in TrainSettings.model_fields}, given_by
        ),
    )


def _missing(name: str) -> ConfigurationError:
    return ConfigurationError(f"--{name}", "is missing", remedy=f"give it, or write `{name}:` in the file of --config")


class _Screen:
    """Shows a run on the terminal, and ends it early after Ctrl-C or SIGTERM."""

    def __init__(self) -> None:
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=stderr,
            speed_estimate_period=600,
        )
        self.names: Seq[str] = ()
        self._is_running = self._ends = self._is_interrupted = False
        self.no_better_than_chance: list[str] = []
        self.results = Table("classifier", "F1 on dev", "AUC", "accuracy", "log-loss", "n", "folder", box=None)

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """While the block runs, make the first Ctrl-C or SIGTERM end the training after its step."""

        def handle(number: int, frame: FrameType | None) -> None:
            if not self._is_running or self._ends:
                self._is_interrupted = True
                raise KeyboardInterrupt
            self._ends = True
            stderr.print("stopping after this step; once more ends it at once, without writing adapters")

        before = {one: signal.signal(one, handle) for one in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    def data(self, report: "DataReport", weights: Mapping[str, Mapping[str, float]]) -> None:
        sides = ", ".join(f"{count} {side}" for side, count in report.split.items())
        stderr.print(f"{counted(report.num_conversations, 'conversation')}: {sides}", markup=False)
        table = Table("classifier", "labels, the positive first", "without a label", "weights in the loss", box=None)
        for name, counts in report.counts.items():
            total = sum(counts.values()) or 1
            labels = ", ".join(f"{label} {count:g} ({count / total:.0%})" for label, count in counts.items())
            given = ", ".join(f"{label} {weight:.2f}" for label, weight in weights.get(name, {}).items())
            table.add_row(name, labels, str(report.missing[name]), given)
        stderr.print(table)
        if num := report.num_exported:
            come, texts = ("comes", "its text becomes") if num == 1 else ("come", "their texts become")
            stderr.print(
                f"{counted(num, 'conversation')} {come} from `loraplex routes export`, so {texts} no golden example",
                markup=False,
            )
        for line in _warnings(report):
            stderr.print(f"warning: {line}", markup=False)

    def started(self, names: Seq[str], num_parameters: int, num_steps: int, first_step: int) -> None:
        if self._is_interrupted:  # and a library that was being imported swallowed the exception
            raise KeyboardInterrupt
        self._is_running = True
        stderr.print(
            f"training {counted(len(names), 'adapter')} at once: {num_parameters / 1e6:.1f} M parameters, "
            f"{counted(num_steps, 'step')}" + (f", {first_step} of them done" if first_step else ""),
            markup=False,
        )
        if sys.stderr.isatty():
            self._bars.start()
        self._bars.add_task("steps", total=num_steps, completed=first_step, note="")

    def step(self, told: "Told") -> bool:
        losses = [one for one in told.losses if one is not None]
        note = (
            f"loss {sum(losses) / max(1, len(losses)):.3f}, {told.num_tokens / told.seconds:,.0f} tokens/s, "
            f"peak {told.peak_bytes / 1e9:.1f} GB"
        )
        self._bars.update(self._bars.task_ids[0], completed=told.step, note=note)
        if told.quality is not None:
            found = [one.f1 for one in told.quality if one is not None and one.f1 is not None]
            each = ", ".join(
                f"{name} {one.f1:.3f}" + ("*" if best else "") + (" stopped" if stopped else "")
                for name, one, best, stopped in zip(self.names, told.quality, told.is_best, told.stopped, strict=True)
                if one is not None and one.f1 is not None
            )
            mean = f"mean F1 on dev {sum(found) / len(found):.3f} ({each})" if found else "no F1 on dev"
            stderr.print(f"step {told.step} of {told.num_steps}: {note}; {mean}", markup=False)
        return self._ends

    def finished(self, name: str, before: "Quality | None", after: "Quality | None", folder: Path) -> None:
        values = [] if after is None else [after.f1, after.auc, after.accuracy, after.log_loss]
        figures = ["-" if value is None else f"{value:.3f}" for value in values] or ["-"] * 4
        if after is not None and (after.f1 == 0 or (after.auc is not None and after.auc <= 0.5)):
            self.no_better_than_chance.append(name)
        self.results.add_row(name, *figures, "0" if after is None else str(after.n), str(folder))

    def close(self) -> None:
        if self._bars.live.is_started:  # rich would write an empty line
            self._bars.stop()


def _warnings(report: "DataReport") -> Iterator[str]:
    """Yield what is odd in the data."""
    if num := report.num_unlabelled:
        yield f"{counted(num, 'conversation')} without a label for these classifiers: left out"
    if num := report.num_duplicates:
        yield f"{counted(num, 'conversation')} like an earlier one; all copies stay on one side of the split"
    if num := sum(report.contradictions.values()):
        yield f"{counted(num, 'label')} unlike that of the same conversation elsewhere"
    for lines, what in ((report.cut, "cut"), (report.left_out, "left out")):
        if lines:
            yield f"{_some(lines)}: too long, and {what}; of line {lines[0]}, {report.too_long[lines[0]]}"
    for name, counts in report.counts.items():
        told = []
        if rare := [f"{label!r}" for label, count in counts.items() if count < FEW]:
            told.append(f"fewer than {FEW} conversations with {', '.join(rare)}")
        if unseen := [f"{label!r} in {side}" for of, label, side in report.unseen if of == name]:
            told.append(f"none with {', '.join(unseen)}")
        if told:
            yield f"{name}: {', and '.join(told)}"
    for side, use in (("dev", "nothing says how good they are"), ("calibration", "their scores are not calibrated")):
        if report.split[side] < FEW:
            yield f"{side} has {counted(report.split[side], 'conversation')}: too few, so {use}"


def _some(lines: Seq[int]) -> str:
    return numbers(lines[:FEW]) + (f", … ({len(lines)} in all)" if len(lines) > FEW else "")
