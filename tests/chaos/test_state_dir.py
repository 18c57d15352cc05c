"""Accidents to `--state-dir` under a real server: answers go on, and nothing that was acknowledged is lost."""

import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

import serving

pytestmark = pytest.mark.chaos

TEXT = "Customer: hello there"


def options(bundle: Path, state: Path) -> list[object]:
    return [bundle, "--dtype", "float32", "--preload", "none", "--state-dir", state]


def classify(http: httpx.Client, name: str = "task0") -> str:
    """Return the id of a verdict."""
    answer = http.post("/v1/classify", json={"input": TEXT, "classifiers": [name]})
    assert answer.status_code == 200, answer.text
    id = answer.json()["verdicts"][0]["id"]
    assert isinstance(id, str)
    return id


def set_route(http: httpx.Client, name: str, target: str = "task0") -> httpx.Response:
    return http.put(f"/v1/routes/{name}", json={"targets": {target: 1}})


def pin(http: httpx.Client, bundle: Path, name: str) -> httpx.Response:
    return http.put(f"/v1/adapters/{name}", json={"source": str(bundle / name), "pinned": True})


def num_verdicts(http: httpx.Client, name: str) -> int:
    answer = http.get(f"/v1/routes/{name}/stats")
    assert answer.status_code == 200, answer.text
    return sum(target["num_verdicts"] for target in answer.json()["targets"])


def check_refused(answer: httpx.Response, *mentions: str) -> None:
    assert answer.status_code == 500, answer.text
    error = answer.json()["error"]
    assert error["code"] == "state_error" and error["remedy"], error
    for mention in mentions:
        assert mention in error["message"] + error["remedy"], error


def routes(http: httpx.Client) -> set[str]:
    return {route["name"] for route in http.get("/v1/routes").json()["routes"]}


def pinned(http: httpx.Client) -> set[str]:
    return {adapter["name"] for adapter in http.get("/v1/adapters").json()["adapters"] if adapter["pinned"]}


def refused(bundle: Path, state: Path) -> str:
    """Start a server that must not start, and return what it says."""
    run = serving.loraplex("serve", *options(bundle, state), "--port", 0)
    assert run.returncode == 1 and "Traceback" not in run.stderr, run.stderr
    assert "remedy" in run.stderr and "curl" not in run.stdout, run.stderr
    return " ".join(run.stderr.split())


