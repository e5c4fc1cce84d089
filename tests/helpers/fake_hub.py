"""Fake Hugging Face hub, its file storage and GitHub: loopback servers with the URLs, redirects,
headers and errors of the real ones. Each server has a behavior, such as failing or hanging.

How the real servers behave, from public sources:
- /resolve/ redirects small files (307) to /api/resolve-cache/… and large files (302) to a signed
  URL of a CDN on another host, with X-Linked-Size and X-Linked-ETag, and for files stored in Xet
  also X-Xet-Hash and a Link to a token (huggingface_hub's file_download.py; responses printed in
  ngxson/wllama#248, raullenchai/Rapid-MLX#1122, huggingface/swift-transformers#209).
- Each response has a RateLimit header; in a 429 it gives the time to wait (hub-docs' rate-limits;
  huggingface_hub 1.2's notes).
- An unknown repository returns 401, as do the files of a gated one, whose description is public;
  an unknown revision or file returns 404, with X-Error-Code (hf_raise_for_status).
- tiny_shakespeare has a script on main and default/SPLIT/0000.parquet on refs/convert/parquet;
  TinyStories has data/*.parquet next to text, archives and arrays, and a card without `configs`;
  tinystories-gpt4-clean has one Parquet file at its root (seen in several training repositories).
- Models have no prefix: /OWNER/NAME/resolve/…, /api/models/OWNER/NAME; ?blobs=true adds sizes and,
  for large files, the sha256 (huggingface_hub#951; responses printed in monatis/clip.cpp#65,
  gomlx/go-huggingface#46).
"""

from __future__ import annotations

import hashlib
import io
import json
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Files = dict[str, bytes]
Headers = dict[str, str]

PARQUET_BRANCH = "refs/convert/parquet"
LFS_SUFFIXES = (
    ".parquet",
    ".txt",
    ".gz",
    ".npy",
    ".safetensors",
)  # stored in LFS rather than git


def to_parquet(texts: Iterable[object], column: str = "text") -> bytes:
    """Return a Parquet file with one column."""
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({column: list(texts)}), buffer)
    return buffer.getvalue()


class Repository:
    """A dataset or model repository: its branches, and the files of each commit."""

    def __init__(self, branches: dict[str, Files], *, gated: bool = False) -> None:
        self.commits: dict[str, Files] = {}
        self.branches: dict[str, str] = {}
        self.gated = gated
        for branch, files in branches.items():
            self.push(branch, files)

    def push(self, branch: str, files: Files) -> None:
        commit = sha1(repr(sorted(files.items())).encode())
        self.commits[commit] = files
        self.branches[branch] = commit

    def find_commit(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)


def sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def make_shakespeare_repos(text: str) -> dict[str, Repository]:
    """Make the hub's Tiny Shakespeare: a script on main, one row per split on another branch."""
    script = {"README.md": b"---\nlanguage: en\n---\n", "tiny_shakespeare.py": b"import datasets"}
    rows = {
        f"default/{name}/0000.parquet": to_parquet([part])
        for name, part in split_text(text).items()
    }
    return {"karpathy/tiny_shakespeare": Repository({"main": script, PARQUET_BRANCH: rows})}


def split_text(text: str) -> dict[str, str]:
    """Split a text into its first nine tenths and the two halves of the rest."""
    cut = int(0.9 * len(text))
    val_end = (cut + len(text)) // 2
    return {"train": text[:cut], "validation": text[cut:val_end], "test": text[val_end:]}


