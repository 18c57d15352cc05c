"""Where adapters come from: the bundle, or a source at run time. Remembers run-time changes for a restart."""

import asyncio
import logging
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from loraplex.adapters.cache import cache_folder
from loraplex.adapters.files import Progress, ResolvedSource, telling
from loraplex.adapters.names import Entry
from loraplex.adapters.source import resolve_source
from loraplex.bundle import AdapterSource, Bundle, check_name, open_adapter
from loraplex.config import EngineConfig
from loraplex.database import state_errors
from loraplex.discovery import SkippedFolder
from loraplex.errors import ConfigurationError, InvalidRequestError, LoraplexError
from loraplex.service.classifiers import CheckedClassifier, ClassifierReader, ClassifierVersion
from loraplex.service.state import BUNDLE, AdapterState
from loraplex.service.versions import Versions
from loraplex.types import AdapterInfo, ErrorInfo

logger = logging.getLogger(__name__)


class AdapterRegistry:
    """The names and sources of adapters. `Versions` decides which version answers for a name."""

    def __init__(
        self,
        bundle: Bundle,
        base_names: tuple[str, ...],
        config: EngineConfig,
        versions: Versions[ClassifierVersion],
        reader: ClassifierReader,
        state: AdapterState | None,
    ) -> None:
        self._bundle, self._base_names, self._config = bundle, base_names, config
        self._versions, self._reader, self._state = versions, reader, state
        self._remembering = asyncio.Lock()
        self._unsaved: dict[str, None] = {}  # names whose last change is not in the state yet, in order
        self._sources: dict[str, tuple[Path, str]] = {}  # name -> folder, and what it was resolved from
        self._resolvers = ThreadPoolExecutor(4, "loraplex-source")  # their own threads: a download may hang

    def adapters(self) -> tuple[AdapterInfo, ...]:
        return tuple(map(self._info, self._versions.names.entries()))

    def skipped(self) -> tuple[SkippedFolder, ...]:
        return self._bundle.skipped

    def adapter(self, name: str) -> AdapterInfo:
        return self._info(self._versions.entry(name))

    def close(self) -> None:
        self._resolvers.shutdown(wait=False, cancel_futures=True)

    async def load(self, name: str, source: str, pin: bool | None, replace: bool) -> AdapterInfo:
        check_name(name)
        if name in self._base_names:
            raise InvalidRequestError(f"{name!r} is the base's name", remedy="choose another for the adapter")
        resolved = await self._resolve(source, telling(name, logger.warning))
        source_of_name = AdapterSource(name=name, path=resolved.path, contract=None)  # read later, with the weights
        entry = await self._versions.load(source_of_name, pin=pin, replace=replace)
        self._sources[name] = resolved.path, resolved.source
        await self._remember(name)
        return self._info(entry)

    def unload(self, name: str) -> Coroutine[Any, Any, None]:
        """See `Versions.unload`."""
        unloading = self._versions.unload(name)

        async def unload() -> None:
            await unloading
            await self._remember(name)

        return unload()

    async def pin(self, name: str, is_pinned: bool) -> AdapterInfo:
        entry = await self._versions.pin(name, is_pinned)
        await self._remember(name)
        return self._info(entry)

    async def start(self, preload: frozenset[str] | None, checked: dict[str, CheckedClassifier]) -> None:
        """Register the bundle's adapters, with the changes that the state remembers, and load the names in `preload`.

        The error of a broken adapter is in its entry, or is raised where the bundle requires the adapter. preload:
        names to load now; None for all. checked: the bundle's adapters that were read already; each is removed when it
        is used.
        """
        bundled = {source.name: source for source in self._bundle.adapters}
        remembered = {} if self._state is None else {one.name: one for one in self._state.remembered()}
        its_own: set[str] = set()
        for name in {**bundled, **remembered}:
            one = remembered.get(name)
            if name in self._bundle.named and one is not None and one.source != BUNDLE:
                now = f"it was loaded from {one.source}" if one.source else "it was unloaded"
                logger.warning("--adapter %s has no effect: %s at run time, as --state-dir remembers", name, now)
            if name in bundled and (one is None or one.source == BUNDLE):
                error = bundled[name].error
                if error is not None:
                    logger.error("%s cannot be loaded: %s", name, error)
                self._versions.register(bundled[name], error)
                its_own.add(name)
            elif one is not None and one.source not in (None, BUNDLE):
                await self._register_remembered(name, one.source)
        for entry in self._versions.names.entries():
            one_pinned = entry.name in remembered and remembered[entry.name].is_pinned
            is_named = preload is not None and entry.name in preload
            if entry.error is not None or not (preload is None or is_named or one_pinned):
                continue
            read = checked.pop(entry.name, None) if entry.name in its_own else None
            try:
                identified = None if read is None else await asyncio.to_thread(self._reader.identify, read)
                await self._versions.load(entry.source, pin=one_pinned or is_named, read=identified)
            except LoraplexError as exc:
                # Only broken files end the start, not a lack of room beside other adapters.
                if self._bundle.requires(entry.name) and isinstance(exc, ConfigurationError):
                    raise
                logger.error("%s cannot be loaded: %s", entry.name, exc)

    async def _register_remembered(self, name: str, source: str) -> None:
        try:
            resolved = await self._resolve(source)
            self._versions.register(open_adapter(name, resolved.path))
            self._sources[name] = resolved.path, resolved.source
        except LoraplexError as exc:
            if self._bundle.requires(name):
                raise
            logger.error("%s cannot be loaded again from %s: %s", name, source, exc)
            self._versions.register(AdapterSource(name=name, path=Path(source), contract=None), exc)

    async def _remember(self, name: str) -> None:
        """Write the name's current source and pin to the state, after those that could not be written before. Raises
        StateError where the state cannot be written."""
        if self._state is None:
            return
        async with self._remembering:  # one at a time, so that the last change wins
            self._unsaved[name] = None
            effect = f"the change to {name!r} took effect, but is not saved and is lost at a restart"
            with state_errors(f"{effect}, unless a later change can be saved"):
                for one in tuple(self._unsaved):
                    source, is_pinned = self._source_and_pin(one)
                    await asyncio.to_thread(self._state.remember, name=one, source=source, is_pinned=is_pinned)
                    del self._unsaved[one]

    def _source_and_pin(self, name: str) -> tuple[str | None, bool]:
        """Return what the state remembers of a name."""
        entry = next((one for one in self._versions.names.entries() if one.name == name and not one.is_leaving), None)
        source = None
        if entry is not None:
            path = entry.source.path
            is_bundled = any(one.name == name and one.path.resolve() == path.resolve() for one in self._bundle.adapters)
            resolved_path, resolved = self._sources.get(name, (path, str(path.absolute())))
            source = BUNDLE if is_bundled else resolved if resolved_path == path else str(path.absolute())
        return source, entry is not None and entry.is_pinned

    async def _resolve(self, source: str, progress: Progress | None = None) -> ResolvedSource:
        cache = cache_folder(self._config.state_dir)

        def resolve() -> ResolvedSource:
            return resolve_source(source, roots=self._adapter_roots(), cache_dir=cache, progress=progress)

        return await asyncio.get_running_loop().run_in_executor(self._resolvers, resolve)

    def _adapter_roots(self) -> list[Path]:
        return [*map(Path, self._config.adapter_root), *([self._bundle.root] if self._bundle.root is not None else [])]

    def _info(self, entry: Entry[ClassifierVersion]) -> AdapterInfo:
        live, contract = entry.live, entry.source.contract
        return AdapterInfo(
            name=entry.name,
            state=entry.state,
            version=None if live is None else live.id,
            rank=None if live is None else live.rank,
            num_parameters=None if live is None else live.num_parameters,
            num_bytes=None if live is None else live.num_bytes,
            labels=live.labels if live is not None else contract.labels if contract is not None else None,
            type=contract.question_type if contract is not None else None,
            question=contract.question if contract is not None else None,
            path=str(entry.source.path),
            pinned=entry.is_pinned,
            on_device=live is not None and live.kv_id in self._versions.residence.slots,
            template=None if live is None or live.template is None else live.template.written_by,
            chat_template=None if live is None or live.chat.text is None else live.chat.owner,
            tokenizer=None if live is None else live.tokenizer.owner,
            error=None if entry.error is None else ErrorInfo.of(entry.error),
            warnings=None if live is None else live.warnings or None,
        )
