"""Files that change while a real server reads them."""

import shutil
from pathlib import Path

import pytest

import serving
import tiny
from overwriting import overwriting

pytestmark = pytest.mark.chaos
WEIGHTS = "adapter_model.safetensors"
QUESTION = {"input": "Customer: is my payment done?", "classifiers": "x"}


@pytest.mark.parametrize("pauses", [(0.002,), (0, 0.002, 0.05)])
def test_writing_over_a_file_while_it_is_loaded(tmp_path: Path, pauses: tuple[float, ...]) -> None:
    """The server lives on, and answers with one of the versions that were written."""
    bundle = tiny.save_bundle(tmp_path / "bundle", adapters=1)
    for seed in (1, 2):
        tiny.save_adapter(bundle, tmp_path / "new" / f"v{seed}", contract=tiny.CONTRACT, seed=seed)
    versions = [tmp_path / "new" / "v1", tmp_path / "new" / "v2"]
    changing = shutil.copytree(versions[0], tmp_path / "new" / "changing")
    options = ("--dtype", "float32", "--adapter-root", tmp_path / "new")
    with serving.serve(bundle, *options) as server, serving.client(server) as client:

        def load(folder: Path) -> int:
            answer = client.put("/v1/adapters/x", json={"source": str(folder)})
            if answer.status_code != 200:
                assert answer.status_code == 422
                assert answer.json()["error"]["code"] == "adapter_error"
                assert "new folder" in answer.json()["error"]["remedy"]
            return answer.status_code

        def ask() -> tuple[str, float]:
            [verdict] = client.post("/v1/classify", json=QUESTION).raise_for_status().json()["verdicts"]
            return verdict["adapter"]["version"], verdict["confidence"]

        valid = set()
        for folder in versions:
            assert load(folder) == 200
            valid.add(ask())
        assert len(valid) == 2
        statuses = []
        with overwriting(changing / WEIGHTS, *(folder / WEIGHTS for folder in versions), pauses=pauses):
            for number in range(200):
                statuses.append(load(changing))
                if number % 10 == 0:
                    assert ask() in valid
        assert 422 in statuses, "no load met a write"
        assert load(changing) in (200, 422)  # the writer was stopped, perhaps within a write
        assert ask() in valid
        shutil.copy(versions[1] / WEIGHTS, changing)
        assert load(changing) == 200 and ask() in valid


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_writing_over_the_base_while_it_serves(tmp_path: Path, family: str) -> None:
    """The base that answers is the one that was loaded: neither our decoder nor transformers' model maps the file."""
    bundle = tiny.save_bundle(tmp_path / "bundle", adapters=1, config=tiny.FAMILIES[family])
    with serving.serve(bundle, "--dtype", "float32") as server, serving.client(server) as client:
        question = {"model": "bundle", "prompt": "is it done?", "max_tokens": 4, "temperature": 0, "logprobs": 1}

        def ask() -> object:
            return client.post("/v1/completions", json=question).raise_for_status().json()["choices"]

        before = ask()
        (bundle / "model.safetensors").write_bytes(b"")
        assert ask() == before
