"""`loraplex sagemaker pack`: what an artifact holds, what is refused, and that it answers as its bundle does."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tiny
from loraplex import Loraplex
from loraplex.bundle import open_bundle
from loraplex.cli.main import app
from loraplex.config import EngineConfig
from loraplex.errors import ConfigurationError
from loraplex.sagemaker.artifact.layout import CODE
from loraplex.sagemaker.artifact.manifest import MANIFEST, Manifest, read_manifest
from loraplex.sagemaker.artifact.pack import Packed, pack
from loraplex.sagemaker.artifact.verify import verify
from loraplex.service import preparation
from loraplex.service.named_adapters import add_adapters

BASE = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "classifier.yaml"}
TEXT = "Customer: hello, is my payment done?\nAgent: yes, it is done\nCustomer: thanks"


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle that a test may change."""
    return shutil.copytree(tiny_bundle, tmp_path / "mine" / "bundle")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where outputs are made, and nothing else."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def packed(bundle: Path, out: Path, adapters: Mapping[str, str | Path] | None = None, **options: Any) -> Packed:
    opened = add_adapters(open_bundle(bundle), adapters or {}, EngineConfig())
    return pack(opened, str(out), **options)


def unpacked(archive: Path, folder: Path) -> Path:
    folder.mkdir()
    subprocess.run(["tar", "xzf", archive, "-C", folder], check=True)
    return folder


def names_in(folder: Path) -> set[str]:
    """The names of all files, without those of the code."""
    names = {one.relative_to(folder).as_posix() for one in folder.rglob("*") if one.is_file()}
    return {name for name in names if not name.startswith(f"{CODE}/")}


def manifest_in(folder: Path) -> Manifest:
    return read_manifest(folder, (folder / MANIFEST).read_bytes())


def answers(path: Path, text: str = TEXT) -> dict[str, Any]:
    with Loraplex.load(path, dtype="float32", device="cpu", kv_cache="0") as loraplex:
        return {
            one.classifier: (one.label, one.scores, one.adapter and one.adapter.version)
            for one in loraplex.classify(text).verdicts
        }


# What an artifact holds


def test_an_artifact_holds_what_a_server_reads_and_nothing_else(bundle: Path, out: Path, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "optimizer.pt", "README.md", ".gitattributes", "NOTICE", "LICENSE.txt",
                 "task0/README.md", "task0/optimizer.pt", "task0/LICENSE", ".git/config", "runs/events"):  # fmt: skip
        (bundle / name).parent.mkdir(exist_ok=True)
        (bundle / name).write_text("x")
    shutil.copytree(bundle / "task0", bundle / "task0" / "checkpoint-5")
    told: list[str] = []
    made = packed(bundle, out / "model.tar.gz", tell=told.append)
    folder = unpacked(out / "model.tar.gz", tmp_path / "unpacked")
    adapters = {f"{name}/{file}" for name in ("task0", "task1", "task2") for file in ADAPTER}
    verbatim = {f"verbatim/{file}" for file in ADAPTER - {"classifier.yaml"}}
    licences = {"NOTICE", "LICENSE.txt", "task0/LICENSE"}
    assert names_in(folder) == BASE | adapters | verbatim | licences | {MANIFEST}
    assert any("checkpoint-5" in line for line in told), told
    code = {one.relative_to(folder).as_posix() for one in (folder / CODE).rglob("*") if one.is_file()}
    assert {"code/inference.py", "code/requirements.txt", "code/loraplex/py.typed", "code/loraplex/LICENSE"} <= code
    assert not [name for name in code if "__pycache__" in name or name.endswith(".pyc")]
    assert len(made.files) == len(names_in(folder)) + len(code)
    assert manifest_in(folder).files.keys() | {MANIFEST} == made.files.keys()


def test_the_code_is_this_package_and_imports_without_the_installed_one(
    tiny_bundle: Path, out: Path, tmp_path: Path
) -> None:
    packed(tiny_bundle, out / "model", uncompressed=True)
    script = (
        "import sys; sys.dont_write_bytecode = True; import loraplex.cli.main, loraplex; print(loraplex.__file__)\n"
        f"import ast; ast.parse(open({str(out / 'model/code/inference.py')!r}).read())"
    )
    environment = {**os.environ, "PYTHONPATH": str(out / "model" / CODE)}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(out / "model/code/loraplex/__init__.py")
    assert verify(str(out / "model")).is_whole
    needed = (out / "model/code/requirements.txt").read_text().split("\n")
    assert "transformers>=5.10" in needed and "uvicorn>=0.35" in needed
    assert not [one for one in needed if one.startswith(("torch", "boto3", "peft", "pytest", "loraplex"))]


