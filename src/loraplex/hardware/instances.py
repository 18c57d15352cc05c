"""Machines for rent: Amazon's instances, by their names in EC2 and in SageMaker."""

import functools
from collections.abc import Mapping

from loraplex.hardware.data import Data, entries, unknown
from loraplex.hardware.devices import Device, device

SAGEMAKER = "ml."  # what SageMaker's names of EC2's instances begin with


class Instance(Data):
    """An instance of `instances.yaml`.

    name:         ml.g5.2xlarge in SageMaker, g5.2xlarge in EC2.
    device_name:  a name of `devices.yaml`; None where the instance computes on its CPUs.
    num_devices:  how many such devices it has.
    """

    name: str
    device_name: str | None
    num_devices: int
    vcpus: int
    memory_gib: int

    @property
    def device(self) -> Device | None:
        return None if self.device_name is None else device(self.device_name)

    @property
    def memory_bytes(self) -> int:
        """Host memory."""
        return self.memory_gib * 2**30

    @property
    def is_sagemaker(self) -> bool:
        return self.name.startswith(SAGEMAKER)


@functools.cache
def instances() -> Mapping[str, Instance]:
    """Return all known instances by name, each once for SageMaker and once for EC2."""
    ec2 = entries("instances.yaml", Instance)
    sagemaker = (one.model_copy(update={"name": SAGEMAKER + name}) for name, one in ec2.items())
    return {one.name: one for one in (*sagemaker, *ec2.values())}


def instance(name: str) -> Instance:
    """Return the instance of a name such as ml.g5.2xlarge. Raises ConfigurationError for an unknown one."""
    if found := instances().get(name.lower()):
        return found
    raise unknown("instance", name, instances(), "plan for a device with --gpu")
