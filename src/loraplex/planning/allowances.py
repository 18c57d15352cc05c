"""What a process takes beside its tensors, and the share of the limits that it reaches: dated data with its source."""

import functools
from pathlib import Path

from loraplex.config import read_yaml, validate
from loraplex.errors import ConfigurationError
from loraplex.hardware.data import Data, Date


class Sourced(Data):
    """read: the date. measured: whether it was measured, or only assumed."""

    read: Date
    source: str
    measured: bool


class CpuAllowance(Sourced):
    """Resident memory of a process that computes on a CPU, in bytes.

    libraries_bytes:     Python and the libraries, imported.
    first_steps_bytes:   what the first forward passes add, by number format: threads, and the kernels' caches.
    tokenizer_bytes:     of any tokenizer; its file's size times `tokenizer_factor` is added.
    """

    libraries_bytes: int
    first_steps_bytes: dict[str, int]
    tokenizer_bytes: int
    tokenizer_factor: float


class CudaAllowance(Sourced):
    context_bytes: int


class Efficiency(Sourced):
    """The share of the limit that a forward pass reaches."""

    low: float
    high: float


class Allowances(Data):
    """The contents of `allowances.yaml`."""

    cpu: CpuAllowance
    cuda: CudaAllowance
    efficiency: dict[str, Efficiency]


@functools.cache
def allowances() -> Allowances:
    path = Path(__file__).with_name("allowances.yaml")
    return validate(Allowances, read_yaml(path, ConfigurationError), path)
