"""What a device can hold and compute, by its maker's sheet."""

from collections.abc import Mapping

from loraplex.hardware.data import Data, Date, entries, unknown


class Device(Data):
    """A device of `devices.yaml`.

    cuda_name:    what the driver calls it.
    memory_mib:   what CUDA reports as its total.
    gb_per_s:     bandwidth of its memory, in 10^9 bytes/s.
    bf16_tflops:  dense matrix products in bfloat16, in 10^12 FLOP/s.
    """

    name: str
    title: str
    cuda_name: str
    memory_mib: int
    gb_per_s: float
    bf16_tflops: float
    read: Date
    sheet: str
    read_at: tuple[str, ...]

    @property
    def memory_bytes(self) -> int:
        return self.memory_mib * 2**20

    @property
    def bytes_per_s(self) -> float:
        return self.gb_per_s * 1e9

    @property
    def flops_per_s(self) -> float:
        return self.bf16_tflops * 1e12


def devices() -> Mapping[str, Device]:
    """Return all known devices by name."""
    return entries("devices.yaml", Device)


def find_device(cuda_name: str) -> Device | None:
    """Return the device that the driver calls so; None for another one, and for a CPU."""
    return next((one for one in devices().values() if one.cuda_name == cuda_name), None)


def device(name: str) -> Device:
    """Return the device of a name such as a10g. Raises ConfigurationError for an unknown one."""
    if found := devices().get(name.lower()):
        return found
    raise unknown("device", name, devices(), "give --gpu cpu, or leave it out, on a machine of another kind")
