"""A step's small tensors, sent to the device in one copy. A CPU stands in for the device."""

import torch

from loraplex.ops.staging import Staging

CPU = torch.device("cpu")


def test_on_a_cpu_nothing_is_copied() -> None:
    assert Staging(CPU).put([1, 2, 3]).tolist() == [1, 2, 3]  # valid without `send`


def test_values_are_valid_after_send_whatever_their_dtypes() -> None:
    staging = Staging(CPU, is_direct=False)
    for step in range(3):
        staging.begin()
        values = [[step, 7], [1], [], [step] * 5, [-3, 4, 5]]
        dtypes = [torch.long, torch.int32, torch.long, torch.int32, torch.long]
        tensors = [staging.put(one, dtype) for one, dtype in zip(values, dtypes, strict=True)]
        staging.send()
        assert [tensor.tolist() for tensor in tensors] == values
        assert [tensor.dtype for tensor in tensors] == dtypes


def test_steps_share_their_memory() -> None:
    staging = Staging(CPU, is_direct=False)
    addresses = set()
    for _ in range(3):
        staging.begin()
        addresses.add(staging.put([1, 2, 3]).data_ptr())
        staging.send()
    assert len(addresses) == 1


def test_tensors_keep_their_values_when_a_step_outgrows_the_memory() -> None:
    staging = Staging(CPU, is_direct=False)
    staging.begin()
    small, large = list(range(10)), list(range(20_000))  # 80 and 160,000 bytes; the memory begins at 65,536
    tensors = [staging.put(small), staging.put(large), staging.put(small)]
    staging.send()
    assert [tensor.tolist() for tensor in tensors] == [small, large, small]
    staging.begin()
    again = staging.put(large)
    staging.send()
    assert again.tolist() == large and tensors[0].tolist() == small