def test_a_folder_deleted_under_a_server_costs_no_answer_and_the_next_server_nothing(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    with serving.serve(*options(tiny_bundle, state)) as first, serving.client(first) as http:
        assert set_route(http, "old").status_code == 200
        verdict = classify(http, "old")
        shutil.rmtree(state)
        for _ in range(2):
            check_refused(set_route(http, "lost"), "lost", "not changed", "removed or replaced", "restart")
            check_refused(http.delete("/v1/routes/old"), "removed or replaced")
            check_refused(pin(http, tiny_bundle, "task1"), "'task1' took effect", "removed or replaced")
            check_refused(http.post("/v1/feedback", json={"verdict_id": verdict, "label": "yes"}), "not recorded")
            check_refused(http.get("/v1/routes/old/stats"), "cannot be read")
            assert classify(http, "old") and routes(http) == {"old"} and pinned(http) == {"task1"}
        assert not state.exists()
        assert http.get("/ready").status_code == 200

        with serving.serve(*options(tiny_bundle, state)) as second, serving.client(second) as other:
            assert routes(other) == pinned(other) == set()
            assert set_route(other, "new").status_code == pin(other, tiny_bundle, "task2").status_code == 200
            classify(other, "new")
            check_refused(set_route(http, "lost"), "removed or replaced")
            check_refused(pin(http, tiny_bundle, "task0"), "removed or replaced")
            assert classify(http, "old")
            assert first.stop() == 0  # leaves the folder and its lock to the second
            assert "another server uses it" in refused(tiny_bundle, state)
            assert num_verdicts(other, "new") == 1
        with serving.serve(*options(tiny_bundle, state)) as third, serving.client(third) as http:
            assert routes(http) == {"new"} and pinned(http) == {"task2"}
            assert num_verdicts(http, "new") == 1


def test_a_folder_that_comes_back_takes_changes_again(tiny_bundle: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with serving.serve(*options(tiny_bundle, state)) as server, serving.client(server) as http:
        assert set_route(http, "before").status_code == 200
        state.rename(tmp_path / "aside")
        check_refused(set_route(http, "lost"), "removed or replaced")
        check_refused(pin(http, tiny_bundle, "task1"), "took effect")
        classify(http, "before")
        (tmp_path / "aside").rename(state)
        assert set_route(http, "after").status_code == 200
        assert pin(http, tiny_bundle, "task2").status_code == 200  # saves task1's pin, too
        assert num_verdicts(http, "before") == 1
        server.stop(signal.SIGKILL)
    with serving.serve(*options(tiny_bundle, state)) as server, serving.client(server) as http:
        assert routes(http) == {"before", "after"} and pinned(http) == {"task1", "task2"}


def test_a_deleted_lock_file_lets_no_second_server_in(tiny_bundle: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with serving.serve(*options(tiny_bundle, state)) as server, serving.client(server) as http:
        (state / "loraplex.lock").unlink()
        assert "another server uses it" in refused(tiny_bundle, state)
        assert set_route(http, "kept").status_code == 200
    with serving.serve(*options(tiny_bundle, state)) as server, serving.client(server) as http:
        assert routes(http) == {"kept"}


@pytest.fixture(scope="module")
def used(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state of a server that stopped, with routes, pins and verdicts in many pages."""
    state = tmp_path_factory.mktemp("used") / "state"
    with serving.serve(*options(tiny_bundle, state)) as server, serving.client(server) as http:
        for i in range(40):
            assert set_route(http, f"{i:02}-{'x' * 100}").status_code == 200
        assert set_route(http, "kept").status_code == pin(http, tiny_bundle, "task1").status_code == 200
        body = {"inputs": [TEXT] * 256, "classifiers": ["kept"]}
        assert http.post("/v1/classify", json=body).status_code == 200
        assert num_verdicts(http, "kept") == 256
    return state


@pytest.mark.parametrize(
    ("name", "accident"),
    [("loraplex.sqlite", "empty"), ("routes.sqlite", "another database"), ("verdicts.sqlite", "damaged")],
)
def test_a_file_after_an_accident_is_refused_before_the_base_is_loaded(
    tiny_bundle: Path, used: Path, tmp_path: Path, name: str, accident: str
) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    for weights in bundle.glob("*.safetensors"):
        weights.write_bytes(b"")  # whoever loads the base fails with another error
    state = Path(shutil.copytree(used, tmp_path / "state"))
    content = {
        "empty": b"",
        "another database": (used / "loraplex.sqlite").read_bytes(),
        "damaged": (used / name).read_bytes()[:-4096] + b"\xff" * 4096,
    }[accident]
    (state / name).write_bytes(content)
    said = refused(bundle, state)
    assert name in said and accident in said and "restore the file" in said, said
    assert (state / name).read_bytes() == content, "it is left as it was"


def test_a_server_begins_without_a_file_that_was_moved_away(tiny_bundle: Path, used: Path, tmp_path: Path) -> None:
    state = Path(shutil.copytree(used, tmp_path / "state"))
    (state / "routes.sqlite").unlink()
    with serving.serve(*options(tiny_bundle, state)) as server, serving.client(server) as http:
        assert routes(http) == set() and pinned(http) == {"task1"} and num_verdicts(http, "task1") == 0
        assert set_route(http, "kept").status_code == 200 and num_verdicts(http, "kept") == 256


@contextmanager
def no_file_grows(process: int = 0) -> Iterator[None]:
    """Keep the process, or else this one and those that it starts, from writing pages of databases."""
    before = resource.prlimit(process, resource.RLIMIT_FSIZE)
    resource.prlimit(process, resource.RLIMIT_FSIZE, (1, before[1]))
    try:
        yield
    finally:
        resource.prlimit(process, resource.RLIMIT_FSIZE, before)


@contextmanager
def no_space(folder: Path) -> Iterator[None]:
    """Fill the file system that holds the folder."""
    filler = folder.parent / "filler"
    with open(filler, "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass
    try:
        yield
    finally:
        filler.unlink()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("nothing may be mounted here")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def check_full_disk(http: httpx.Client, bundle: Path, num_before: int) -> object:
    """Check what a server does that cannot write, and return the statistics that it gives."""
    verdicts = [classify(http, "kept") for _ in range(3)]
    time.sleep(1.5)  # the log is written each second
    for _ in range(2):
        check_refused(set_route(http, "lost"), "not changed", "free space")
        check_refused(pin(http, bundle, "task2"), "took effect", "free space")
        check_refused(http.post("/v1/feedback", json={"verdict_id": verdicts[0], "label": "yes"}), "free space")
        assert num_verdicts(http, "kept") == num_before + 3
    assert "lost" not in routes(http) and "task1" in pinned(http)
    return http.get("/v1/routes/kept/stats").json()


def test_a_disk_that_fills_up_and_gets_room_again(tiny_bundle: Path, used: Path, small_disk: Path) -> None:
    state = Path(shutil.copytree(used, small_disk / "state"))
    with serving.serve(*options(tiny_bundle, state)) as server, serving.client(server) as http:
        with no_space(state):
            stats = check_full_disk(http, tiny_bundle, 256)
        assert http.get("/v1/routes/kept/stats").json() == stats
        assert set_route(http, "after").status_code == 200
        server.stop(signal.SIGKILL)
    with serving.serve(*options(tiny_bundle, state)) as server, serving.client(server) as http:
        assert {"kept", "after"} <= routes(http) and num_verdicts(http, "kept") == 259


def test_a_server_starts_on_a_full_disk(tiny_bundle: Path, used: Path, small_disk: Path, tmp_path: Path) -> None:
    state = Path(shutil.copytree(used, small_disk / "state"))
    log = tmp_path / "log"
    with no_space(state):
        with serving.serve(*options(tiny_bundle, state), log=str(log)) as server, serving.client(server) as http:
            check_full_disk(http, tiny_bundle, 256)
        said = log.read_text()
        for name in ("loraplex", "routes", "verdicts"):
            assert f"{name}.sqlite" in said
        assert "changes are not saved" in said and "3 verdicts could not be written, and are lost" in said


def test_files_that_cannot_grow_and_the_log_is_one_of_them(tiny_bundle: Path, used: Path, tmp_path: Path) -> None:
    state = Path(shutil.copytree(used, tmp_path / "state"))
    with ExitStack() as stack:
        with no_file_grows():
            server = stack.enter_context(serving.serve(*options(tiny_bundle, state), log=str(tmp_path / "log")))
        http = stack.enter_context(serving.client(server))
        stats = check_full_disk(http, tiny_bundle, 256)
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE))
        assert http.get("/v1/routes/kept/stats").json() == stats
        assert set_route(http, "after").status_code == 200
        with no_file_grows(server.process.pid):
            check_full_disk(http, tiny_bundle, 259)
        assert server.stop() == 0
    with serving.serve(*options(tiny_bundle, state)) as server, serving.client(server) as http:
        assert {"kept", "after"} <= routes(http) and num_verdicts(http, "kept") == 262


def test_a_disk_that_is_mounted_read_only(tiny_bundle: Path, used: Path, small_disk: Path) -> None:
    state = Path(shutil.copytree(used, small_disk / "state"))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with serving.serve(*options(tiny_bundle, state)) as server, serving.client(server) as http:
        classify(http, "kept")
        check_refused(set_route(http, "lost"), "not changed", "can be written")
        assert num_verdicts(http, "kept") == 257
        assert "another server uses it" in refused(tiny_bundle, state)
        subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
        assert set_route(http, "after").status_code == 200
