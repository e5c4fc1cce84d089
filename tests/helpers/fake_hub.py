"""The Hugging Face hub, its storage and GitHub, played by servers on the loopback that are laid out
as the real ones: addresses, redirects, headers, errors. Each can be in one of several moods.

How the real ones are, from public uses:
- /resolve/ answers for a small file 307 to /api/resolve-cache/…, for a large one 302 to a signed
  address of a CDN on another host, with X-Linked-Size and X-Linked-ETag, and where Xet stores it
  with X-Xet-Hash and a Link to a token (huggingface_hub's file_download.py; answers printed in
  ngxson/wllama#248, raullenchai/Rapid-MLX#1122, huggingface/swift-transformers#209).
- Each answer has RateLimit, and of a 429 it tells when to come again (hub-docs' rate-limits;
  huggingface_hub 1.2's notes).
- A repository that nobody knows answers 401; so do the files of a gated one, whose description is
  public; a revision or file 404, with X-Error-Code (hf_raise_for_status).
- tiny_shakespeare has a script on main, and on refs/convert/parquet default/SPLIT/0000.parquet;
  TinyStories has data/*.parquet beside text, archives and arrays, and a card without `configs`;
  tinystories-gpt4-clean has one Parquet file at its root (several trainings that fetch them).
- Models have no prefix: /OWNER/NAME/resolve/…, /api/models/OWNER/NAME, with ?blobs=true also sizes
  and, of large files, the sha256 (huggingface_hub#951; answers printed in monatis/clip.cpp#65,
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

CONVERTED = "refs/convert/parquet"
LARGE = (".parquet", ".txt", ".gz", ".npy", ".safetensors")  # kept by the storage, not by git


def parquet(texts: Iterable[object], column: str = "text") -> bytes:
    """A Parquet file of one column."""
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({column: list(texts)}), buffer)
    return buffer.getvalue()


class Repository:
    """A dataset: its branches, and the files of each commit."""

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

    def commit(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)


def sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def shakespeare(text: str) -> dict[str, Repository]:
    """Tiny Shakespeare as it lies on the hub: a script; on another branch a row for each split."""
    script = {"README.md": b"---\nlanguage: en\n---\n", "tiny_shakespeare.py": b"import datasets"}
    rows = {f"default/{name}/0000.parquet": parquet([part]) for name, part in splits(text).items()}
    return {"karpathy/tiny_shakespeare": Repository({"main": script, CONVERTED: rows})}


def splits(text: str) -> dict[str, str]:
    """The first nine tenths of a text, and the two halves of the rest."""
    cut = int(0.9 * len(text))
    end = (cut + len(text)) // 2
    return {"train": text[:cut], "validation": text[cut:end], "test": text[end:]}


class Server(ThreadingHTTPServer):
    """A server in a mood, for addresses that have `at` in them."""

    daemon_threads = True
    host = "127.0.0.1"

    def __init__(self, handler: type[BaseHTTPRequestHandler], mood: str, at: str) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.mood, self.at = mood, at
        self.asked: list[str] = []
        self.broken = 0  # answers that broke off
        self.over = threading.Event()

    @property
    def address(self) -> str:
        return f"http://{self.host}:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """Whoever asked has gone."""


class Hub(Server):
    """huggingface.co. Its models are named `models/OWNER/NAME`. Moods: `well`; a number, which it
    answers; `hangs`; `slow` at first, by half a second; `login`, a page that is not the hub's;
    `xet`, whose own way of storing fails; `moves`, to another commit whenever it was asked for a
    branch.
    """

    def __init__(
        self, repositories: dict[str, Repository], mood: str = "well", at: str = "/", cdn: str = ""
    ) -> None:
        super().__init__(HubHandler, mood, at)
        self.repositories = repositories
        self.cdn = Cdn(cdn or "well")


class Cdn(Server):
    """The storage. Moods: `well`; `breaks` off twice; `truncates` always; `hangs`."""

    host = "localhost"  # to clients another one than the hub's

    def __init__(self, mood: str) -> None:
        super().__init__(CdnHandler, mood, "/")
        self.blobs: dict[str, bytes] = {}
        self.resumed = 0  # files asked for from their middle on


class GitHub(Server):
    """raw.githubusercontent.com, with one text. Moods: `well`; a number; `breaks`; `hangs`."""

    path = "/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"

    def __init__(self, text: str, mood: str = "well") -> None:
        super().__init__(GitHubHandler, mood, "/")
        self.text = text.encode()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append(f"{self.command} {unquote(self.path)}")
        mood = self.server.mood if self.server.at in unquote(self.path) else "well"
        if mood == "hangs":
            self.server.over.wait()
            self.close_connection = True
        elif mood.isdecimal():
            self.refuse(int(mood))
        else:
            self.serve(mood)

    do_HEAD = do_POST = do_GET

    def serve(self, mood: str) -> None:
        raise NotImplementedError

    def refuse(self, status: int, code: str = "", headers: Headers | None = None) -> None:
        named = {"X-Error-Code": code} if code else {}
        wait = {"RateLimit": '"resolvers";r=0;t=300', "Retry-After": "300"} if status == 429 else {}
        self.answer(b'{"error": "no"}', {**named, **wait, **(headers or {})}, status=status)

    def answer(
        self, content: bytes, headers: Headers | None = None, *, status: int = 200, sent: int = -1
    ) -> None:
        """An answer, of which `sent` bytes are sent before it breaks off."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content if sent < 0 else content[:sent])
            self.close_connection = self.close_connection or sent >= 0

    def log_message(self, *_: object) -> None: ...


