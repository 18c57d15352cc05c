"""Repairs an adapter whose tensors a wrapper renamed: writes it again under PEFT's names."""

import shutil
from pathlib import Path

from loraplex.adapters.checkpoint import read_unidentified, rename_tensors
from loraplex.adapters.files import FILES
from loraplex.bundle import ADAPTER_WEIGHTS, open_adapter, open_base
from loraplex.disk import folder_beside, unchanged
from loraplex.errors import AdapterError, BundleError
from loraplex.model.loader import read_config, read_layers


def repair(folder: Path, out: Path, base: str) -> int:
    """Write the adapter in `folder` to the new folder `out` under PEFT's names, and return how many were renamed.

    base: a base or a bundle, whose layers the result must fit. Reads none of its weights. Raises ConfigurationError
    where no name is wrong, the result does not fit, or `out` exists. `out` is then not made."""
    if out.exists():
        raise BundleError(out, "exists already", remedy="name a new folder: nothing is written over")
    open_adapter("adapter", folder)
    root = open_base(base).base
    layers, _ = read_layers(read_config(root, packs=False), root, packs=False)
    with folder_beside(out) as work:
        made = Path(work, out.name)
        made.mkdir()
        with unchanged([folder / name for name in FILES], AdapterError):
            for name in FILES:
                if name != ADAPTER_WEIGHTS and (folder / name).is_file():
                    shutil.copy(folder / name, made)
            num_renamed = rename_tensors(folder, made)
        if not num_renamed:
            raise AdapterError(
                folder, "all tensors have PEFT's names already", remedy="load it, or run `loraplex adapters verify`"
            )
        try:
            read_unidentified(made, layers)
        except AdapterError as exc:
            message = exc.message.replace(str(made), "under PEFT's names")
            raise AdapterError(folder, f"{message}; nothing was written", remedy=exc.remedy) from None
        made.rename(out)
    return num_renamed
