"""Builds docker/Dockerfile without Docker, and runs what it made: `python tests/rehearsal.py`, as root on Debian.

Each instruction runs in an empty root that debootstrap made, with a layer of overlayfs for each RUN and COPY. The
container is a process in a root, a mount and a PID namespace of its own, and its port is this machine's."""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import boto3
import httpx

ROOT = Path(__file__).parent.parent
INSTRUCTIONS = "ARG FROM RUN COPY ENV USER LABEL EXPOSE STOPSIGNAL HEALTHCHECK ENTRYPOINT CMD".split()
PATH = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND": "noninteractive"}
DEBIAN = "http://deb.debian.org/debian"
# Images of Debian and Ubuntu keep no packages that were installed, and no caches of apt's.
CLEAN = """Dir::Cache::pkgcache ""; Dir::Cache::srcpkgcache "";
DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb"; };
"""


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """Yield (instruction, its arguments), each as one line."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    for one in re.sub(r"\s*\\\n\s*", " ", "\n".join(lines)).splitlines():
        word, _, rest = one.partition(" ")
        yield word.upper(), rest.strip()


def expanded(text: str, values: Mapping[str, str]) -> str:
    return re.sub(r"\$\{?(\w+)\}?", lambda found: values.get(found[1], ""), text)


@dataclass(frozen=True)
class Image:
    """A stage that is built. layers: from the lowest up."""

    layers: tuple[Path, ...] = ()
    environment: Mapping[str, str] = field(default_factory=lambda: PATH)
    user: str = "0"
    healthcheck: str = ""
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()


@contextmanager
def mounted(layers: Sequence[Path], upper: Path, binds: Mapping[Path, str]) -> Iterator[Path]:
    """The layers as one folder. What is written into it goes to `upper`. binds: path here -> path there, read-only."""
    merged, work = upper.with_suffix(".root"), upper.with_suffix(".work")
    for folder in (upper, merged, work):
        folder.mkdir(exist_ok=True)
    upper.chmod(0o755)  # of the root itself, which others than root must enter
    below = ":".join(map(str, reversed(layers)))
    with ExitStack() as mounts:

        def mount(target: Path, *arguments: str) -> None:
            subprocess.run(["mount", *arguments, target], check=True)
            mounts.callback(subprocess.check_call, ["umount", "--recursive", "--lazy", target])

        mount(merged, "-t", "overlay", "overlay", "-o", f"lowerdir={below},upperdir={upper},workdir={work}")
        mount(merged / "proc", "-t", "proc", "proc")
        mount(merged / "dev", "--rbind", "/dev")
        for here, there in binds.items():
            target = merged / there.lstrip("/")
            (target if here.is_dir() else target.parent).mkdir(parents=True, exist_ok=True)
            if here.is_file():
                target.touch()
            mount(target, "--bind", "-o", "ro", str(here))
        yield merged


class Build:
    """Builds the stages of a Dockerfile into a folder."""

    def __init__(self, folder: Path, base: Path, arguments: Mapping[str, str]) -> None:
        self.folder, self.base, self.arguments = folder, base, dict(arguments)
        self.stages: dict[str, Image] = {}
        self.pip, self.binds = pip_settings()
        self._context = folder / "context"
        copy_context(self._context)

    def run(self, dockerfile: Path) -> Image:
        image, name, declared = Image(), "", dict[str, str]()
        for number, (word, rest) in enumerate(instructions(dockerfile.read_text())):
            started = time.monotonic()
            values = {**declared, **image.environment}
            layer = self.folder / f"layer-{number}"
            match word:
                case "ARG":
                    key, _, default = rest.partition("=")
                    declared[key] = self.arguments.get(key, declared.get(key, default))
                case "FROM":
                    parent, _, name = expanded(rest, declared).partition(" AS ")
                    image = self.stages.get(parent, Image((self.base,)))
                case "RUN":
                    with mounted(image.layers, layer, self.binds) as root:
                        environment = {**values, **self.pip}
                        in_root(root, environment, image.user, ["/bin/sh", "-c", rest])
                    image = replace(image, layers=(*image.layers, layer))
                case "COPY":
                    with mounted(image.layers, layer, {}) as root:
                        self._copy(root, shlex.split(expanded(rest, values)))
                    image = replace(image, layers=(*image.layers, layer))
                case "ENV":
                    pairs = dict(one.partition("=")[::2] for one in shlex.split(expanded(rest, values)))
                    image = replace(image, environment={**image.environment, **pairs})
                case "USER":
                    image = replace(image, user=rest)
                case "HEALTHCHECK":
                    image = replace(image, healthcheck=rest.partition(" CMD ")[2])
                case "ENTRYPOINT":
                    image = replace(image, entrypoint=tuple(json.loads(rest)))
                case "CMD":
                    image = replace(image, command=tuple(json.loads(rest)))
                case "LABEL" | "EXPOSE" | "STOPSIGNAL":
                    pass
                case _:
                    raise SystemExit(f"{word} is not rehearsed")
            self.stages[name] = image
            size = f"{size_of(layer) / 1e6:8.1f} MB" if layer.exists() else " " * 11
            print(f"{name or 'default':12} {size} {time.monotonic() - started:6.1f} s  {word} {rest[:70]}", flush=True)
        return image

    def _copy(self, root: Path, words: list[str]) -> None:
        source, paths, target = self._context, words[:-1], root / words[-1].lstrip("/")
        with ExitStack() as stack:
            if paths[0].startswith("--from="):
                stage = self.stages[paths.pop(0).removeprefix("--from=")]
                source = stack.enter_context(mounted(stage.layers, self.folder / "unused", {}))
            for path in paths:
                found = source / path.lstrip("/")
                to = target / found.name if words[-1].endswith("/") and found.is_file() else target
                to.parent.mkdir(parents=True, exist_ok=True)
                subprocess.run(["cp", "-a", f"{found}/." if found.is_dir() else found, to], check=True)


def in_root(root: Path, environment: Mapping[str, str], user: str, command: Sequence[str]) -> None:
    run = subprocess.run(["chroot", f"--userspec={user}:{user}", root, *command], env=dict(environment), text=True)
    if run.returncode != 0:
        raise SystemExit(f"exit code {run.returncode}: {shlex.join(command)}")


def size_of(folder: Path) -> int:
    return int(subprocess.run(["du", "-sb", folder], capture_output=True, text=True, check=True).stdout.split()[0])


def copy_context(folder: Path) -> None:
    """Copy what .dockerignore lets through. It has `*`, then `!path` for each, then patterns to leave out."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().split("\n") if line and line[0] != "#"]
    assert lines[0] == "*"
    left_out = [one.removeprefix("**/") for one in lines if one.startswith("**/")]
    folder.mkdir()
    for one in lines:
        path = ROOT / one[1:]
        if one[0] == "!" and path.is_dir():
            shutil.copytree(path, folder / one[1:], ignore=shutil.ignore_patterns(*left_out))
        elif one[0] == "!":
            shutil.copy(path, folder / one[1:])