class Server(ThreadingHTTPServer):
    """A server that misbehaves as `behavior` says for URLs that contain `path_filter`."""

    daemon_threads = True
    host = "127.0.0.1"

    def __init__(
        self, handler: type[BaseHTTPRequestHandler], behavior: str, path_filter: str
    ) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.behavior, self.path_filter = behavior, path_filter
        self.requests: list[str] = []
        self.truncated_responses = 0  # responses that were cut off
        self.closing = threading.Event()

    @property
    def address(self) -> str:
        return f"http://{self.host}:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """Ignore clients that disconnect."""


class Hub(Server):
    """huggingface.co; models are named `models/OWNER/NAME`. Behaviors: `well`; an HTTP status;
    `hangs`; `slow`, by 0.5 s at first; `login`, a page that is not the hub's; `xet`, whose Xet
    storage fails; `moves`, to another commit after each request for a branch.
    """

    def __init__(
        self,
        repositories: dict[str, Repository],
        behavior: str = "well",
        path_filter: str = "/",
        cdn: str = "",
    ) -> None:
        super().__init__(HubHandler, behavior, path_filter)
        self.repositories = repositories
        self.cdn = Cdn(cdn or "well")


class Cdn(Server):
    """The file storage. Behaviors: `well`; `breaks` off twice; `truncates` always; `hangs`."""

    host = "localhost"  # so that clients see a different host than the hub's

    def __init__(self, behavior: str) -> None:
        super().__init__(CdnHandler, behavior, "/")
        self.blobs: dict[str, bytes] = {}
        self.resumed_downloads = 0  # downloads that started from the middle of a file


class GitHub(Server):
    """raw.githubusercontent.com with one text. Behaviors: `well`; an HTTP status; `breaks`;
    `hangs`.
    """

    path = "/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"

    def __init__(self, text: str, behavior: str = "well") -> None:
        super().__init__(GitHubHandler, behavior, "/")
        self.text = text.encode()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append(f"{self.command} {unquote(self.path)}")
        behavior = self.server.behavior if self.server.path_filter in unquote(self.path) else "well"
        if behavior == "hangs":
            self.server.closing.wait()
            self.close_connection = True
        elif behavior.isdecimal():
            self.respond_error(int(behavior))
        else:
            self.serve(behavior)

    do_HEAD = do_POST = do_GET

    def serve(self, behavior: str) -> None:
        raise NotImplementedError

    def respond_error(
        self, status: int, error_code: str = "", headers: Headers | None = None
    ) -> None:
        code_headers = {"X-Error-Code": error_code} if error_code else {}
        retry_headers = (
            {"RateLimit": '"resolvers";r=0;t=300', "Retry-After": "300"} if status == 429 else {}
        )
        self.respond(
            b'{"error": "no"}', {**code_headers, **retry_headers, **(headers or {})}, status=status
        )

    def respond(
        self,
        content: bytes,
        headers: Headers | None = None,
        *,
        status: int = 200,
        truncate_at: int = -1,
    ) -> None:
        """Send a response, cut off after `truncate_at` bytes unless that is negative."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content if truncate_at < 0 else content[:truncate_at])
            self.close_connection = self.close_connection or truncate_at >= 0

    def log_message(self, *_: object) -> None: ...