def test_the_same_bundle_gives_the_same_bytes(tiny_bundle: Path, out: Path, tmp_path: Path) -> None:
    first = packed(tiny_bundle, out / "a.tar.gz")
    copy = tmp_path / "another name"
    shutil.copytree(tiny_bundle, copy, copy_function=shutil.copyfile)
    for path in copy.rglob("*"):
        os.utime(path, (1, 1))
        path.chmod(0o700)
    second = packed(copy, out / "b.tar.gz")
    assert first.sha256 == second.sha256 and (out / "a.tar.gz").read_bytes() == (out / "b.tar.gz").read_bytes()
    again = packed(unpacked(out / "a.tar.gz", tmp_path / "unpacked"), out / "c.tar.gz")
    assert again.sha256 == first.sha256, "an artifact is a bundle"


def test_a_base_elsewhere_comes_to_the_root_under_its_name(bundle: Path, out: Path, tmp_path: Path) -> None:
    """Here it lies in the hub's cache, where files are links."""
    cache = tmp_path / "models--org--tiny-1b"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "c0ffee").mkdir(parents=True)
    for name in BASE:
        (bundle / name).rename(cache / "blobs" / name)
        (cache / "snapshots" / "c0ffee" / name).symlink_to(f"../../blobs/{name}")
    (bundle / "NOTICE").write_text("the bundle's")
    (cache / "snapshots" / "c0ffee" / "NOTICE").write_text("the base's")
    settings = (
        f"base: {cache}\nengine: {{dtype: float32}}\nroutes: {{main: {{targets: {{task0: 0.5, task1: 1.0e-5}}}}}}\n"
    )
    (bundle / "loraplex.yaml").write_text(settings)
    packed(bundle, out / "model", uncompressed=True)
    made = open_bundle(out / "model")
    assert made.base == out / "model" and made.settings.base is None
    assert made.settings.engine == {"dtype": "float32", "served_model_name": "org/tiny-1b"}
    assert made.settings.routes == open_bundle(bundle).settings.routes
    assert manifest_in(out / "model").base_name == "org/tiny-1b"
    assert not [path for path in (out / "model").rglob("*") if path.is_symlink()]
    assert (out / "model" / "NOTICE").read_text() == "the base's"
    assert (out / "model" / "bundle-NOTICE").read_text() == "the bundle's"
    assert answers(out / "model") == answers(bundle)


def test_paths_of_this_machine_are_left_out_of_the_settings(bundle: Path, out: Path) -> None:
    settings = {"engine": {"state_dir": "/nowhere/state", "adapter_root": ["/nowhere"], "max_queue": 7}}
    settings["server"] = {"api_key_file": "/nowhere/keys", "log_format": "json"}
    (bundle / "loraplex.yaml").write_text(json.dumps(settings))
    told: list[str] = []
    packed(bundle, out / "model", uncompressed=True, tell=told.append)
    made = open_bundle(out / "model").settings
    assert made.engine == {"max_queue": 7} and made.server == {"log_format": "json"}
    for key in ("engine.state_dir", "engine.adapter_root", "server.api_key_file"):
        assert any(key in line for line in told), told


@pytest.mark.parametrize("backend", ["native", "peft", "vllm"])
def test_another_backends_library_need_not_be_here(
    bundle: Path, out: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "is_installed", lambda library: False)
    write("loraplex.yaml", f"engine: {{backend: {backend}}}")(bundle)
    packed(bundle, out / "model", uncompressed=True)
    needed = (out / "model/code/requirements.txt").read_text().split("\n")
    assert ("peft>=0.18" in needed) == (backend == "peft") and not [one for one in needed if one.startswith("vllm")]


def test_what_the_bundles_backend_does_not_serve_is_refused(bundle: Path, out: Path) -> None:
    tiny.save_adapter(bundle, bundle / "isDora", contract=tiny.CONTRACT, use_dora=True)
    packed(bundle, out / "native.tar.gz")
    write("loraplex.yaml", "engine: {backend: vllm}")(bundle)
    with pytest.raises(ConfigurationError, match=r"bundle/isDora: .* is not served by --backend vllm"):
        packed(bundle, out / "vllm.tar.gz")


