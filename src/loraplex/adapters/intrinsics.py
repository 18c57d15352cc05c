"""Makes a classifier of an adapter that comes with an `io.yaml`: writes its `classifier.yaml`."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from loraplex.adapters.files import FILES
from loraplex.bundle import CONTRACT, check_name, open_adapter
from loraplex.disk import folder_beside, unchanged
from loraplex.errors import AdapterError, BundleError
from loraplex.io_yaml import IO_YAML, read_intrinsic


def import_intrinsic(
    folder: Path, name: str, arguments: Mapping[str, str] | None = None, out: Path | None = None
) -> Path:
    """Write the contract that the `io.yaml` in `folder` describes, and return the contract's path.

    name:       the classifier's name.
    arguments:  values of the placeholders in the io.yaml's instruction.
    out:        a folder, such as a bundle's. A copy of the adapter in `out`/`name` gets the contract. By default
                `folder` itself gets it.
    Raises ConfigurationError where the folder holds no classifier, or a file would be written over."""
    check_name(name)
    if not (folder / IO_YAML).is_file():
        raise BundleError(folder, f"no {IO_YAML} in it", remedy="write a classifier.yaml: docs/contracts.md says how")
    text = read_intrinsic(folder / IO_YAML, arguments).to_yaml(name)
    target = folder if out is None else out / name
    new = target / CONTRACT if out is None else target
    if new.exists():
        raise BundleError(new, "exists already", remedy="remove it, or name another folder: nothing is written over")
    with folder_beside(new) as work:
        made = Path(work, new.name)
        if out is None:
            made.write_text(text, encoding="utf-8")
        else:
            made.mkdir()
            with unchanged([folder / one for one in FILES], AdapterError):
                for one in FILES:
                    if (folder / one).is_file() and one != CONTRACT:
                        shutil.copy(folder / one, made)
            (made / CONTRACT).write_text(text, encoding="utf-8")
            open_adapter(name, made)
        made.rename(new)
    return target / CONTRACT
