"""Fetching weights: a folder that a run reads, made of files from a model hub.

A run reads its weights from a folder (`checkpoint_folder`). `fetch` makes that folder: it downloads
the files of each `Download` into the hub client's own cache, converts pickled files to safetensors
once, and links everything under the names that the run looks for. No file is copied, and a second
call downloads nothing.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from qvg_jax.app.convert import convert
from qvg_jax.app.hub import Address, Download, Offer, explained, hub_client, offers
from qvg_jax.errors import UserError
from qvg_jax.files import replacing

__all__ = ["ask", "fetch", "fetch_address", "fetched", "remember"]

PICKLED = (".pt", ".pth", ".bin")
SOURCES, ACCEPTED = "sources.json", "accepted_licences.json"
MARGIN = 2**28  # bytes that stay free on the disk


def fetch(
    downloads: Sequence[Download],
    *,
    accept: Callable[[Sequence[Offer]], bool],
    cache: str | Path | None = None,
) -> Path:
    """Downloads what is missing and returns the folder that `--weights` reads.

    An interrupted download goes on where it ended. A licence is asked for once for each repository.

    Args:
        downloads: what the model needs.
        accept: `accept(offers)`, asked once if a licence among them was not accepted before; it
            shows files, sizes and licences, and returns whether the user agrees.
        cache: folder for converted files and links; None is the user's cache folder.

    Returns:
        The folder. Its name is the same for the same commits.

    Raises:
        UserError: see `offers`; also a licence that was not accepted, a disk without room, a
            pickled file that cannot be converted.
    """
    cache = _cache(cache)
    offered = offers(downloads)
    _ask(offered, accept, cache)
    _check_room(offered)
    links: dict[str, Path] = {}
    for offer in offered:
        links |= _downloaded(offer, cache)
    return _linked(offered, links, cache)


def fetch_address(
    text: str,
    needed: Sequence[Download],
    *,
    accept: Callable[[Sequence[Offer]], bool],
    cache: str | Path | None = None,
) -> Path:
    """As `fetch`, with a user's address in place of the repository of the first download.

    The first download is a model's transformer: `hf:ORGANISATION/NAME` brings the safetensors of
    another transformer of the same kind, and the other parts come from where they always do. With
    the model's own repository an address chooses a revision or a folder.

    Args:
        text: the address, see `Address`.
        needed: what the model needs; the transformer first.
        accept, cache: as in `fetch`.
    """
    address = Address.parse(text)
    first, *rest = needed
    return fetch([_at(address, first), *rest], accept=accept, cache=cache)


def _at(address: Address, download: Download) -> Download:
    """The download from the repository of an address, whatever its weights are called there."""
    changes = dict(repo=address.repo, revision=address.revision)
    if address.repo != download.repo:
        changes |= dict(subfolder="", files=("*.safetensors",))
    if address.subfolder:
        changes |= dict(subfolder=address.subfolder)
    return dataclasses.replace(download, **changes)


def ask(offered: Sequence[Offer]) -> bool:
    """Shows on stderr what would be downloaded and under which licences, and asks the user.

    Where nobody can answer (stdin is no terminal) the answer is no.
    """
    for offer in offered:
        size = sum(size for _, size, _ in offer.files)
        print(
            f"{offer.download.what}: {offer.download.repo} at {offer.commit[:12]}, "
            f"{size / 1e9:.3f} GB ({offer.bytes_missing / 1e9:.3f} GB to download), licence: "
            f"{offer.licence}",
            file=sys.stderr,
        )
    if not sys.stdin.isatty():
        return False
    print("Download under these licences? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def remember(model: str, folder: Path, *, cache: str | Path | None = None) -> None:
    """Makes a folder of weights the one that a model reads when its user names none."""
    link = _cache(cache) / "models" / model
    link.parent.mkdir(parents=True, exist_ok=True)
    partial = link.with_name(f"{link.name}.partial")  # a link has no bytes for `replacing` to sync
    partial.unlink(missing_ok=True)
    partial.symlink_to(folder.resolve())
    os.replace(partial, link)


def fetched(model: str, *, cache: str | Path | None = None) -> Path | None:
    """The folder that `qvg fetch` made for a model, or None."""
    link = _cache(cache) / "models" / model
    return link.resolve() if link.is_dir() else None


def _downloaded(offer: Offer, cache: Path) -> dict[str, Path]:
    """Files of one offer on disk, by their names in the folder of weights."""
    hub, download = hub_client(), offer.download
    with explained(download):
        root = hub.snapshot_download(
            download.repo, revision=offer.commit, allow_patterns=download.patterns
        )
    links = {}
    for name, _, _ in offer.files:
        inside = PurePosixPath(name).relative_to(download.subfolder or ".")
        target = PurePosixPath(download.place, inside)
        file = Path(root, name)
        if download.name is not None:
            target = target.with_name(_renamed(target.name, download, offer))
        if file.suffix in PICKLED:
            target = target.with_suffix(".safetensors")
            file = _converted(file, download, offer.commit, cache)
        links[str(target)] = file
    return links


def _renamed(name: str, download: Download, offer: Offer) -> str:
    """The name that a download wants for its one file, or for each shard of it."""
    number = re.search(r"-\d{5}-of-\d{5}(?=\.safetensors$)", name)
    if number is None and len(offer.files) > 1:
        found = ", ".join(file for file, _, _ in offer.files)
        raise UserError(
            f"{download.repo} has several checkpoints ({found}); accepted: hf:REPOSITORY:SUBFOLDER "
            "of one of them"
        )
    return f"{download.name}{number[0] if number else ''}{PurePosixPath(name).suffix}"


def _converted(file: Path, download: Download, commit: str, cache: Path) -> Path:
    """A pickled file as safetensors: converted once for each commit."""
    folder = cache / "converted" / f"{download.repo.replace('/', '--')}-{commit[:12]}"
    target = folder / f"{file.stem}.safetensors"
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        convert(file, target, entry=download.entry)
    return target


def _linked(offered: Sequence[Offer], links: dict[str, Path], cache: Path) -> Path:
    """The folder of weights: a link for each file, and which commits they are from."""
    sources = [
        {"repo": o.download.repo, "commit": o.commit, "files": [name for name, _, _ in o.files]}
        for o in offered
    ]
    digest = hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest()[:12]
    folder = cache / "weights" / f"{offered[0].download.repo.replace('/', '--')}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, file in links.items():
        link = folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if link.is_symlink() or link.exists():
            if link.resolve() == file.resolve():
                continue
            link.unlink()
        link.symlink_to(file.resolve())
    with replacing(folder / SOURCES) as partial:
        partial.write_text(json.dumps(sources, indent=1) + "\n")
    return folder


def _ask(offered: Sequence[Offer], accept: Callable[..., bool], cache: Path) -> None:
    """Raises UserError unless all licences are accepted, now or before."""
    record = cache / ACCEPTED
    before = json.loads(record.read_text()) if record.is_file() else {}
    new = [o for o in offered if before.get(o.download.repo) != o.licence]
    if not new:
        return
    if not accept(offered):
        names = ", ".join(sorted({o.download.repo for o in new}))
        raise UserError(f"the licences of {names} were not accepted; nothing was downloaded")
    with replacing(record) as partial:
        agreed = before | {o.download.repo: o.licence for o in new}
        partial.write_text(json.dumps(agreed, indent=1, sort_keys=True) + "\n")


def _check_room(offered: Sequence[Offer]) -> None:
    """Raises UserError if the hub's cache has no room for the missing files."""
    missing = sum(o.bytes_missing for o in offered)
    # A pickled file is on the disk twice: as it came, and converted.
    missing += sum(s for o in offered for n, s, here in o.files if n.endswith(PICKLED) and not here)
    folder = Path(hub_client().constants.HF_HUB_CACHE)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if missing and missing + MARGIN > free:
        raise UserError(
            f"{missing / 1e9:.2f} GB are missing and {folder} has {free / 1e9:.2f} GB free; "
            "accepted: more room, or HF_HOME on another disk"
        )


def _cache(folder: str | Path | None) -> Path:
    if folder is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "qvg_jax")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
