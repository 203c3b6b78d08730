"""A Hub on this machine for the true client: what huggingface_hub asks of https://huggingface.co, on a loopback address.

It knows repositories of models and datasets with commits and branches, large files stored apart and served from another
origin, ranges of files, tokens, and the checks that the Hub makes of a card's metadata. Faults are set on `Hub`.
"""

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_loopback"
LARGE = (".safetensors", ".data", ".onnx", ".pt2", ".png", ".parquet")
LICENSES = {"mit", "apache-2.0", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc0-1.0", "openrail", "other", "unknown"}
TASKS = {"image-classification", "image-feature-extraction", "image-segmentation", "object-detection"}


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class File:
    data: bytes
    sha256: str | None = None  # of one that is stored apart

    @property
    def oid(self) -> str:
        return git_hash(self.data)


@dataclass
class Repo:
    private: bool
    branches: dict[str, str]
    commits: dict[str, dict[str, File]]  # files by path, of every commit
    log: list[str] = field(default_factory=list)  # titles, oldest first
    gated: bool | str = False  # "auto" or "manual": who asks for access is known and has agreed to something

    def commit_of(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)


class Hub:
    """
    Attributes:
        repos: by name; those of datasets begin with `datasets/`.
        may_write: whether the token may.
        breaks: how often the connection is cut in the middle of a large file that is sent.
        faults: (part of a path, fault, how often), of requests that read; the first that fits comes true. A fault is the status
            of an answer, or "cut" for a connection that breaks in the middle of the content, "short" for an answer with fewer
            bytes than asked for, "whole" for one with other bytes, and "noise" for bytes of another content.
        after: number of answers to reading requests of large files before the faults begin.
        retry_after: seconds, as 429 and 503 say.
        open: while it is clear, large files that are sent wait.
        requests: (method, path) of all so far.
        ranges: of the requests for large files, as they were sent; None for one of a whole file.
    """

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.ranges: list[str | None] = []
        self.may_write = True
        self.breaks = 0
        self.faults: list[list] = []
        self.after = 0
        self.retry_after: int | None = None
        self.open = threading.Event()
        self.open.set()
        self.lock = threading.RLock()
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def create(self, name: str, private: bool = False) -> Repo:
        first = hashlib.sha1(name.encode()).hexdigest()
        self.repos[name] = Repo(private, {"main": first}, {first: {".gitattributes": File(b"")}})
        return self.repos[name]

    def create_dataset(self, name: str, files: dict[str, bytes]) -> Repo:
        """A repository of a dataset with one commit, whose files are all stored apart but for its card."""
        repo = self.create(f"datasets/{name}")
        self._store(repo, repo.branches["main"], files)
        return repo

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[name]
        return {path: file.data for path, file in repo.commits[repo.branches[revision]].items()}

    def fault(self, path: str) -> str | int | None:
        """What is to go wrong with this request."""
        for fault in self.faults:
            if fault[0] in path and fault[2] > 0 and self.after <= 0:
                fault[2] -= 1
                return fault[1]
        return None

    def push(self, name: str, files: dict[str, bytes]) -> str:
        """Give a dataset a new commit with these files instead of all."""
        repo = self.repos[f"datasets/{name}"]
        commit = hashlib.sha1(f"{name} {len(repo.commits)}".encode()).hexdigest()
        repo.commits[commit], repo.branches["main"] = {}, commit
        self._store(repo, commit, files)
        return commit

    def _store(self, repo: Repo, commit: str, files: dict[str, bytes]) -> None:
        for path, data in files.items():
            sha256 = None if path == "README.md" else hashlib.sha256(data).hexdigest()
            repo.commits[commit][path] = File(data, sha256)
            self.large |= {sha256: data} if sha256 else {}

    def close(self) -> None:
        self.open.set()
        self.server.shutdown()
        self.server.server_close()


def environment(hub: Hub, folder: Path, token: str | None = None) -> dict[str, str]:
    """Of a process that takes it for the true Hub, with a cache in `folder`."""
    env = {key: value for key, value in os.environ.items() if key != "HF_TOKEN"}
    env |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder), "OMP_NUM_THREADS": "1"}
    return env | {"TRANSFORMERS_VERBOSITY": "error"} | ({"HF_TOKEN": token} if token else {})