class HubHandler(Handler):
    server: Hub

    def answer(self, content: bytes, headers: Headers | None = None, **options: Any) -> None:
        limit = {"RateLimit": '"resolvers";r=2999;t=172', "X-Request-Id": "Root=1-0"}
        super().answer(content, {**limit, **(headers or {})}, **options)

    def serve(self, mood: str) -> None:
        self.mood = mood
        path = unquote(urlsplit(self.path).path)
        if mood == "slow" and len(self.server.asked) == 1:
            time.sleep(0.5)
        if mood == "login" and path != "/login":
            self.answer(b"", {"Location": "/login"}, status=302)
        elif mood == "login":
            self.answer(b"<html>welcome to our network</html>", {"Content-Type": "text/html"})
        elif path.startswith(("/datasets/", "/api/")) or "/resolve/" in path:
            self.serve_files(*parsed(path))
        else:
            self.refuse(404)

    def serve_files(self, what: str, name: str, revision: str, path: str) -> None:
        repository = self.server.repositories.get(name)
        if not repository:
            self.refuse(401)
            return
        if repository.gated and what not in ("", "revision"):
            self.refuse(401, "GatedRepo")
            return
        commit = repository.commit(revision)
        if not commit:
            self.refuse(404, "RevisionNotFound")
            return
        files = repository.commits[commit]
        if what == "resolve":
            self.resolve(name, commit, files, path)
        elif what == "resolve-cache":
            self.answer(files[path], {"X-Repo-Commit": commit, "ETag": f'"{sha1(files[path])}"'})
        else:
            self.api(what, name, commit, files, path)
        if self.mood == "moves" and revision in repository.branches:
            n = len(repository.commits)
            moved = {
                file: parquet(f"{file}, row {row}, commit {n}" for row in range(150))
                for file in files
                if file.endswith(".parquet")
            }
            repository.push(revision, {**files, **moved})

    def resolve(self, name: str, commit: str, files: Files, file: str) -> None:
        known = {"X-Repo-Commit": commit}
        content = files.get(file)
        if content is None:
            self.refuse(404, "EntryNotFound", known)
        elif not file.endswith(LARGE):
            where = name if name.startswith("models/") else f"datasets/{name}"
            place = f"/api/resolve-cache/{where}/{commit}/{file}?etag=%22{sha1(content)}%22"
            self.answer(b"", {**known, "Location": place}, status=307)
        else:
            digest, cdn = sha256(content), self.server.cdn
            cdn.blobs[digest] = content
            signed = f"Expires={int(time.time()) + 3600}&Signature=abc&Key-Pair-Id=K2"
            known |= {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{digest}"'}
            if self.mood == "xet":
                token = f"{self.server.address}/api/datasets/{name}/xet-read-token/{commit}"
                known |= {"X-Xet-Hash": digest, "Link": f'<{token}>; rel="xet-auth"'}
            place = f"{cdn.address}/xet-bridge-us/{digest}?{signed}"
            self.answer(b"", {**known, "Location": place}, status=302)

    def api(self, what: str, name: str, commit: str, files: Files, folder: str) -> None:
        if what in ("", "revision"):
            blobs = "blobs=true" in self.path.lower()
            siblings = [sibling(file, content, blobs=blobs) for file, content in files.items()]
            short = name.removeprefix("models/")
            self.json({"id": short, "sha": commit, "tags": [], "siblings": siblings})
        elif what == "xet-read-token":
            expires = int(time.time()) + 3600
            cas = self.server.cdn.address
            token = {"X-Xet-Cas-Url": cas, "X-Xet-Access-Token": "t"}
            token["X-Xet-Token-Expiration"] = str(expires)
            self.json({"casUrl": cas, "accessToken": "t", "exp": expires}, token)
        elif what == "paths-info":
            wanted = parse_qs(self.body.decode()).get("paths", [])
            self.json([entry(file, files[file]) for file in wanted if file in files])
        elif what == "tree":
            prefix = f"{folder}/" if folder else ""
            inside = {file for file in files if file.startswith(prefix)}
            folders = {
                file[: n + len(prefix)]
                for file in inside
                for n, letter in enumerate(file[len(prefix) :])
                if letter == "/"
            }
            if "recursive=true" not in self.path.lower():
                inside = {file for file in inside if "/" not in file.removeprefix(prefix)}
                folders = {name for name in folders if "/" not in name.removeprefix(prefix)}
            if inside or folders:
                tree = [entry(file, files[file]) for file in sorted(inside)]
                self.json(tree + [entry(name, None) for name in sorted(folders)])
            else:
                self.refuse(404, "EntryNotFound", {"X-Repo-Commit": commit})
        else:
            self.refuse(404)

    def json(self, value: object, headers: Headers | None = None) -> None:
        headers = {"Content-Type": "application/json", **(headers or {})}
        self.answer(json.dumps(value).encode(), headers)


def parsed(path: str) -> tuple[str, str, str, str]:
    """What is asked for, and the repository, revision and path that it is asked of."""
    parts = path.strip("/").split("/")
    if parts[0] == "datasets":  # datasets/OWNER/NAME/resolve/REVISION/PATH
        name, what, rest = parts[1:3], parts[3], parts[4:]
    elif parts[0] != "api":  # OWNER/NAME/resolve/REVISION/PATH
        name, what, rest = ["models", *parts[:2]], parts[2], parts[3:]
    elif parts[1] == "resolve-cache":  # api/resolve-cache/datasets/OWNER/NAME/COMMIT/PATH
        name, what, rest = parts[3:5], parts[1], parts[5:]
        name = ["models", *name] if parts[2] == "models" else name
    elif parts[1] == "models":  # as the next
        name, what, rest = parts[1:4], *(parts[4:5] or [""]), parts[5:] or ["main"]
    else:  # api/datasets/OWNER/NAME, api/datasets/OWNER/NAME/WHAT/REVISION/PATH
        name, what, rest = parts[2:4], *(parts[4:5] or [""]), parts[5:] or ["main"]
    slashes = CONVERTED.count("/") + 1 if rest[0] == "refs" else 1
    return what, "/".join(name), "/".join(rest[:slashes]), "/".join(rest[slashes:])


def sibling(path: str, content: bytes, *, blobs: bool) -> dict[str, Any]:
    """A file as the hub tells of it with its repository."""
    if not blobs:
        return {"rfilename": path}
    told = {"rfilename": path, "blobId": sha1(content), "size": len(content)}
    if path.endswith(LARGE):
        return {
            **told,
            "lfs": {"sha256": sha256(content), "size": len(content), "pointerSize": 134},
        }
    return told


def entry(path: str, content: bytes | None) -> dict[str, Any]:
    """A file, or a folder, as the hub lists it."""
    if content is None:
        return {"type": "directory", "path": path, "size": 0, "oid": "0"}
    listed = {"type": "file", "path": path, "size": len(content), "oid": sha1(content)}
    if path.endswith(LARGE):
        stored = {"oid": sha256(content), "size": len(content), "pointerSize": 132}
        return {**listed, "lfs": stored, "xetHash": sha256(content)}
    return listed


class CdnHandler(Handler):
    server: Cdn

    def serve(self, mood: str) -> None:
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        if "/reconstructions/" in url.path:  # Xet's own way, which only the mood `xet` leads to
            self.refuse(500)
            return
        if "Signature" not in query or int(query["Expires"][0]) < time.time():
            self.refuse(403)
            return
        content = self.server.blobs[url.path.rpartition("/")[2]]
        headers, status, start = {"Accept-Ranges": "bytes"}, 200, 0
        if wanted := self.headers.get("Range"):
            start, status = int(wanted.removeprefix("bytes=").partition("-")[0]), 206
            self.server.resumed += start > 0
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        sent = -1
        if mood == "truncates" or (mood == "breaks" and self.server.broken < 2):
            self.server.broken += 1
            sent = (len(content) - start) // 2
        self.answer(content[start:], headers, status=status, sent=sent)


class GitHubHandler(Handler):
    server: GitHub

    def serve(self, mood: str) -> None:
        if urlsplit(self.path).path != self.server.path:  # a proxy is asked for the whole address
            self.refuse(404)
            return
        breaks = mood == "breaks" and self.server.broken < 1
        self.server.broken += breaks
        text = self.server.text
        self.answer(text, {"ETag": 'W/"1"'}, sent=len(text) // 2 if breaks else -1)


@contextmanager
def running(*servers: Server) -> Iterator[None]:
    with ExitStack() as stack:
        for server in [*servers, *(hub.cdn for hub in servers if isinstance(hub, Hub))]:
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            stack.callback(server.over.set)
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield
