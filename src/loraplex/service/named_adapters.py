"""The adapters that are named at a start: finds their sources on disk, on the hub or in S3."""

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from loraplex.adapters.cache import cache_folder
from loraplex.adapters.files import telling
from loraplex.adapters.source import resolve_source
from loraplex.bundle import Bundle
from loraplex.config import EngineConfig

logger = logging.getLogger(__name__)


def add_adapters(
    bundle: Bundle,
    named: Mapping[str, str | Path],
    config: EngineConfig,
    tell: Callable[[str], object] = logger.warning,
) -> Bundle:
    """Return the bundle with the adapters that `named` (name -> source) adds. See `resolve_source` for sources.

    tell:  is called with a line about each download, and about its progress. Raises ConfigurationError where a name is
           taken or not valid, before anything is fetched, and where a source is not an adapter."""
    bundle.check_names(named)
    cache = cache_folder(config.state_dir)
    folders: dict[str, Path] = {}
    for name, source in named.items():
        if not os.path.lexists(os.path.expanduser(source)):
            tell(f"fetching {name} …")
        folders[name] = resolve_source(source, roots=None, cache_dir=cache, progress=telling(name, tell)).path
    return bundle.with_adapters(folders)
