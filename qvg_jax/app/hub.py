"""What a model hub offers: the files of a download with their sizes, its commit and its licence.

`fetch` makes a folder of weights out of offers. The hub's client, `huggingface_hub` (extra `hub`), is
imported when something is asked of the hub.
"""

import contextlib
import dataclasses
import fnmatch
import re
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from qvg_jax.errors import MissingExtraError, UserError

__all__ = ["PREFIX", "Address", "Download", "Offer", "explained", "hub_client", "offers"]

PREFIX = "hf:"  # of an address in place of a folder

_ADDRESS = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?(?::([\w./-]+))?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Download:
    """Files of one repository that a model needs.

    Attributes:
        what: the part of the model, in words.
        repo: the repository, ORGANISATION/NAME.
        files: patterns of its files, such as "vae/*"; each must match a file.
        licence: the licence as the repository states it, for the table in a model's README.
        revision: branch, tag or commit.
        subfolder: folder of the repository that `files` are in.
        place: folder of the weights that the files go to; "" is its top.
        name: name of a single file there, without its suffix; None keeps the repository's.
        entry: entry of a pickled checkpoint that has the weights; None lets `convert` choose.
    """

    what: str
    repo: str
    files: tuple[str, ...]
    licence: str
    revision: str = "main"
    subfolder: str = ""
    place: str = ""
    name: str | None = None
    entry: str | None = None

    @property
    def patterns(self) -> list[str]:
        """`files` as the repository names them."""
        return [str(PurePosixPath(self.subfolder, pattern)) for pattern in self.files]


@dataclasses.dataclass(frozen=True)
class Address:
    """A place on the hub, as a user writes it: hf:ORGANISATION/NAME[@REVISION][:SUBFOLDER]."""

    repo: str
    revision: str = "main"
    subfolder: str = ""

    @classmethod
    def parse(cls, text: str) -> "Address":
        """The address that a text states.

        Raises:
            UserError: the text is no address, or its subfolder leaves the repository.
        """
        match = _ADDRESS.fullmatch(text)
        if match is None or ".." in PurePosixPath(match[3] or "").parts:
            raise UserError(
                f"weights={text!r} is not understood; accepted: hf:ORGANISATION/NAME, then "
                "@REVISION and :SUBFOLDER where they are wanted"
            )
        return cls(match[1], match[2] or "main", (match[3] or "").strip("/"))


@dataclasses.dataclass(frozen=True)
class Offer:
    """What a download would bring, as the hub states it before anything is downloaded.

    Attributes:
        download: what is asked for.
        commit: the commit that its revision stands for now.
        licence: the licence that the repository states now, or the one of the download.
        files: (name, bytes, whether it is here already) of each file.
    """

    download: Download
    commit: str
    licence: str
    files: tuple[tuple[str, int, bool], ...]

    @property
    def bytes_missing(self) -> int:
        """Bytes that are not here yet."""
        return sum(size for _, size, here in self.files if not here)


def offers(downloads: Sequence[Download]) -> list[Offer]:
    """What the hub has for each download: files, bytes, licence; nothing is downloaded.

    Raises:
        UserError: no network, no such repository, revision or file, or a repository that wants its
            conditions accepted first; the message names it and what to do.
    """
    return [_offer(download) for download in downloads]


def _offer(download: Download) -> Offer:
    hub = hub_client()
    with explained(download):
        info = hub.HfApi().model_info(download.repo, revision=download.revision)
        listed = hub.snapshot_download(
            download.repo, revision=info.sha, allow_patterns=download.patterns, dry_run=True
        )
    names = [item.filename for item in listed]
    for pattern in download.patterns:
        if not fnmatch.filter(names, pattern):
            raise UserError(
                f"{download.repo} has no {pattern} at revision {download.revision}; accepted: a "
                "repository laid out like the release"
            )
    files = tuple(sorted((i.filename, int(i.file_size or 0), not i.will_download) for i in listed))
    card = getattr(info, "card_data", None)
    stated = getattr(card, "license", None) if card else None
    licence = stated if isinstance(stated, str) else download.licence
    return Offer(download, str(info.sha), licence, files)


def hub_client() -> Any:
    """The module `huggingface_hub`, or a UserError that says how to install it."""
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ModuleNotFoundError as error:
        if error.name != "huggingface_hub":
            raise
        raise MissingExtraError("fetching weights needs huggingface_hub", "hub") from error
    return huggingface_hub


@contextlib.contextmanager
def explained(download: Download) -> Iterator[None]:
    """Turns the client's errors into one sentence for the user."""
    errors = hub_client().errors
    where = f"{download.repo} at revision {download.revision}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(
            f"{where} wants its conditions accepted: accept them on the repository's page, then "
            "`hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{where} was not found; accepted: a public repository, or a private one after "
            "`hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{where}: there is no such branch, tag or commit") from error
    except errors.HfHubHTTPError as error:
        raise UserError(f"{where}: the hub answered {_first_line(error)}") from error
    except OSError as error:
        if error.errno is not None:  # of the disk
            raise UserError(
                f"{error.filename or where}: {error.strerror}; accepted: a disk with room; what "
                "was downloaded stays, and the same command goes on"
            ) from error
        raise UserError(f"{where}: no connection to the hub ({_first_line(error)})") from error
    except Exception as error:
        # The client's transport has exceptions of its own, which it does not wrap.
        if type(error).__module__.split(".")[0] not in ("httpx", "httpx2", "httpcore", "requests"):
            raise
        raise UserError(f"{where}: no connection to the hub ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
