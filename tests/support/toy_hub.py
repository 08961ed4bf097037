"""A stand-in for the Hugging Face hub: repositories of files, served over http on this machine."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class ToyHub:
    """Repositories by name: revision -> commit, and commit -> files.

    Attributes:
        requests: paths that were asked for.
    """

    def __init__(self) -> None:
        self.revisions: dict[str, dict[str, str]] = {}
        self.files: dict[tuple[str, str], Mapping[str, bytes]] = {}
        self.requests: list[str] = []

    def put(self, repository: str, files: Mapping[str, bytes], *, revision: str = "main") -> str:
        """Commits files to a branch, and returns the commit."""
        content = [name.encode() + data for name, data in sorted(files.items())]
        commit = hashlib.sha1(b"".join(content)).hexdigest()
        self.revisions.setdefault(repository, {})[revision] = commit
        self.files[repository, commit] = dict(files)
        return commit

    def commit_of(self, repository: str, revision: str) -> str | None:
        """Returns the commit of a branch, or the commit itself."""
        known = self.revisions.get(repository, {})
        return known.get(revision, revision if (repository, revision) in self.files else None)

    @contextmanager
    def served(self) -> Iterator[str]:
        """Serves the repositories, and yields the endpoint."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.answer(with_body=False)

            def do_GET(self) -> None:
                self.answer(with_body=True)

            def answer(self, *, with_body: bool) -> None:
                path = unquote(urlsplit(self.path).path)
                hub.requests.append(path)
                status, headers, body = hub.respond(path)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if with_body:
                    self.wfile.write(body)

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def respond(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Returns (status, headers, body) for a path of the hub's interface."""
        if "/tree/" in path:
            repository, _, commit = path.removeprefix("/api/models/").partition("/tree/")
            files = self.files[repository, commit]
            tree = [
                {
                    "type": "file",
                    "path": name,
                    "size": len(data),
                    "oid": hashlib.sha1(data).hexdigest(),
                }
                for name, data in files.items()
            ]
            return 200, {"Content-Type": "application/json"}, json.dumps(tree).encode()
        if path.startswith("/api/models/"):
            repository, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            commit = self.commit_of(repository, revision or "main")
            if repository not in self.revisions or commit is None:
                code = "RepoNotFound" if repository not in self.revisions else "RevisionNotFound"
                return 404, {"X-Error-Code": code}, b""
            names = [{"rfilename": name} for name in self.files[repository, commit]]
            values = {"id": repository, "modelId": repository, "sha": commit, "siblings": names}
            return 200, {"Content-Type": "application/json"}, json.dumps(values).encode()
        repository, _, rest = path.lstrip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        commit = self.commit_of(repository, revision)
        content = self.files.get((repository, commit or ""), {}).get(name)
        if content is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        return 200, {"X-Repo-Commit": commit or "", "ETag": etag}, content