def pip_settings() -> tuple[dict[str, str], dict[Path, str]]:
    """Return this machine's settings of pip as variables, and the binds for the files that they name."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    variables = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    binds = {Path("/etc/resolv.conf"): "/etc/resolv.conf"}
    for line in listed.stdout.splitlines():
        key, _, value = line.partition("=")
        words = value.strip("'").replace("\\n", " ").split()
        for index, word in enumerate(words):
            path = Path(word.removeprefix("file://"))
            path = path.parent if word.startswith("file://") else path  # an index links to its neighbours
            if path.is_absolute() and path.exists():
                binds[path] = f"/here{path}"
                words[index] = word.replace(str(path), binds[path])
        variables[f"PIP_{key.rpartition('.')[2].upper().replace('-', '_')}"] = " ".join(words)
    return variables, binds


def debian(folder: Path, suite: str) -> Path:
    """Make an empty root with debootstrap, which is fetched where it is not installed."""
    made, tools = folder / "base", folder / "tools"
    program, environment = shutil.which("debootstrap"), dict(os.environ)
    if program is None:
        tools.mkdir()
        subprocess.run(
            "apt-get download debootstrap && dpkg-deb -x debootstrap_*.deb .", shell=True, cwd=tools, check=True
        )
        program = str(tools / "usr/sbin/debootstrap")
        environment["DEBOOTSTRAP_DIR"] = str(tools / "usr/share/debootstrap")
    subprocess.run(
        [program, "--variant=minbase", suite, made, DEBIAN], env=environment, check=True, stdout=subprocess.DEVNULL
    )
    (made / "etc/apt/apt.conf.d/docker-clean").write_text(CLEAN)
    return made


@dataclass
class Container:
    process: subprocess.Popen[str]
    root: Path
    image: Image
    environment: Mapping[str, str]

    def signal(self, number: int) -> None:
        """Send a signal to the container's PID 1, the only child of `unshare`."""
        pid = self.process.pid
        [child] = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        os.kill(int(child), number)

    def check_health(self) -> None:
        in_root(self.root, self.environment, self.image.user, ["/bin/sh", "-c", self.image.healthcheck])


