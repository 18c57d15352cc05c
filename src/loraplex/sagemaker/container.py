"""The images' entry point. `serve` alone runs the server by SageMaker's contract for containers. Other arguments are
those of the `loraplex` command."""

import logging
import os
import runpy
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loraplex.bundle import MARKERS, SETTINGS, read_json
from loraplex.config import MOST, BundleSettings, read_bundle_settings
from loraplex.errors import BundleError, ConfigurationError, LoraplexError, listed, quoted, shortened
from loraplex.sagemaker.artifact.manifest import MANIFEST
from loraplex.server import logs
from loraplex.server.keys import ENVIRONMENT

logger = logging.getLogger("loraplex.sagemaker.container")  # its __name__ is __main__

MODEL_DIR = "LORAPLEX_MODEL_DIR"  # names another folder than SageMaker's
FOLDER = "/opt/ml/model"

PORT, PAYLOAD, LOG_LEVEL = "SAGEMAKER_BIND_TO_PORT", "SAGEMAKER_MAX_PAYLOAD_IN_MB", "SAGEMAKER_CONTAINER_LOG_LEVEL"
# SageMaker kills 30 s after SIGTERM, and a drained server may take 7 s more to end.
CONTRACT = {"host": "0.0.0.0", "port": "8080", "insecure": "true", "drain_timeout": "20"}
# These give way to the bundle's loraplex.yaml. 25 MB: the largest body that SageMaker passes on at once.
DEFAULTS = {"log_format": "json", "max_body_bytes": str(25 * 2**20)}
LEVELS = ("debug", "info", "warning", "error")
OTHER_LEVELS = {"warn": "warning", "critical": "error", "fatal": "error"}
NO_EFFECT = {
    "SAGEMAKER_MODEL_SERVER_WORKERS": "one process answers all requests, in shared forward passes",
    "SAGEMAKER_PROGRAM": "this server answers /invocations itself, and runs no code of the bundle's",
}


def main(arguments: Sequence[str]) -> None:
    """Become the process that `arguments` ask for. Ends with exit code 1 where SageMaker's folder or variables are
    wrong."""
    # From here on: a container's PID 1 ignores signals that have no handler.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    if list(arguments) == ["serve"]:
        logs.configure("text" if os.environ.get("LORAPLEX_LOG_FORMAT", "").lower() == "text" else "json")
        try:
            arguments = ["serve", str(_prepare())]
        except LoraplexError as exc:
            logger.critical("%s", exc, extra={"fields": {"error": exc.code}})
            sys.exit(1)
        sys.stdout = open(os.devnull, "w")  # SageMaker's log has both streams, and the one of `curl` is no JSON
    sys.argv[1:] = arguments
    # The process stays the same, and so does its handler. The module is run, because imports point downward.
    runpy.run_module("loraplex.cli.main", run_name="__main__", alter_sys=True)


def _prepare() -> Path:
    """Set the variables that make `loraplex serve` a container of SageMaker's. Return the folder to serve."""
    folder = Path(os.environ.get(MODEL_DIR) or FOLDER)
    check_model(folder)
    settings = folder / SETTINGS
    read = read_bundle_settings(settings) if settings.is_file() else BundleSettings()
    file = read.server
    os.environ.update(variables(os.environ, file))
    if MODEL_DIR not in os.environ and not read.engine.get("adapter_root"):
        # SageMaker puts the adapters of inference components beside the model, and names their folders to /adapters.
        os.environ.setdefault("LORAPLEX_ADAPTER_ROOT", str(folder.parent))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # an endpoint may have no way out, and waits for none
    for name, reason in NO_EFFECT.items():
        if name in os.environ:
            logger.info("%s has no effect: %s", name, reason)
    known = {PORT, PAYLOAD, LOG_LEVEL, *NO_EFFECT}
    if others := [name for name in sorted(os.environ) if name.startswith("SAGEMAKER_") and name not in known]:
        logger.info("these variables have no effect: %s", listed(others))
    if not (os.environ.get(ENVIRONMENT) or os.environ.get("LORAPLEX_API_KEY_FILE") or file.get("api_key_file")):
        logger.warning("there are no API keys, so whoever reaches the port is answered; on SageMaker only AWS does")
    return folder