class HubHandler(Handler):
    server: Hub

    def respond(self, content: bytes, headers: Headers | None = None, **options: Any) -> None:
        default_headers = {"RateLimit": '"resolvers";r=2999;t=172', "X-Request-Id": "Root=1-0"}
        super().respond(content, {**default_headers, **(headers or {})}, **options)

    def serve(self, behavior: str) -> None:
        self.behavior = behavior
        path = unquote(urlsplit(self.path).path)
        if behavior == "slow" and len(self.server.requests) == 1:
            time.sleep(0.5)
        if behavior == "login" and path != "/login":
            self.respond(b"", {"Location": "/login"}, status=302)
        elif behavior == "login":
            self.respond(b"<html>welcome to our network</html>", {"Content-Type": "text/html"})
        elif path.startswith(("/datasets/", "/api/")) or "/resolve/" in path:
            self.serve_files(*parse_api_path(path))
        else:
            self.respond_error(404)

    def serve_files(self, endpoint: str, repo_id: str, revision: str, path: str) -> None:
        repository = self.server.repositories.get(repo_id)
        if not repository:
            self.respond_error(401)
            return
        if repository.gated and endpoint not in ("", "revision"):
            self.respond_error(401, "GatedRepo")
            return
        commit = repository.find_commit(revision)
        if not commit:
            self.respond_error(404, "RevisionNotFound")
            return
        files = repository.commits[commit]
        if endpoint == "resolve":
            self.serve_resolve(repo_id, commit, files, path)
        elif endpoint == "resolve-cache":
            self.respond(files[path], {"X-Repo-Commit": commit, "ETag": f'"{sha1(files[path])}"'})
        else:
            self.serve_api(endpoint, repo_id, commit, files, path)
        if self.behavior == "moves" and revision in repository.branches:
            n = len(repository.commits)
            new_files = {
                file: to_parquet(f"{file}, row {row}, commit {n}" for row in range(150))
                for file in files
                if file.endswith(".parquet")
            }
            repository.push(revision, {**files, **new_files})

    def serve_resolve(self, repo_id: str, commit: str, files: Files, file: str) -> None:
        headers = {"X-Repo-Commit": commit}
        content = files.get(file)
        if content is None:
            self.respond_error(404, "EntryNotFound", headers)
        elif not file.endswith(LFS_SUFFIXES):
            repo_path = repo_id if repo_id.startswith("models/") else f"datasets/{repo_id}"
            location = f"/api/resolve-cache/{repo_path}/{commit}/{file}?etag=%22{sha1(content)}%22"
            self.respond(b"", {**headers, "Location": location}, status=307)
        else:
            digest, cdn = sha256(content), self.server.cdn
            cdn.blobs[digest] = content
            query = f"Expires={int(time.time()) + 3600}&Signature=abc&Key-Pair-Id=K2"
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{digest}"'}
            if self.behavior == "xet":
                token = f"{self.server.address}/api/datasets/{repo_id}/xet-read-token/{commit}"
                headers |= {"X-Xet-Hash": digest, "Link": f'<{token}>; rel="xet-auth"'}
            location = f"{cdn.address}/xet-bridge-us/{digest}?{query}"
            self.respond(b"", {**headers, "Location": location}, status=302)

    def serve_api(self, endpoint: str, name: str, commit: str, files: Files, folder: str) -> None:
        if endpoint in ("", "revision"):
            blobs = "blobs=true" in self.path.lower()
            siblings = [make_sibling(file, content, blobs=blobs) for file, content in files.items()]
            public_id = name.removeprefix("models/")
            self.respond_json({"id": public_id, "sha": commit, "tags": [], "siblings": siblings})
        elif endpoint == "xet-read-token":
            expires = int(time.time()) + 3600
            cas = self.server.cdn.address
            token = {"X-Xet-Cas-Url": cas, "X-Xet-Access-Token": "t"}
            token["X-Xet-Token-Expiration"] = str(expires)
            self.respond_json({"casUrl": cas, "accessToken": "t", "exp": expires}, token)
        elif endpoint == "paths-info":
            requested_paths = parse_qs(self.body.decode()).get("paths", [])
            self.respond_json(
                [make_tree_entry(file, files[file]) for file in requested_paths if file in files]
            )
        elif endpoint == "tree":
            prefix = f"{folder}/" if folder else ""
            paths = {file for file in files if file.startswith(prefix)}
            folders = {
                file[: n + len(prefix)]
                for file in paths
                for n, char in enumerate(file[len(prefix) :])
                if char == "/"
            }
            if "recursive=true" not in self.path.lower():
                paths = {file for file in paths if "/" not in file.removeprefix(prefix)}
                folders = {name for name in folders if "/" not in name.removeprefix(prefix)}
            if paths or folders:
                tree = [make_tree_entry(file, files[file]) for file in sorted(paths)]
                self.respond_json(tree + [make_tree_entry(name, None) for name in sorted(folders)])
            else:
                self.respond_error(404, "EntryNotFound", {"X-Repo-Commit": commit})
        else:
            self.respond_error(404)

    def respond_json(self, value: object, headers: Headers | None = None) -> None:
        headers = {"Content-Type": "application/json", **(headers or {})}
        self.respond(json.dumps(value).encode(), headers)


