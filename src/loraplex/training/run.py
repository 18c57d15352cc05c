"""A whole training run: from a file of labelled conversations to a bundle that can be served."""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Protocol

import torch

from loraplex.errors import ConfigurationError, listed
from loraplex.evaluation.quality import Quality
from loraplex.machine import choose_threads
from loraplex.model.loader import resolve_device, resolve_dtype
from loraplex.training.finish import finish
from loraplex.training.fit import DivergedError, Fit, Told
from loraplex.training.identity import identity
from loraplex.training.log import Log
from loraplex.training.output import check_out, check_room, locked
from loraplex.training.prepared import Prepared, targets_of
from loraplex.training.settings import TrainSettings
from loraplex.training.split import DataReport
from loraplex.training.state import State
from loraplex.training.trainee import Trainee

HIDDEN = ".training"  # the folder of a run's state and log in its bundle


class Watcher(Protocol):
    """Is told what happens in a run, as it happens."""

    def data(self, report: DataReport, weights: Mapping[str, Mapping[str, float]]) -> None:
        """Take what the data holds, before the base's weights are read. weights: of each label in the loss."""

    def started(self, names: Seq[str], num_parameters: int, num_steps: int, first_step: int) -> None: ...

    def step(self, told: Told) -> bool | None:
        """Return whether the run is to end after this step."""

    def finished(self, name: str, before: Quality | None, after: Quality | None, folder: Path) -> None: ...


def train(
    prepared: Prepared,
    out: Path,
    settings: TrainSettings,
    watcher: Watcher,
    *,
    resume: bool = False,
    overwrite: bool = False,
    log_dir: Path | None = None,
) -> bool:
    """Train, calibrate and write the adapters into the bundle `out`.

    resume:     go on from the state in `out`.
    overwrite:  begin anew where `out` holds the state of an interrupted run. It stays until this run has one.
    log_dir:    folder of log.csv; `out/.training` by default.
    Returns False where the watcher ended the run early. The best weights so far are written all the same, unless no
    evaluation has found any; the state stays. Raises ConfigurationError where `out` cannot be written or another run
    writes there, and where the training diverges.
    """
    with locked(out / HIDDEN, out):
        return _train(prepared, out, settings, watcher, resume, overwrite, log_dir)


def _train(
    prepared: Prepared,
    out: Path,
    settings: TrainSettings,
    watcher: Watcher,
    resume: bool,
    overwrite: bool,
    log_dir: Path | None,
) -> bool:
    check_out(out, prepared.base, [task.name for task in prepared.tasks])
    state = State(out / HIDDEN / "state.pt", identity(prepared, settings))
    begun = state.load() if resume else None
    if state.is_there and not (resume or overwrite):
        raise ConfigurationError(
            f"--out {out}",
            "holds the state of an interrupted run",
            remedy="--resume goes on with it, and --overwrite begins anew; or give another folder",
        )
    watcher.data(prepared.report, prepared.label_weights)
    choose_threads()
    device = resolve_device(settings.device)
    dtype = resolve_dtype(settings.dtype, device)
    torch.manual_seed(settings.seed)
    tasks = prepared.tasks
    trainee = Trainee.load(
        prepared.base,
        prepared.config,
        prepared.layers,
        dtype,
        device,
        num_adapters=len(tasks),
        rank=settings.rank,
        alpha=settings.scale,
        targets=targets_of(prepared.layers, settings.targets),
        kv_memory=settings.kv_memory,
        num_labels=[len(task.contract.labels) for task in tasks] if settings.kind == "score" else None,
    )
    num_parameters = sum(one.numel() for one in trainee.parameters())
    check_room(out, num_parameters)
    label_ids, names = [task.label_ids for task in tasks], [task.name for task in tasks]
    loop = Fit(trainee, settings, prepared.of("train"), prepared.of("dev"), label_ids, prepared.weights)
    if begun is not None:
        loop.load_state(begun)
    log = Log(log_dir or out / HIDDEN, names, loop.step)
    watcher.started(names, num_parameters, loop.num_steps, loop.step)

    def tell(told: Told) -> bool | None:
        log.step(told)
        return watcher.step(told)

    diverged = None
    try:
        is_whole = loop.run(tell, state.save)
    except DivergedError as exc:
        diverged, is_whole = exc, False
    finally:
        log.close()
    if is_whole or loop.has_best:
        finish(prepared, out, settings, loop, trainee, watcher.finished, device, dtype)
    if diverged is not None:
        written = f"{out} holds the best adapters before it" if loop.has_best else "no adapter is written"
        raise ConfigurationError(
            "training",
            f"a loss or a gradient of {listed([names[one] for one in diverged.adapters])} is no number at step "
            f"{diverged.step} of {loop.num_steps}; {written}",
            remedy="lower --learning-rate, or give --dtype float32",
        )
    if is_whole:
        state.remove()
    return is_whole