def check_model(folder: Path) -> None:
    """Raise BundleError where `folder` is not what SageMaker unpacks, or a file is shorter than its manifest says."""
    try:
        names = {path.name for path in folder.iterdir()}
        inner = [path.name for path in folder.iterdir() if any((path / one).is_file() for one in MARKERS)]
    except OSError as exc:
        raise BundleError(
            folder,
            f"the model's folder cannot be read: {exc.strerror}",
            remedy=f"mount the bundle there, or set {MODEL_DIR}; on SageMaker, give the model's ModelDataUrl",
        ) from None
    if not names:
        raise BundleError(
            folder, "the model's folder is empty", remedy="look whether ModelDataUrl, or the mounted folder, holds it"
        )
    if names.isdisjoint(MARKERS):
        archives = [name for name in sorted(names) if name.endswith((".tar.gz", ".tgz", ".tar"))]
        if archives:
            raise BundleError(
                folder / archives[0],
                "is an archive, and the model's folder must hold what is in it",
                remedy="name the archive in ModelDataUrl, which SageMaker unpacks, or unpack it there: tar -xf",
            )
        if len(inner) == 1:
            raise BundleError(
                folder,
                f"the bundle lies one folder deeper, in {quoted(inner[0])}",
                remedy="pack the folder's files without the folder: tar -C FOLDER -czf model.tar.gz .",
            )
    if (folder / MANIFEST).is_file():
        _check_sizes(folder, read_json(folder / MANIFEST).get("files"))


def _check_sizes(folder: Path, files: Any) -> None:
    wrong = []
    for name, expected in files.items() if isinstance(files, dict) else ():
        size = expected.get("size") if isinstance(expected, dict) else None
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if size is not None and found != size:
            wrong.append(f"{name} ({'missing' if found is None else f'{found} of {size} bytes'})")
    if wrong:
        raise BundleError(
            folder / MANIFEST,
            f"not as it was packed: {listed(wrong)}",
            remedy="upload the artifact again; `loraplex sagemaker verify` tells whether it is whole",
        )


def variables(environment: Mapping[str, str], file: Mapping[str, Any]) -> dict[str, str]:
    """Return the variables LORAPLEX_… that fulfil SageMaker's contract and obey its variables. Those that the user has
    set stay, except that SAGEMAKER_BIND_TO_PORT decides about the port. Raises ConfigurationError.

    file:  the part `server:` of the bundle's loraplex.yaml."""
    made = CONTRACT | {name: value for name, value in DEFAULTS.items() if name not in file}
    if environment.get(PAYLOAD):  # batch transform sets it; 0 is no limit
        made["max_body_bytes"] = str(_number(environment, PAYLOAD, 0, MOST // 2**20) * 2**20 or MOST)
    if level := environment.get(LOG_LEVEL, "").lower():
        made["log_level"] = _level(level)
    made = {f"LORAPLEX_{name.upper()}": value for name, value in made.items()}
    made = {name: value for name, value in made.items() if not _is_set(environment.get(name))}
    if environment.get(PORT):
        made["LORAPLEX_PORT"] = str(_number(environment, PORT, 1, 65535))
    return made


def _level(given: str) -> str:
    """Return the name of a level that is given by its name, or by a number as Python has them: 10 for debug."""
    if given.isdecimal() and len(given) < 10:
        return LEVELS[min(max(int(given) - 1, 0) // 10, len(LEVELS) - 1)]
    if (level := OTHER_LEVELS.get(given, given)) not in LEVELS:
        raise ConfigurationError(
            f"{LOG_LEVEL}={shortened(given)}",
            "is no level",
            remedy="give 10, 20, 30 or 40, or debug, info, warning or error",
        )
    return level


def _is_set(value: str | None) -> bool:
    """Return whether a user meant the variable. Kubernetes sets LORAPLEX_PORT=tcp://… for a service of this name."""
    return bool(value) and "://" not in str(value)


def _number(environment: Mapping[str, str], name: str, least: int, most: int) -> int:
    text = environment[name]
    if not (text.isdecimal() and len(text) < 10 and least <= int(text) <= most):
        raise ConfigurationError(
            f"{name}={shortened(text)}",
            f"is no whole number from {least} to {most}",
            remedy="correct or remove the variable",
        )
    return int(text)


if __name__ == "__main__":
    main(sys.argv[1:])
