"""A safetensors file is read as safetensors reads it, and a writer can neither kill the reader nor mix two versions."""

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from loraplex.adapters.tensor_file import TensorFile
from loraplex.disk import unchanged
from loraplex.errors import AdapterError, LoraplexError
from overwriting import overwriting


def test_a_writer_neither_kills_the_reader_nor_mixes_versions(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    versions = [tmp_path / "one", tmp_path / "two"]
    for value, version in enumerate(versions):
        save_file({f"t{i}": torch.full((100_000,), float(value)) for i in range(4)}, version)
    path.write_bytes(versions[0].read_bytes())
    num_read, errors = 0, set()
    with overwriting(path, *versions):
        for _ in range(60):
            try:
                with unchanged([path], AdapterError):
                    file = TensorFile(path, AdapterError)
                    found = torch.stack(list(file.read(file.entries).values()))
            except LoraplexError as exc:
                errors.add(exc.message)
                assert "new folder" in exc.remedy
                continue
            num_read += 1
            assert found.min() == found.max(), "the tensors of two versions"
    assert num_read and any("changed while it was read" in message for message in errors)


def test_a_file_is_read_as_safetensors_reads_it(tmp_path: Path) -> None:
    path, types = tmp_path / "x.safetensors", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]
    made = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in types}
    made |= {"scalar": torch.tensor(3.5), "empty": torch.ones(0, 4)}
    save_file(made, path, metadata={"format": "pt"})
    file = TensorFile(path, AdapterError)
    found = file.read(made)
    assert file.entries.keys() == found.keys() == made.keys()
    for one, tensor in zip(found.values(), made.values(), strict=True):
        assert one.dtype == tensor.dtype and one.shape == tensor.shape and torch.equal(one, tensor)


NUMBERS = st.sampled_from([0, 1, 2, 8, 16, 24, 2**63, 2**64, -1, 1.0, True, None, "1"])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(NUMBERS, max_size=3) | NUMBERS,
    offsets=st.lists(NUMBERS, max_size=3),
    dtype=st.sampled_from(["F32", "F16", "I8", "BOOL", "X", 1]),
    num_bytes=st.sampled_from([16, 24, 32]),
)
def test_what_safetensors_refuses_is_refused(
    tmp_path: Path, shape: object, offsets: list[object], dtype: object, num_bytes: int
) -> None:
    second = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    first = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "a": first, "b": second}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(num_bytes))
    try:
        with safe_open(path, "pt") as theirs:
            expected = {name: theirs.get_slice(name).get_shape() for name in theirs.keys()}
    except SafetensorError:
        with pytest.raises(AdapterError, match="not readable as safetensors"):
            TensorFile(path, AdapterError)
        return
    assert {name: list(one.shape) for name, one in TensorFile(path, AdapterError).entries.items()} == expected


def test_a_file_that_is_cut_short_says_so(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(AdapterError, match=r"describes 4\d\d bytes, and the file has 4\d\d; it was cut short"):
        TensorFile(path, AdapterError)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"<!DOCTYPE html><html>", "a page of HTML"),
        (b"PK\x03\x04" + bytes(60), "a zip archive"),
        (b"\x80\x02}q" * 9, "a pickle"),
    ],
)
def test_what_stands_in_its_place_is_named(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(AdapterError, match=f"not readable as safetensors: it is {what}"):
        TensorFile(tmp_path / "x.safetensors", AdapterError)