@contextmanager
def container(
    image: Image, folder: Path, *command: str, binds: Mapping[Path, str] | None = None, **environment: str
) -> Iterator[Container]:
    """Start a container of the image, as `docker run IMAGE command` does. binds: path here -> path there, read-only."""
    variables = {**image.environment, **environment}
    upper = Path(tempfile.mkdtemp(dir=folder, suffix=".upper"))
    with mounted(image.layers, upper, binds or {}) as root:
        process = subprocess.Popen(
            [
                *("unshare", "--pid", "--fork", "--kill-child", f"--mount-proc={root}/proc"),
                *("chroot", f"--userspec={image.user}:{image.user}", root),
                *(*image.entrypoint, *(command or image.command)),
            ],
            env=variables,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            yield Container(process, root, image, variables)
        finally:
            process.kill()
            process.wait()


def ended(image: Image, folder: Path, *command: str) -> tuple[int, str]:
    """Return the exit code and the output of a container that ends by itself."""
    with container(image, folder, *command) as one:
        output, _ = one.process.communicate(timeout=60)
        return one.process.returncode, output


def check_server(image: Image, folder: Path, bundle: Path) -> None:
    """Serve the bundle as SageMaker does, ask by boto3, and stop."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = time.monotonic()
    url = f"http://127.0.0.1:{port}"
    binds = {bundle: "/opt/ml/model"}
    with container(image, folder, "serve", binds=binds, SAGEMAKER_BIND_TO_PORT=port) as one:
        while not is_ready(url):
            assert one.process.poll() is None and time.monotonic() - started < 120, one.process.communicate()
            time.sleep(0.1)
        print(f"  /ping answers 200 after {time.monotonic() - started:.1f} s")
        runtime: Any = boto3.client(
            "sagemaker-runtime",
            endpoint_url=url,
            region_name="us-east-1",
            aws_access_key_id="any",
            aws_secret_access_key="any",
        )
        body = {"input_text": "Customer: Great, thank you, bye!", "adapter_name": "issueResolved"}
        answer = runtime.invoke_endpoint(
            EndpointName="any", ContentType="application/json", Body=json.dumps(body).encode()
        )
        print(f"  boto3's invoke_endpoint: {answer['Body'].read().decode()}")
        one.check_health()
        upload = socket.create_connection(("127.0.0.1", int(port)))
        upload.sendall(b"POST /invocations HTTP/1.1\r\nHost: any\r\nContent-Length: 9\r\n\r\n{")  # and never more
        assert is_ready(url)
        started = time.monotonic()
        one.signal(signal.SIGTERM)
        output, _ = one.process.communicate(timeout=30)
        upload.close()
        took = time.monotonic() - started
        print(f"  SIGTERM to PID 1 during a request: exit code {one.process.returncode} after {took:.1f} s")
        assert one.process.returncode == 0, output
    for line in output.splitlines()[:3]:
        print(f"  log: {line[:160]}")


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ping", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, help="An empty root that debootstrap made before.")
    parser.add_argument("--dockerfile", type=Path, default=ROOT / "docker/Dockerfile")
    parser.add_argument("--suite", default="bookworm", help="The release of Debian that debootstrap makes.")
    parser.add_argument("--bundle", type=Path, default=ROOT / "examples/support_desk/bundle")
    given = parser.parse_args()
    if "REHEARSAL" not in os.environ:  # in a mount namespace of its own, nothing stays mounted
        os.environ["REHEARSAL"] = "1"
        os.execvp("unshare", ["unshare", "--mount", sys.executable, *sys.argv])
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as name:
        folder = Path(name)
        started = time.monotonic()
        base = (given.base or debian(folder, given.suite)).resolve()
        print(f"{'':12} {size_of(base) / 1e6:8.1f} MB {time.monotonic() - started:6.1f} s  an empty Debian", flush=True)
        # pip here may know PyTorch's CPU build from its own settings; elsewhere PyPI's build is installed.
        build = Build(folder, base, {"TORCH_INDEX": ""})
        image = build.run(given.dockerfile)
        for title, one in (("default", image), ("sagemaker", build.stages["sagemaker"])):
            print(f"{title}: user {one.user}")
            check_server(one, folder, given.bundle)
        code, output = ended(image, folder, "keys", "new", "--name", "ci")
        assert code == 0 and "ci infer" in output, output
        code, output = ended(image, folder, "serve")
        assert code == 1 and json.loads(output)["error"] == "bundle_error", output
        print(f"without a bundle: exit code {code}: {output.strip()[:200]}")


if __name__ == "__main__":
    main()
