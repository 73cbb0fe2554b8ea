"""Relays and stages on the Hugging Face Hub: addresses, downloads, uploads.

    hf://USER/NAME[@REVISION][/FOLDER]

The library huggingface_hub has the transport, the cache, the revisions, the login and the offline mode. It is imported
when an address is used. Only files that the caller names are downloaded; reading them executes nothing.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from relay_diffusion import __version__
from relay_diffusion.errors import UserError, require
from relay_diffusion.utils.installed import install_command, require_library
from relay_diffusion.utils.messages import one_line, shorten

SCHEME = "hf://"
FORM = "hf://USER/NAME[@REVISION][/FOLDER]"
INSTALL = install_command("hub")
LOGIN = "log in with `hf auth login` or set HF_TOKEN"
SHORT = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([^/@]+))?", re.ASCII)  # USER/NAME[@REVISION]
ADDRESS = re.compile(rf"{SCHEME}{SHORT.pattern}(?:/(.*))?", re.ASCII)


@dataclass(frozen=True)
class HubAddress:
    """Folder of a repository.

    revision: branch, tag or commit; None: the default branch. folder: "" is the root.
    """

    repository: str
    revision: str | None = None
    folder: str = ""

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{quote(self.revision, safe='')}"
        return f"{SCHEME}{self.repository}{revision}{self.folder and f'/{self.folder}'}"

    def inside(self, path: str) -> HubAddress:
        """Return the address of another folder of the repository.

        path: relative to this folder. Raises UserError for a folder outside the repository.
        """
        folder = posixpath.normpath(posixpath.join(self.folder, path))
        if folder != "." and not _is_plain(folder):
            raise UserError(f"{self} names the folder {shorten(path)}, which is outside the repository: refused")
        return replace(self, folder="" if folder == "." else folder)


def is_address(path: object) -> bool:
    """Return whether a path starts with hf://."""
    return isinstance(path, str) and path.startswith(SCHEME)


def parse_address(text: str) -> HubAddress:
    """Parse hf://USER/NAME[@REVISION][/FOLDER].

    A slash in a revision is written %2F. Raises UserError for a malformed address.
    """
    match = ADDRESS.fullmatch(text)
    revision = match and match[2] and unquote(match[2])
    folder = "" if match is None else (match[3] or "").removesuffix("/")
    if match is None or not all(_is_plain(part) for part in (revision, folder) if part):
        raise UserError(f"{shorten(text)} is not an address on the Hub; write {FORM}")
    return HubAddress(match[1], revision, folder)


def parse_short_address(text: str) -> HubAddress | None:
    """Parse USER/NAME[@REVISION]; None: another form."""
    return parse_address(SCHEME + text) if SHORT.fullmatch(text) else None


def _is_plain(path: str) -> bool:
    """Return whether a path is relative, without "." and ".."."""
    return path.isprintable() and not {"", ".", ".."} & {*path.split("/")}


def check_address(text: str) -> None:
    """Raise UserError for a malformed address, and without huggingface_hub.

    Connects to nothing.
    """
    check_installed(parse_address(text))


def check_installed(what: object) -> None:
    """Raise UserError naming `what` unless huggingface_hub is installed."""
    require_library(str(what), "huggingface_hub", "hub")


def download(address: HubAddress, *names: str) -> tuple[Path, HubAddress]:
    """Download files of a folder, or find them in the cache.

    All are of one commit. Returns the local folder and the address of that commit. Raises UserError naming the address.
    """
    api, commit = _api(address), address
    for name in names:
        file_name = posixpath.join(address.folder, name)
        with _explained(address, file_name):
            file = Path(api.hf_hub_download(address.repository, file_name, revision=commit.revision))
        commit = replace(address, revision=file.parents[file_name.count("/")].name)
    return file.parent, commit


def files_to_replace(address: HubAddress, private: bool = False) -> list[str]:
    """List the files of a repository before an upload.

    Empty for a new repository or branch. Raises UserError without login, and for a public repository with `private`.
    """
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    api, public, files = _api(address), False, []
    with _explained(address):
        api.whoami()
        with suppress(RepositoryNotFoundError, RevisionNotFoundError):
            public = not api.model_info(address.repository).private
            files = api.model_info(address.repository, revision=address.revision).siblings
    require(not (private and public), f"private=true: {address} is public; change its settings, or remove private")
    return [file.rfilename for file in files]


def upload(folder: Path, address: HubAddress, private: bool = False, remove: Sequence[str] = ()) -> str:
    """Upload a folder in one commit; return the URL of the commit.

    A missing repository or branch is created. private: of a new repository. remove: files to delete in the same commit.
    Raises UserError naming the address.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    files = sorted(path for path in folder.rglob("*") if path.is_file())
    added = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
    api = _api(address)
    with _explained(address):
        api.create_repo(address.repository, private=private or None, exist_ok=True)
        if address.revision is not None and not api.revision_exists(address.repository, address.revision):
            api.create_branch(address.repository, branch=address.revision, exist_ok=True)
        commit = api.create_commit(
            address.repository,
            [*(CommitOperationDelete(name) for name in remove), *added],
            commit_message=f"Publish a relay of relay-diffusion {__version__}",
            revision=address.revision,
        )
    return str(commit.commit_url)


def _api(address: HubAddress) -> Any:
    check_installed(address)
    from huggingface_hub import HfApi

    return HfApi(library_name="relay-diffusion", library_version=__version__)


@contextmanager
def _explained(address: HubAddress, file_name: str = "") -> Iterator[None]:
    """Turn errors of huggingface_hub into a UserError of one line."""
    try:
        yield
    except Exception as error:  # of HTTP, the network or the disk: many types, which depend on the version
        raise UserError(f"{address}: {_reason(error, address, file_name)}") from None


def _reason(error: BaseException, address: HubAddress, file_name: str) -> str:
    """Describe an error of huggingface_hub, and what to do."""
    from huggingface_hub import constants, errors

    text = shorten(one_line(error), 200)
    if isinstance(error, errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{address.repository}"
        return f"access to the repository is restricted; accept its conditions on {page} and {LOGIN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the Hub has no such repository, or it is private; check the name, or {LOGIN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the repository has no revision {address.revision}; give one of its branches, tags or commits"
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        return f"{file_name} is not in the cache: {_reason(error.__cause__, address, file_name)}"
    if isinstance(error, errors.EntryNotFoundError):
        return f"the repository has no file {file_name}; check the folder and the revision"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it"
    if isinstance(error, errors.LocalTokenNotFoundError):
        return f"no access token; {LOGIN}"
    if isinstance(error, errors.HFValidationError):
        return f"is not an address on the Hub ({text}); write {FORM}"
    if isinstance(error, errors.HfHubHTTPError):
        denied = error.response.status_code in (401, 403)
        remedy = f"{LOGIN} with a token that may do this" if denied else "try again later"
        return f"the Hub answers {error.response.status_code} ({text}); {remedy}"
    return f"the transfer failed ({text}); check the network and the disk"