def test_shards_are_packed_by_their_index(bundle: Path, out: Path) -> None:
    tensors = load_file(bundle / "model.safetensors")
    (bundle / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[:5], "model-2.safetensors": names[5:]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, bundle / shard, metadata={"format": "pt"})
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (bundle / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(tensors, bundle / "consolidated.safetensors")
    packed(bundle, out / "model", uncompressed=True)
    weights = {path.name for path in (out / "model").glob("*.safetensors*")}
    assert weights == {*shards, "model.safetensors.index.json"}


def test_an_adapter_in_anothers_folder_gets_one_of_its_own_with_its_tokenizer(bundle: Path, out: Path) -> None:
    run = bundle / "run"
    shutil.copytree(bundle / "task0", run)
    shutil.copytree(bundle / "task1", run / "isInner")
    shutil.copytree(bundle / "task2", run / "isOwn")
    (run / "chat_template.jinja").write_text("{% for m in messages %}outer {{ m['content'] }}{% endfor %}")
    (run / "isOwn" / "chat_template.jinja").write_text("{% for m in messages %}own {{ m['content'] }}{% endfor %}")
    for name in ("run", "run/isInner", "run/isOwn"):
        (bundle / name / "classifier.yaml").write_text("format: chat\nquestion: Is it done?\nlabels: ['yes', 'no']\n")
    packed(bundle, out / "model", uncompressed=True)
    made = out / "model"
    assert {path.parent.relative_to(made).as_posix() for path in made.rglob("adapter_config.json")} == {
        "run", "isInner", "isOwn", "task0", "task1", "task2", "verbatim",
    }  # fmt: skip
    assert "outer" in (made / "isInner" / "chat_template.jinja").read_text()
    assert "own" in (made / "isOwn" / "chat_template.jinja").read_text()
    found, expected = answers(made), answers(bundle)
    # The versions cover the tokenizer and the chat template. Scores differ in the last bits: the order is another.
    assert {name: (label, version) for name, (label, _, version) in found.items()} == {
        name: (label, version) for name, (label, _, version) in expected.items()
    }
    for name, (_, scores, _) in expected.items():
        assert found[name][1] == (scores and pytest.approx(scores, rel=1e-3)), name
    assert {one.name: one.version for one in manifest_in(made).adapters} == {
        name: version for name, (_, _, version) in expected.items()
    }


def test_named_adapters_are_packed_as_the_bundles_own(bundle: Path, out: Path, tmp_path: Path) -> None:
    (bundle / "task0").rename(tmp_path / "checkpoint-9")
    made = packed(bundle, out / "model", {"isNamed": tmp_path / "checkpoint-9"}, uncompressed=True)
    assert sorted(one.name for one in made.adapters) == ["isNamed", "task1", "task2", "verbatim"]
    assert (out / "model" / "isNamed" / "classifier.yaml").is_file()


def test_the_demo_answers_bit_for_bit_alike(demo_bundle: Path, out: Path, tmp_path: Path) -> None:
    packed(demo_bundle, out / "model.tar.gz", level=1)
    folder = unpacked(out / "model.tar.gz", tmp_path / "unpacked")
    assert verify(str(folder)).is_whole and verify(str(out / "model.tar.gz")).is_whole
    expected, found = answers(demo_bundle), answers(folder)
    assert found == expected and len(found) == 16
    described = {one.name: (one.labels, one.version) for one in manifest_in(folder).adapters}
    assert described == {name: (tuple(scores), version) for name, (_, scores, version) in expected.items()}


# What is refused


def cut_short(bundle: Path) -> None:
    data = (bundle / "model.safetensors").read_bytes()
    (bundle / "model.safetensors").write_bytes(data[:-100])


def lose_a_tensor(bundle: Path) -> None:
    tensors = load_file(bundle / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, bundle / "model.safetensors", metadata={"format": "pt"})


def misshape_a_tensor(bundle: Path) -> None:
    tensors = load_file(bundle / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(7)
    save_file(tensors, bundle / "model.safetensors", metadata={"format": "pt"})


def poison_an_adapter(bundle: Path) -> None:
    path = bundle / "task1" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[min(tensors)][0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


def for_another_base(bundle: Path) -> None:
    config = json.loads((bundle / "config.json").read_text())
    (bundle / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))


def write(name: str, text: str) -> Callable[[Path], None]:
    def change(bundle: Path) -> None:
        (bundle / name).write_text(text)

    return change


def rename(name: str, file: str | None = None) -> Callable[[Path], None]:
    """file: is made beside the folders."""

    def change(bundle: Path) -> None:
        (bundle / name).parent.mkdir(exist_ok=True)
        (bundle / "task1").rename(bundle / name)
        if file is not None:
            (bundle / file).write_text("x")

    return change


def void(_: object) -> None:
    pass


CONTRACT = "question: Done?\ntemplate: '{conversation}{question}'\nlabels: "
BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "a shard that was cut short": (cut_short, r"bundle/model.safetensors: .*cut short"),
    "a tensor that is missing": (lose_a_tensor, r"bundle: the weights lack 'model.layers.1.mlp.up_proj.weight'"),
    "a tensor in another shape": (misshape_a_tensor, r"bundle: .*'model.norm.weight' has shape \[7\]"),
    "an index that leads away": (
        lambda bundle: void(
            (bundle / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')
        ),
        r"index.json: names the shard .* which is not beside it",
    ),
    "an adapter that holds NaN": (poison_an_adapter, r"bundle/task1/adapter_model.safetensors: .*NaN"),
    "an adapter that lacks its weights": (
        lambda bundle: (bundle / "task1" / "adapter_model.safetensors").unlink(),
        r"bundle/task1: no adapter_model.safetensors",
    ),
    "an adapter of another base": (for_another_base, r"bundle/task0.*adapter_model.safetensors"),
    "a config that says what is not served": (
        lambda bundle: void(
            (bundle / "task1" / "adapter_config.json").write_text('{"peft_type": "LORA", "use_bdlora": true}')
        ),
        r"bundle/task1/adapter_config.json, key 'use_bdlora'",
    ),
    "labels that begin alike": (write("task1/classifier.yaml", f"{CONTRACT}['yes', 'yes']"), r"task1/classifier.yaml"),
    "a contract for no head": (write("task1/classifier.yaml", "labels: [a]"), r"bundle/task1/classifier.yaml"),
    "a tokenizer that does not load": (write("tokenizer.json", "{}"), r"bundle: the tokenizer does not load"),
    "a route to nowhere": (write("loraplex.yaml", "routes: {main: nope}"), r"there is no classifier 'nope'"),
    "a setting that is wrong": (write("loraplex.yaml", "engine: {dtype: float7}"), r"loraplex.yaml.*float7"),
    "an adapter called code": (rename("code"), r"bundle/code: a classifier named 'code' cannot be packed"),
    "an adapter called like a file": (rename("run/LICENSE", "LICENSE"), r"'LICENSE' cannot be packed: LICENSE is a"),
    "an adapter called as the folder there": (rename("model"), r"'model' names the base and a classifier"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_what_would_not_load_is_refused_and_nothing_is_written(bundle: Path, out: Path, what: str) -> None:
    change, message = BROKEN[what]
    change(bundle)
    with pytest.raises(ConfigurationError, match=message) as caught:
        packed(bundle, out / "model.tar.gz")
    assert caught.value.remedy and "loraplex-pack-" not in str(caught.value), "it names the user's files"
    assert list(out.iterdir()) == []


def test_a_checkpoint_needs_another_name(bundle: Path, out: Path) -> None:
    with pytest.raises(ConfigurationError, match="'checkpoint-5' cannot be packed: a folder of that name") as caught:
        packed(bundle, out / "model.tar.gz", {"checkpoint-5": bundle / "task0"})
    assert "--adapter NAME=SOURCE" in caught.value.remedy


def test_prove_asks_the_golden_examples(bundle: Path, out: Path) -> None:
    label, _, _ = answers(bundle)["task1"]
    wrong = {"yes": "no", "no": "yes"}[label]
    contract = {**tiny.CONTRACT, "golden": [{"text": TEXT, "label": wrong}]}
    (bundle / "task1" / "classifier.yaml").write_text(json.dumps(contract))
    write("loraplex.yaml", "engine: {preload: none}")(bundle)
    packed(bundle, out / "unproven.tar.gz")
    with pytest.raises(ConfigurationError, match=rf"bundle/task1/classifier.yaml, key 'golden'.*not '{wrong}'"):
        packed(bundle, out / "model.tar.gz", proves=True)
    assert {path.name for path in out.iterdir()} == {"unproven.tar.gz"}


def test_a_file_that_changes_meanwhile_spoils_the_artifact(bundle: Path, out: Path) -> None:
    def change(done: int, total: int | None) -> None:
        (bundle / "task0" / "classifier.yaml").write_text("labels: ['yes', 'no']")

    with pytest.raises(ConfigurationError, match="changed while it was read"):
        packed(bundle, out / "model.tar.gz", progress=change)
    assert list(out.iterdir()) == []


def test_nothing_is_written_over(bundle: Path, out: Path) -> None:
    (out / "model.tar.gz").write_text("mine")
    (out / "folder").mkdir()
    (out / "folder.tar.gz").mkdir()
    for name in ("model.tar.gz", "folder", "folder.tar.gz"):
        with pytest.raises(ConfigurationError, match=f"{name}: exists already"):
            packed(bundle, out / name, uncompressed=name == "folder")
    with pytest.raises(ConfigurationError, match="exists already"):
        packed(bundle, out / "folder.tar.gz", replaces=True)
    assert (out / "model.tar.gz").read_text() == "mine"
    packed(bundle, out / "model.tar.gz", replaces=True)
    assert verify(str(out / "model.tar.gz")).is_whole


def test_the_name_and_the_kind_of_output_agree(bundle: Path, out: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"is no name of a \.tar\.gz") as caught:
        packed(bundle, out / "model.zip")
    assert "--uncompressed" in caught.value.remedy
    with pytest.raises(ConfigurationError, match=r"names an archive, and --uncompressed writes a folder"):
        packed(bundle, out / "model.tar.gz", uncompressed=True)
    with pytest.raises(ConfigurationError, match="lies in the bundle"):
        packed(bundle, bundle / "packed", uncompressed=True)


def test_a_dry_run_checks_and_writes_nothing(bundle: Path, out: Path) -> None:
    made = packed(bundle, out / "model.tar.gz", is_dry=True)
    assert made.sha256 is None and "task0/classifier.yaml" in made.files and list(out.iterdir()) == []
    lose_a_tensor(bundle)
    with pytest.raises(ConfigurationError, match="the weights lack"):
        packed(bundle, out / "model.tar.gz", is_dry=True)


# The commands


def test_the_commands_say_what_was_made(tiny_bundle: Path, out: Path) -> None:
    archive = str(out / "model.tar.gz")
    run = CliRunner().invoke(app, ["sagemaker", "pack", str(tiny_bundle), "--out", archive])
    assert run.exit_code == 0, run.output
    digest = subprocess.run(["sha256sum", archive], capture_output=True, text=True, check=True).stdout.split()[0]
    assert f"SHA-256: {digest}" in run.output and "4 adapters" in run.output
    assert f"next: loraplex sagemaker verify {archive}" in run.output
    assert "MiB" not in run.output, "it took no time that a progress could tell of"
    run = CliRunner().invoke(app, ["sagemaker", "verify", archive])
    assert run.exit_code == 0 and "is whole: 4 adapters" in run.output
    run = CliRunner().invoke(app, ["sagemaker", "pack", str(tiny_bundle), "--out", archive])
    assert run.exit_code == 1 and "--force" in run.output
    folder = unpacked(Path(archive), out / "folder")
    (folder / "config.json").write_text("{}")
    (folder / "more").write_text("x")
    run = CliRunner().invoke(app, ["sagemaker", "verify", str(folder)])
    assert run.exit_code == 1 and "changed: config.json\nextra: more\n" in run.output
    spaced = str(out / "my model.tar.gz")
    run = CliRunner().invoke(app, ["sagemaker", "pack", str(tiny_bundle), "--out", spaced])
    assert f"next: loraplex sagemaker verify '{spaced}'\n" in run.output
    run = CliRunner().invoke(
        app, ["sagemaker", "pack", str(tiny_bundle), "--out", str(out / "new"), "--uncompressed", "--dry-run"]
    )
    assert run.exit_code == 0 and "  task0/adapter_config.json\n" in run.output and not (out / "new").exists()


@pytest.mark.parametrize(
    ("sent", "kind"), [(signal.SIGINT, "model.tar.gz"), (signal.SIGTERM, "folder"), (signal.SIGHUP, "model.tar.gz")]
)
def test_an_interrupted_pack_leaves_nothing(bundle: Path, out: Path, sent: signal.Signals, kind: str) -> None:
    with (bundle / "LICENSE").open("wb") as file:
        file.truncate(3 * 2**30)  # has no blocks on this disk, and takes a while to pack
    more = ["--uncompressed"] if kind == "folder" else ["--compression", "9"]
    command = [
        sys.executable,
        "-m",
        "loraplex.cli.main",
        "sagemaker",
        "pack",
        str(bundle),
        "--out",
        str(out / kind),
        *more,
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 60
        while not list(out.iterdir()):
            assert time.monotonic() < end and process.poll() is None, process.stderr
            time.sleep(0.01)
        process.send_signal(sent)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 128 + sent and "Traceback" not in said, said
    assert list(out.iterdir()) == []
