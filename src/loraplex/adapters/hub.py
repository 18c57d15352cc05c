"""Fetches adapters from the Hugging Face hub, through the hub's own cache."""

from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from loraplex.adapters.files import FILES, PICKLE, Progress, ResolvedSource, SourceLimits, check, reason_of, sizes_of
from loraplex.errors import AdapterError


def from_hub(
    repo: str, folder: str | None, revision: str | None, limits: SourceLimits, progress: Progress | None
) -> ResolvedSource:
    """Return the adapter in a repository, or in its `folder`, at a revision. Raises AdapterError where that fails."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        DryRunError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        """Draws nothing. The bar that counts the bytes of all files reports them to `progress`."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counts = kwargs.get("name") == "huggingface_hub.snapshot_download"
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            with self.get_lock():  # each file is fetched in its own thread
                self.n += n or 0
                if self.counts and progress is not None:
                    progress(int(self.n), total)

    source = f"hf://{repo}" + (f"/{folder}" if folder else "") + (f"@{revision}" if revision else "")
    total: int | None = None
    wanted = [f"{folder}/{name}" if folder else name for name in (*FILES, PICKLE)]
    try:
        with suppress(DryRunError):  # the hub is unreachable: the next call uses the cache, or says why not
            listed = snapshot_download(repo, revision=revision, allow_patterns=wanted, dry_run=True, tqdm_class=Bar)
            check(source, {PurePosixPath(file.filename).name: file.file_size or 0 for file in listed}, limits)
            total = sum(file.file_size or 0 for file in listed if file.will_download and file.filename != wanted[-1])
            revision = listed[0].commit_hash  # so that the files fetched are the files checked
        snapshot = snapshot_download(repo, revision=revision, allow_patterns=wanted[:-1], tqdm_class=Bar)
    except AdapterError:
        raise
    except Exception as exc:  # the library raises many types, httpx's among them; all mean that fetching failed
        remedies = {
            GatedRepoError: "accept its terms on the hub, and set HF_TOKEN to a token of that account",
            RepositoryNotFoundError: "check the id; for a private repository set HF_TOKEN",
            RevisionNotFoundError: "check the branch, tag or commit behind '@'",
            LocalEntryNotFoundError: "check the network and HF_ENDPOINT; under HF_HUB_OFFLINE only the cache is read",
            HfHubHTTPError: "check the id and HF_ENDPOINT, set HF_TOKEN where one is needed; then try again",
            Exception: "check the id, the network and HF_ENDPOINT; then try again",
        }
        remedy = next(text for kind, text in remedies.items() if isinstance(exc, kind))
        raise AdapterError(source, f"cannot be fetched from the hub: {reason_of(exc)}", remedy=remedy) from None
    path = Path(snapshot, folder or "")
    check(source, sizes_of(path), limits)
    return ResolvedSource(path=path, source=source, remote=True)
