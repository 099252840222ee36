"""A model hub on the loopback address: repositories in memory, served as the hub's client asks for them."""

import contextlib
import dataclasses
import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants


@dataclasses.dataclass
class Repository:
    """Files of one repository by name; `gated` refuses everybody, as before conditions are accepted."""

    files: dict[str, bytes]
    licence: str = "apache-2.0"
    gated: bool = False

    @property
    def commit(self) -> str:
        digest = hashlib.sha1()
        for name in sorted(self.files):
            digest.update(name.encode() + b"\0" + self.files[name] + b"\0")
        return digest.hexdigest()


class LoopbackHub:
    """Serves repositories by name; counts the bytes it sent and can break off in the middle of a file.

    Attributes:
        repositories: by "ORGANISATION/NAME".
        sent: bytes of file contents that were sent.
        break_after: file contents that are sent before connections are cut; None never cuts.
        ranges: Range headers that clients sent.
    """

    def __init__(self, **repositories: Repository):
        self.repositories = repositories
        self.sent = 0
        self.break_after: int | None = None
        self.ranges: list[str] = []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                hub.answer(self, body=False)

            def do_GET(self):
                hub.answer(self, body=True)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        poll = dict(poll_interval=0.01)  # so long its end may take
        threading.Thread(target=self.server.serve_forever, kwargs=poll, daemon=True).start()

    def __enter__(self) -> "LoopbackHub":
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, to: http.server.BaseHTTPRequestHandler, *, body: bool) -> None:
        """Answers one request: a repository's description, its list of files, or a file."""
        path = urllib.parse.unquote(urllib.parse.urlsplit(to.path).path)
        parts = path.strip("/").split("/")
        name = "/".join(parts[2:4] if parts[:2] == ["api", "models"] else parts[:2])
        repository = self.repositories.get(name)
        if repository is None:
            return self._refuse(to, 404, "RepoNotFound", f"Repository {name} not found")
        if repository.gated:
            return self._refuse(to, 403, "GatedRepo", f"Access to {name} is restricted")
        if parts[:2] == ["api", "models"]:
            return self._describe(to, name, repository, parts[4:])
        revision, file = parts[3], "/".join(parts[4:])
        if revision not in ("main", repository.commit):
            return self._refuse(to, 404, "RevisionNotFound", f"no revision {revision}")
        if file not in repository.files:
            return self._refuse(to, 404, "EntryNotFound", f"no file {file}")
        self._send_file(to, repository, repository.files[file], body)

    def _describe(self, to, name: str, repository: Repository, rest: list[str]) -> None:
        revision = rest[1] if len(rest) > 1 else "main"
        if revision not in ("main", repository.commit):
            return self._refuse(to, 404, "RevisionNotFound", f"no revision {revision}")
        if rest and rest[0] == "tree":
            told = [
                {
                    "type": "file",
                    "path": file,
                    "size": len(content),
                    "oid": hashlib.sha1(content).hexdigest(),
                }
                for file, content in repository.files.items()
            ]
        else:
            told = {
                "id": name,
                "modelId": name,
                "sha": repository.commit,
                "private": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "cardData": {"license": repository.licence},
                "siblings": [
                    {"rfilename": file, "size": len(content)}
                    for file, content in repository.files.items()
                ],
            }
        self._send(to, 200, json.dumps(told).encode(), {"Content-Type": "application/json"})

    def _send_file(self, to, repository: Repository, content: bytes, body: bool) -> None:
        headers = {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "X-Repo-Commit": repository.commit,
            "Accept-Ranges": "bytes",
        }
        status, part = 200, content
        if (wanted := to.headers.get("Range")) and body:
            self.ranges.append(wanted)
            first = int(wanted.removeprefix("bytes=").split("-")[0])
            status, part = 206, content[first:]
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        if body and self.break_after is not None and self.sent + len(part) > self.break_after:
            # The header promises everything; the connection ends in the middle.
            self._head(to, status, len(part), headers)
            cut = part[: max(self.break_after - self.sent, 0)]
            to.wfile.write(cut)
            self.sent += len(cut)
            to.close_connection = True
            to.connection.close()
            return
        self.sent += len(part) if body else 0
        self._send(to, status, part, headers, body=body)

    def _refuse(self, to, status: int, code: str, message: str) -> None:
        self._send(to, status, b"{}", {"X-Error-Code": code, "X-Error-Message": message})

    def _send(self, to, status: int, content: bytes, headers: dict[str, str], body=True) -> None:
        self._head(to, status, len(content), headers)
        if body and to.command != "HEAD":
            to.wfile.write(content)

    def _head(self, to, status: int, length: int, headers: dict[str, str]) -> None:
        to.send_response(status)
        for name, value in headers.items():
            to.send_header(name, value)
        to.send_header("Content-Length", str(length))
        to.end_headers()


@contextlib.contextmanager
def served(cache: Path, repositories: dict[str, Repository]) -> Iterator[LoopbackHub]:
    """A hub with these repositories, to which the client of this process talks meanwhile.

    Args:
        cache: folder for what the client downloads.
        repositories: by "ORGANISATION/NAME".
    """
    with LoopbackHub(**repositories) as hub, pytest.MonkeyPatch.context() as patch:
        template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "ENDPOINT", hub.address)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        yield hub
