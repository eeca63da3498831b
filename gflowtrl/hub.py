"""Recommenders on the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from gflowtrl.checks import check_type


HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def local_copy(directory: str | os.PathLike) -> Path:
    """Return the folder of a recommender; download `user/model` from the Hub if no such folder exists.

    Raises:
        FileNotFoundError: the folder does not exist, and the Hub has no model of this name.
    """
    check_type("directory", directory, str | os.PathLike, "the path of a folder, or a name of the Hub")
    path = Path(directory)
    if path.is_dir():
        return path
    if isinstance(directory, str) and HUB_NAME.fullmatch(directory):
        try:
            return Path(snapshot_download(directory))
        except (OSError, ValueError) as error:  # huggingface_hub's errors are of these kinds
            raise FileNotFoundError(
                f"{directory} is not a folder, and could not be downloaded from the Hub: {error}"
            ) from error
    raise FileNotFoundError(f"{directory} is not a folder; give the folder of a saved recommender, or its Hub name.")


def upload(
    folder: str | os.PathLike,
    repo_id: str,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload recommender",
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload a folder to the Hub, and return the address of the commit. Arguments are those of huggingface_hub."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id, folder_path=folder, commit_message=commit_message, revision=revision, create_pr=create_pr
    )
    return str(commit)