def metadata_errors(card: str, kind: str = "model") -> list[str]:
    """What the Hub says of a card's metadata (its model-index schema and known names)."""
    if not card.startswith("---\n"):
        return ["the card has no metadata"]
    data = yaml.safe_load(re.split(r"^---$", card, flags=re.M)[1])
    errors = [] if data.get("license") in LICENSES else [f"license {data.get('license')!r} is not known"]
    if kind == "dataset":
        if not set(data.get("task_categories", [])) <= TASKS:
            errors.append(f"task_categories {data['task_categories']!r} are not known")
    elif data.get("pipeline_tag") not in TASKS:
        errors.append(f"pipeline_tag {data.get('pipeline_tag')!r} is not known")
    for key in ("tags", "datasets", "metrics"):
        if not all(isinstance(entry, str) for entry in data.get(key, [])):
            errors.append(f"{key} must be strings")
    for model in data.get("model-index", []):
        if not model.get("name"):
            errors.append("model-index[].name is required")
        for result in model["results"]:
            if not {"type"} <= result["task"].keys() or not {"type", "name"} <= result["dataset"].keys():
                errors.append("a result needs task.type, dataset.type and dataset.name")
            if not result["metrics"] or not all({"type", "value"} <= metric.keys() for metric in result["metrics"]):
                errors.append("a result needs metrics with type and value")
    return errors


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def handle_one(self):
        path = unquote(urlsplit(self.path).path).strip("/").split("/")
        if self.command == "PUT" and self.hub.breaks > 0:
            self.hub.breaks -= 1
            self.rfile.read(1024)
            self.connection.close()
            self.close_connection = True
            return
        body = self.read_body()
        if self.command == "PUT":
            self.hub.open.wait()
        with self.hub.lock:
            self.hub.requests.append((self.command, "/".join(path)))
            self.fault = self.hub.fault("/".join(path)) if self.command in ("GET", "HEAD") else None
            if isinstance(self.fault, int):
                self.fail(self.fault)
            elif path[0] == "_large":
                self.large_file(path[1], body)
            elif path[:2] == ["api", "models"]:
                self.repository("/".join(path[2:4]), path[4:], body)
            elif path[:2] == ["api", "datasets"]:
                self.repository("/".join(path[1:4]), path[4:], body)
            elif path[0] == "api":
                self.general(path[1:], body)
            elif any(part.endswith(".git") for part in path[:3]):
                self.batch(body)
            elif path[0] == "datasets":
                self.resolve("/".join(path[:3]), path[4], "/".join(path[5:]))
            else:
                self.resolve("/".join(path[:2]), path[3], "/".join(path[4:]))

    do_GET = do_HEAD = do_POST = do_PUT = handle_one  # noqa: N815  (http.server names them)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while length := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(length))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def answer(self, status: int, payload=b"", headers: dict[str, str] | None = None, length: int | None = None):
        data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str, message: str = "", **headers: str):
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.answer(
            status, {"error": message or code}, {"X-Error-Code": code, "X-Error-Message": message or code, **headers}
        )

    def fail(self, status: int):
        if status == 404:
            self.refuse(404, "EntryNotFound", "Entry not found")
        else:
            wait = {} if self.hub.retry_after is None else {"Retry-After": str(self.hub.retry_after)}
            self.answer(status, {"error": "later"}, wait)

    @property
    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def may_write(self) -> bool:
        if not self.known:
            self.refuse(401, "Unauthorized", "Invalid username or password.")
        elif not self.hub.may_write:
            self.refuse(403, "Forbidden", "This token has no right to write here.")
        return self.known and self.hub.may_write

    def visible(self, name: str) -> Repo | None:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self.known):
            self.refuse(404 if self.known else 401, "RepoNotFound", "Repository not found")
            return None
        return repo

    def general(self, path: list[str], body: bytes):
        if path == ["repos", "create"]:
            if not self.may_write():
                return
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
            place = f"datasets/{name}" if wanted.get("type") == "dataset" else name
            answer = {"url": f"{self.hub.url}/{place}", "name": name, "id": name}
            if place in self.hub.repos:
                self.answer(409, answer | {"error": "You already created this model repo"})
            else:
                self.hub.create(place, wanted.get("visibility") == "private")
                self.answer(200, answer)
        elif path == ["validate-yaml"]:
            card = json.loads(body)
            errors = [
                {"message": message} for message in metadata_errors(card["content"], card.get("repoType") or "model")
            ]
            self.answer(400 if errors else 200, {"errors": errors, "warnings": []})
        elif path == ["whoami-v2"] and self.known:
            self.answer(200, {"name": "tester", "type": "user", "orgs": [{"name": "org"}], "auth": {}})
        else:
            self.refuse(401 if path == ["whoami-v2"] else 404, "NotFound")

    def repository(self, name: str, path: list[str], body: bytes):
        verb, revision = path[:2] + ["revision", "main"][len(path[:2]) :]
        repo = self.visible(name)
        if repo is None:
            return
        if verb == "branch":
            if self.may_write():
                taken = revision in repo.branches
                repo.branches.setdefault(revision, repo.branches["main"])
                self.answer(409 if taken else 200, {"error": "Reference already exists"} if taken else {})
            return
        commit = repo.commit_of(revision)
        if commit is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        files = repo.commits[commit]
        if verb == "revision":
            siblings = [{"rfilename": path} for path in sorted(files)]
            about = {
                "lastModified": "2026-01-01T00:00:00.000Z",
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "gated": repo.gated,
            }
            short = name.removeprefix("datasets/")
            about |= {"id": short, "modelId": short, "sha": commit, "private": repo.private, "siblings": siblings}
            self.answer(200, about)
        elif verb == "tree":
            self.tree(files, "/".join(path[2:]))
        elif verb == "paths-info":
            asked = parse_qs(body.decode())["paths"]
            self.answer(200, [entry for entry in self.entries(files) if entry["path"] in asked])
        elif verb == "preupload" and self.may_write():
            asked = json.loads(body)["files"]
            modes = [(file["path"], "lfs" if file["path"].endswith(LARGE) else "regular") for file in asked]
            there = {path: file.sha256 or file.oid for path, file in files.items()}
            about_files = [
                {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": there.get(path)}
                for path, mode in modes
            ]
            self.answer(200, {"files": about_files})
        elif verb == "commit" and self.may_write():
            self.commit(name, commit, revision, body)

    def entries(self, files: dict[str, File]) -> list[dict]:
        folders = {str(folder) for path in files for folder in PurePosixPath(path).parents} - {"."}
        entries = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]
        for path, file in sorted(files.items()):
            entry = {"type": "file", "path": path, "oid": file.oid, "size": len(file.data)}
            if file.sha256:
                entry["lfs"] = {"oid": file.sha256, "size": len(file.data), "pointerSize": 130}
            entries.append(entry)
        return entries

    def tree(self, files: dict[str, File], folder: str):
        below = [entry for entry in self.entries(files) if entry["path"].startswith(f"{folder}/" if folder else "")]
        if "recursive=true" not in self.path.lower():
            below = [entry for entry in below if "/" not in entry["path"][len(folder) :].strip("/")]
        if below or not folder:
            self.answer(200, below)
        else:
            self.refuse(404, "EntryNotFound")

    def batch(self, body: bytes):
        if not self.may_write():
            return
        objects = []
        for wanted in json.loads(body)["objects"]:
            action = (
                {}
                if wanted["oid"] in self.hub.large
                else {"upload": {"href": f"{self.hub.url}/_large/{wanted['oid']}"}}
            )
            objects.append({"oid": wanted["oid"], "size": wanted["size"]} | ({"actions": action} if action else {}))
        self.answer(200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"})

    def large_file(self, sha256: str, body: bytes):
        if self.command == "PUT":
            if hashlib.sha256(body).hexdigest() != sha256:
                self.refuse(400, "BadRequest", "another checksum")
                return
            self.hub.large[sha256] = body
            self.answer(200)
        else:
            if self.command == "GET":
                self.hub.ranges.append(self.headers.get("Range"))
            self.blob(self.hub.large[sha256], {"ETag": f'"{sha256}"'})

    def blob(self, data: bytes, headers: dict[str, str]):
        if self.command == "GET" and "Range" in self.headers:
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            part = data[int(first) : int(last or len(data) - 1) + 1]
            self.hub.after -= 1
            if self.fault == "whole":
                self.answer(200, data, headers)
                return
            if self.fault == "short":
                part = part[: len(part) // 2]
            if self.fault == "noise":
                part = bytes(len(part))
            place = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
            if self.fault == "cut":
                self.answer(206, part[: len(part) // 2], headers | {"Content-Range": place}, length=len(part))
                self.close_connection = True
            else:
                self.answer(206, part, headers | {"Content-Range": place})
            return
        self.answer(200, b"" if self.command == "HEAD" else data, headers, length=len(data))

    def resolve(self, name: str, revision: str, path: str):
        repo = self.visible(name)
        if repo is None:
            return
        commit = repo.commit_of(revision)
        if commit is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        file = repo.commits[commit].get(path)
        if file is None:
            self.refuse(404, "EntryNotFound", "Entry not found", X_Repo_Commit=commit)
        elif file.sha256:  # from another origin, as the true Hub's: a token must not follow
            place = f"{self.hub.url.replace('127.0.0.1', 'localhost')}/_large/{file.sha256}"
            linked = {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.data)), "Location": place}
            self.answer(302, b"", {"X-Repo-Commit": commit} | linked)
        else:
            self.blob(file.data, {"X-Repo-Commit": commit, "ETag": f'"{file.oid}"'})

    def commit(self, name: str, parent: str, branch: str, body: bytes):
        repo = self.hub.repos[name]
        files, title = dict(repo.commits[parent]), ""
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                title = value["summary"]
            elif operation["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]))
            elif operation["key"] == "lfsFile":
                files[value["path"]] = File(self.hub.large[value["oid"]], value["oid"])
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        state = json.dumps([parent, title, sorted((path, file.oid) for path, file in files.items())])
        commit = hashlib.sha1(state.encode()).hexdigest()
        repo.commits[commit], repo.branches[branch] = files, commit
        repo.log.append(title)
        address = f"{self.hub.url}/{name}/commit/{commit}"
        self.answer(200, {"commitUrl": address, "commitOid": commit, "success": True})
