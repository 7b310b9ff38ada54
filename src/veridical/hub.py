"""The Hugging Face hub: folders uploaded, and what goes wrong there said in one line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from veridical.errors import InputError


def upload(
    source: str | Path,
    repo: str,
    patterns: Sequence[str],
    *,
    within: str | None = None,
    private: bool = True,
    **options: Any,
) -> str:
    """Uploads the files of a folder that fit `patterns`.

    Args:
        source: The folder.
        repo: Name of the repository, such as `someone/adapters`; made where it does not exist.
        patterns: Names with wildcards; nothing else is uploaded.
        within: Folder in the repository; its root when not given.
        private: Whether a repository that is made is private.
        **options: Passed to `HfApi.upload_folder`; `token` to `HfApi`.

    Returns:
        Where it now is.

    Raises:
        InputError: A name that is none, or a hub that cannot be reached or written.
    """
    from huggingface_hub import HfApi

    check_name(repo)
    api = HfApi(token=options.pop("token", None))
    with explaining(repo):
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo, folder_path=source, path_in_repo=within, allow_patterns=list(patterns), **options
        )
    return str(getattr(commit, "commit_url", None) or commit)


def check_name(repo: str) -> None:
    """Refuses what is no name of a repository."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"{repo!r} is no name of a repository: {' '.join(str(error).split())}") from error


class explaining:
    """Turns what the hub's client raises into one line."""

    def __init__(self, repo: str) -> None:
        self.repo = repo

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        import httpx
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

        known = (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, httpx.HTTPError, OSError)
        if isinstance(error, known):
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(f"cannot use {self.repo} on the hub: {said}") from error
