"""Artefacts to and from the Hugging Face Hub, or a folder that stands in for it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import torch
from torch import nn

from repnet.deploy.artifact import load_deployed
from repnet.deploy.description import DESCRIPTION, WEIGHTS, check_hashes, read_description
from repnet.deploy.staging import CARD, Stage
from repnet.errors import InputError, first_line
from repnet.hub.card import check_card, read_report, write_model_card


def push_to_hub(
    directory: str | Path,
    repo_id: str | Path,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    license: str | None = None,
    message: str = "Upload a verified deploy model",
) -> str:
    """Upload an artefact with its reports and a model card, and return where it is.

    Only what the artefact lists is uploaded, after its hashes are checked. A `README.md` in the
    directory is taken as it is; otherwise the card is generated.

    Args:
        directory: that `deploy.py` wrote.
        repo_id: `OWNER/NAME`, made if it is not there; or a folder: a `file://` URL, or a path that
            begins with `/`, `.` or `~`, which must be new or empty.
        private: of a new repository; None for the owner's default.
        token: of the Hub; None for the one that is stored by `hf auth login`.
        revision: branch; None for the main one.
        license: the Hub's identifier of it for the generated card, for instance `apache-2.0`.
        message: of the commit.

    Raises:
        InputError: the artefact is not verified or was changed, its card is that of another one,
            or it cannot be uploaded.
    """
    with tempfile.TemporaryDirectory() as temporary:
        # What was checked is what is uploaded, whatever happens in the directory meanwhile.
        copy = Path(temporary)
        _copy(Path(directory), copy)
        _copy_files(Path(directory), copy, [CARD])
        if (copy / CARD).exists():
            if license is not None:
                raise InputError(
                    f"'{directory}' has a {CARD} of its own; write the license there, or remove it"
                )
            check_card(copy, read_description(copy))
        else:
            write_model_card(copy, repo_id=str(repo_id), license=license)
        if (folder := _folder(repo_id, revision)) is not None:
            _check_new(folder)
            with Stage(folder, overwrite=False) as stage:
                shutil.copytree(copy, stage.path, dirs_exist_ok=True)
            return str(stage.directory)
        hub = _huggingface_hub()
        try:
            api = hub.HfApi(token=token)
            api.create_repo(str(repo_id), private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=str(repo_id),
                folder_path=copy,
                revision=revision,
                commit_message=message,
                delete_patterns=["model.*", "model_*"],  # exports of an earlier artefact
            )
        except Exception as error:  # a network fails in every way that there is
            raise InputError(f"cannot push to '{repo_id}': {first_line(error)}") from error
        return str(commit.commit_url)


def pull(
    repo_id: str | Path,
    directory: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
) -> Path:
    """Download an artefact to a new directory, check it, and return the directory.

    Nothing comes along that the artefact does not list, so that its card stays where it is.

    Args:
        repo_id: as in `push_to_hub`.
        directory: new or empty; if it is filled meanwhile, `directory.2` and so on is made.
        revision: branch, tag or commit; None for the main branch.
        token: of the Hub.

    Raises:
        InputError: there is no such artefact, or it was changed; nothing was written.
    """
    directory = Path(directory)
    _check_new(directory)
    folder = _folder(repo_id, revision)
    source = folder or _download(repo_id, revision=revision, token=token)
    with Stage(directory, overwrite=False) as stage:
        _copy(source, stage.path, links=folder is None)
    return stage.directory


def from_hub(
    repo_id: str | Path,
    *,
    file: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | None = None,
    trust: Sequence[str] = (),
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Return the deploy model of a repository, as `load_deployed` does.

    Args:
        repo_id: as in `push_to_hub`.
        file: an exported file of the artefact; None for the PyTorch network.
        revision: branch, tag or commit; None for the main branch.
        cache_dir: of downloads; None for that of `huggingface_hub`.
        token: of the Hub.
        trust: names of packages that may be imported to build the network; "native" for files that
            are code.
        device: where it runs.

    Raises:
        InputError: there is no such artefact, or it was changed.
    """
    source = _folder(repo_id, revision)
    if source is None:
        source = _download(repo_id, revision=revision, token=token, cache_dir=cache_dir)
    else:
        _refuse_links(source, [DESCRIPTION, *_listed(source)])
    return load_deployed(source / (file or WEIGHTS), trust=trust, device=device)


def _copy(source: Path, target: Path, *, links: bool = False) -> None:
    """Copy a verified artefact, and only what it lists. What is checked is the copy.

    Args:
        source: that holds it.
        target: that receives it.
        links: the files of `source` may be links out of it, as those of a download are.
    """
    read_description(source)  # says best what else it may be
    _copy_files(source, target, [DESCRIPTION], links=links)
    try:
        files = _listed(target)
        _copy_files(source, target, files, links=links)
        description = read_description(target)
        check_hashes(target, description, files)
        read_report(target, description)
    except InputError as error:
        raise InputError(str(error).replace(str(target), str(source))) from error


def _listed(directory: Path) -> list[str]:
    """Return the files that an artefact lists.

    Raises:
        InputError: it is none, or one of them lies elsewhere.
    """
    files = [str(file) for file in read_description(directory)["hashes"]]
    for file in files:
        if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            raise InputError(f"'{directory / DESCRIPTION}' lists '{file}', outside of the artefact")
    return files


def _refuse_links(directory: Path, files: Iterable[str]) -> None:
    for file in files:
        if not (directory / file).resolve().is_relative_to(directory.resolve()):
            raise InputError(
                f"'{directory / file}' is a link out of the artefact; put the file itself there"
            )


def _copy_files(source: Path, target: Path, files: Sequence[str], *, links: bool = False) -> None:
    if not links:
        _refuse_links(source, files)
    for file in files:
        if (source / file).is_file():
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / file, target / file)


def _folder(repo_id: str | Path, revision: str | None) -> Path | None:
    """Return the folder that stands in for a repository, None for one of the Hub.

    Raises:
        InputError: it is asked for a revision, which it does not have.
    """
    folder = _path(repo_id)
    if folder is not None and revision is not None:
        raise InputError(f"'{folder}' is a folder, which has no revisions such as '{revision}'")
    return folder


def _path(repo_id: str | Path) -> Path | None:
    if isinstance(repo_id, Path):
        return repo_id
    if repo_id.startswith("file://"):
        url = urlsplit(repo_id)
        if url.netloc not in ("", "localhost"):
            raise InputError(f"'{repo_id}' names the host '{url.netloc}'; write file:///PATH")
        return Path(unquote(url.path))
    if repo_id[:1] in ("/", ".", "~") or Path(repo_id).is_absolute():
        return Path(repo_id).expanduser()
    return None


def _check_new(folder: Path) -> None:
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"'{folder}' is not an empty directory; choose another")


def _download(repo_id: str | Path, **options: Any) -> Path:
    hub = _huggingface_hub()
    try:
        return Path(hub.snapshot_download(str(repo_id), **options))
    except Exception as error:  # a network fails in every way that there is
        raise InputError(f"cannot pull '{repo_id}': {first_line(error)}") from error


def _huggingface_hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise InputError(
            'the Hugging Face Hub needs huggingface_hub: pip install "repnet[hub]"'
        ) from error
    return huggingface_hub
