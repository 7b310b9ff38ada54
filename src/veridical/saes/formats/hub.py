"""SAEs on the Hugging Face hub: push a saved one, pull any that can be read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from veridical import hub
from veridical.errors import InputError

if TYPE_CHECKING:
    from veridical.saes.base import SAE

FILES = ("*.json", "*.safetensors", "README.md", "ae.pt")
"""What a folder of an SAE is made of, in any format that is read; nothing else is fetched."""


def push_sae(
    sae: SAE | str | Path, repo: str, *, folder: str | None = None, private: bool = True, **options: Any
) -> str:
    """Uploads an SAE as a SAELens folder with its card.

    Args:
        sae: An SAE, or a folder in which one was saved.
        repo: Name of the repository, such as `someone/gpt2-saes`; made where it does not exist.
        folder: Folder in the repository, such as the site; its root when not given.
        private: Whether a repository that is made is private.
        **options: Passed to `HfApi.upload_folder`: `token`, `revision`, `commit_message`.

    Returns:
        Where it now is.

    Raises:
        InputError: A folder without an SAE, or a hub that cannot be reached or written.
    """
    import tempfile

    from veridical.saes.saved import load_sae, save_sae

    hub.check_name(repo)
    with tempfile.TemporaryDirectory() as temporary:
        if isinstance(sae, str | Path):
            load_sae(sae)
            source = Path(sae)
        else:
            source = save_sae(sae, Path(temporary) / "sae")
        return hub.upload(source, repo, FILES, within=folder, private=private, **options)


def pull_sae(repo: str, folder: str | None = None, *, revision: str | None = None, **options: Any) -> SAE:
    """Fetches an SAE in any format that `load_sae` reads.

    Args:
        repo: Name of the repository.
        folder: Folder in the repository, such as `blocks.5.hook_resid_post`; its root when not given.
        revision: Branch, tag or commit.
        **options: Passed to `snapshot_download`: `token`, `cache_dir`, `local_files_only`.

    Raises:
        InputError: No such repository or folder, a hub that cannot be reached, or no SAE there.
    """
    from huggingface_hub import snapshot_download

    from veridical.saes.saved import load_sae

    hub.check_name(repo)
    within = "" if folder is None else f"{folder.strip('/')}/"
    with hub.explaining(repo):
        root = snapshot_download(
            repo, revision=revision, allow_patterns=[f"{within}{pattern}" for pattern in FILES], **options
        )
    found = Path(root) / (folder or "")
    if not found.is_dir():
        raise InputError(f"{repo} has no folder {folder!r} with an SAE in it")
    return load_sae(found)