def parse_api_path(path: str) -> tuple[str, str, str, str]:
    """Split a URL path into endpoint, repository, revision and file path."""
    parts = path.strip("/").split("/")
    if parts[0] == "datasets":  # datasets/OWNER/NAME/resolve/REVISION/PATH
        name, endpoint, remainder = parts[1:3], parts[3], parts[4:]
    elif parts[0] != "api":  # OWNER/NAME/resolve/REVISION/PATH
        name, endpoint, remainder = ["models", *parts[:2]], parts[2], parts[3:]
    elif parts[1] == "resolve-cache":  # api/resolve-cache/datasets/OWNER/NAME/COMMIT/PATH
        name, endpoint, remainder = parts[3:5], parts[1], parts[5:]
        name = ["models", *name] if parts[2] == "models" else name
    elif parts[1] == "models":  # like the branch below
        name, endpoint, remainder = parts[1:4], *(parts[4:5] or [""]), parts[5:] or ["main"]
    else:  # api/datasets/OWNER/NAME, api/datasets/OWNER/NAME/WHAT/REVISION/PATH
        name, endpoint, remainder = parts[2:4], *(parts[4:5] or [""]), parts[5:] or ["main"]
    revision_parts = PARQUET_BRANCH.count("/") + 1 if remainder[0] == "refs" else 1
    return (
        endpoint,
        "/".join(name),
        "/".join(remainder[:revision_parts]),
        "/".join(remainder[revision_parts:]),
    )


def make_sibling(path: str, content: bytes, *, blobs: bool) -> dict[str, Any]:
    """Describe a file as in the hub's repository info."""
    if not blobs:
        return {"rfilename": path}
    info = {"rfilename": path, "blobId": sha1(content), "size": len(content)}
    if path.endswith(LFS_SUFFIXES):
        return {
            **info,
            "lfs": {"sha256": sha256(content), "size": len(content), "pointerSize": 134},
        }
    return info


def make_tree_entry(path: str, content: bytes | None) -> dict[str, Any]:
    """Describe a file or folder as in the hub's file listing."""
    if content is None:
        return {"type": "directory", "path": path, "size": 0, "oid": "0"}
    info = {"type": "file", "path": path, "size": len(content), "oid": sha1(content)}
    if path.endswith(LFS_SUFFIXES):
        lfs_info = {"oid": sha256(content), "size": len(content), "pointerSize": 132}
        return {**info, "lfs": lfs_info, "xetHash": sha256(content)}
    return info


class CdnHandler(Handler):
    server: Cdn

    def serve(self, behavior: str) -> None:
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        if "/reconstructions/" in url.path:  # the Xet protocol, used only with behavior `xet`
            self.respond_error(500)
            return
        if "Signature" not in query or int(query["Expires"][0]) < time.time():
            self.respond_error(403)
            return
        content = self.server.blobs[url.path.rpartition("/")[2]]
        headers, status, start = {"Accept-Ranges": "bytes"}, 200, 0
        if range_header := self.headers.get("Range"):
            start, status = int(range_header.removeprefix("bytes=").partition("-")[0]), 206
            self.server.resumed_downloads += start > 0
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        truncate_at = -1
        if behavior == "truncates" or (
            behavior == "breaks" and self.server.truncated_responses < 2
        ):
            self.server.truncated_responses += 1
            truncate_at = (len(content) - start) // 2
        self.respond(content[start:], headers, status=status, truncate_at=truncate_at)


class GitHubHandler(Handler):
    server: GitHub

    def serve(self, behavior: str) -> None:
        if urlsplit(self.path).path != self.server.path:  # a proxy receives the full URL
            self.respond_error(404)
            return
        truncate = behavior == "breaks" and self.server.truncated_responses < 1
        self.server.truncated_responses += truncate
        text = self.server.text
        self.respond(text, {"ETag": 'W/"1"'}, truncate_at=len(text) // 2 if truncate else -1)


@contextmanager
def run_servers(*servers: Server) -> Iterator[None]:
    with ExitStack() as stack:
        for server in [*servers, *(hub.cdn for hub in servers if isinstance(hub, Hub))]:
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            stack.callback(server.closing.set)
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield
