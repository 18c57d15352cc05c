"""`loraplex train --load URL`: puts trained adapters into a running server, as shadows of what answers there now."""

from collections.abc import Callable, Collection, Iterator
from collections.abc import Sequence as Seq
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from loraplex.client import Client
from loraplex.errors import ConfigurationError, LoraplexError, UnknownClassifierError, UnknownRouteError, listed
from loraplex.types import Route

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """name: the classifier's. adapter: the name of its new version. route: the one in which it is a shadow now."""

    name: str
    adapter: str
    route: Route


def check_server(url: str, out: Path, names: Seq[str]) -> None:
    """Find before the training what would keep its adapters from being loaded behind it: no server, a key that is not
    an admin's, a name that nothing answers for, or an --out that the server reads. Raises a LoraplexError."""
    with Client(url, max_retries=0) as client:
        adapters = client.adapters()
        known = {one.name for one in client.routes()} | {one.name for one in adapters}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigurationError(
            f"--load {url}",
            f"the server has no route and no adapter {listed(unknown)} whose shadow a new version could be",
            remedy=f"train without --load, then: loraplex adapters load {unknown[0]} {(out / unknown[0]).resolve()}",
        )
    ours = {(out / name).resolve() for name in names}
    for one in adapters:
        if Path(one.path).resolve() in ours:
            raise ConfigurationError(
                f"--out {out}", f"the server reads its adapter {one.name!r} from there", remedy="give a new folder"
            )


def load_shadows(url: str, out: Path, names: Seq[str], tell: Tell) -> list[Loaded]:
    """Load each adapter below `out` under a new name, NAME-v2 or the next that is free, and make it a shadow in the
    route NAME. A name without a route gets one that leads to the adapter of this name.

    Raises a LoraplexError if one of them cannot be loaded; the server is then as it was before."""
    loaded = []
    with Client(url, max_retries=0) as client, _undone(url, tell) as undo:
        for name in names:
            routes = {one.name: one for one in client.routes()}
            labels = {one.name: one.labels for one in client.adapters()}
            adapter = _next_version(name, {*labels, *routes})
            # First, because a change whose answer is lost may have taken effect.
            undo(f"unload {adapter}", client.unload_adapter, adapter)
            info = client.load_adapter(adapter, (out / name).resolve())
            before = routes.get(name)
            if before is None:
                undo(f"delete the route {name}", client.delete_route, name)
                route = client.set_route(name, {name: 1}, (adapter,))
            else:
                undo(f"set the route {name} back", client.set_route, name, before.targets, before.shadows)
                route = client.set_route(name, before.targets, (*before.shadows, adapter))
            loaded.append(Loaded(name=name, adapter=adapter, route=route))
            for target in route.targets:
                if (known := labels.get(target)) and _plain(known) != _plain(info.labels or ()):
                    tell(
                        f"warning: the labels of {adapter} are {listed(info.labels or ())}, and those of {target} are "
                        f"{listed(known)}: their agreement says little"
                    )
    return loaded


def told(url: str, loaded: Seq[Loaded]) -> Iterator[str]:
    """Yield lines that say what was loaded, and what comes next."""
    for one in loaded:
        targets = ", ".join(one.route.targets)
        yield f"{one.adapter} is a shadow of {targets} in the route {one.name} at {url}"
    for one in loaded[:1]:
        yield f"compare: loraplex routes stats {one.name} --url {url}"
        yield f"promote: loraplex routes set {one.name} {one.adapter} --url {url}"


def _next_version(name: str, taken: Collection[str]) -> str:
    """Return NAME-v2, or the next one that is free. A name may be one of them itself."""
    return next(version for number in count(2) if (version := f"{name}-v{number}") not in taken)


def _plain(labels: Seq[str]) -> set[str]:
    return {label.strip() for label in labels}


@contextmanager
def _undone(url: str, tell: Tell) -> Iterator[Callable[..., None]]:
    """Yield a function that takes how to undo a change, and the call that does it with its arguments. If the block
    raises, the last change is undone first, and `tell` says what could not be."""
    left: list[str] = []
    try:
        with ExitStack() as stack:

            def undo(what: str, call: Callable[..., object], *arguments: object) -> None:
                def carefully() -> None:
                    try:
                        call(*arguments)
                    except (UnknownClassifierError, UnknownRouteError):
                        pass  # the change never took effect
                    except LoraplexError as exc:
                        left.append(f"could not {what}: {exc}")

                stack.callback(carefully)

            yield undo
            stack.pop_all()
    except BaseException:
        for one in left or [f"nothing was changed at {url}"]:
            tell(one)
        raise
