"""An HTTP server that answers as the Hugging Face hub does on an upload, for tests that need real sockets."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
from huggingface_hub import ModelCard

TOKEN = "hf_very" + "secret"


class RefusedError(Exception):
    def __init__(self, status, message, **answer):
        self.status, self.answer = status, {"error": message} | answer


class Repository:
    def __init__(self, private):
        self.private, self.files, self.commits = private, {".gitattributes": b""}, ["0" * 40]

    def info(self, name):
        tags = ModelCard(self.files["README.md"].decode()).data.tags if "README.md" in self.files else []
        siblings = [{"rfilename": file} for file in self.files]
        return {"id": name, "sha": self.commits[-1], "private": self.private, "tags": tags, "siblings": siblings}


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories, self.requests, self.stored = {}, [], {}
        self.fault = None  # (part of the path, status)

    def answer(self, method, path, headers, body):
        if self.fault and self.fault[0] in path:
            raise RefusedError(self.fault[1], "out of order")
        if path.startswith("/stored/"):
            self.stored[path.rpartition("/")[2]] = body
            return {}
        if headers["Authorization"] != f"Bearer {TOKEN}":
            raise RefusedError(401, "Invalid username or password.")
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body))
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return {"objects": [self.large(one) for one in json.loads(body)["objects"]]}
        _, _, kind, owner, name, *rest = path.split("/")
        repository = self.repositories.get(f"{owner}/{name}")
        if kind != "models" or repository is None:
            raise RefusedError(404, "Repository not found")
        match method, rest:
            case "GET", [] | ["revision", "main"]:
                return repository.info(f"{owner}/{name}")
            case "POST", ["preupload", "main"]:
                self.require_own(owner)
                return {"files": [self.preupload(repository, file) for file in json.loads(body)["files"]]}
            case "POST", ["commit", "main"]:
                self.require_own(owner)
                return self.commit(repository, f"{owner}/{name}", [json.loads(line) for line in body.splitlines()])
        raise RefusedError(405, f"{method} {path}")

    large_files = False

    def require_own(self, owner):
        if owner != "me":
            raise RefusedError(403, "You don't have the rights to write there")

    def validate(self, asked):
        assert asked["repoType"] == "model"
        try:
            ModelCard(asked["content"])
        except ValueError as error:
            raise RefusedError(400, "invalid", errors=[{"message": str(error)}]) from None
        return {"errors": [], "warnings": []}

    def create(self, asked):
        name = f"{asked['organization']}/{asked['name']}"
        self.require_own(asked["organization"])
        if name in self.repositories:
            raise RefusedError(409, "You already created this model repo", url=f"{self.url}/{name}")
        self.repositories[name] = Repository(asked.get("visibility") == "private" or bool(asked.get("private")))
        return {"url": f"{self.url}/{name}"}

    def preupload(self, repository, file):
        large = self.large_files and file["path"].endswith(".safetensors")
        known = repository.files.get(file["path"])
        oid = None if known is None else hashlib.sha256(known).hexdigest() if large else _git_oid(known)
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    def large(self, asked):
        upload = {"upload": {"href": f"{self.url}/stored/{asked['oid']}"}}
        return {"oid": asked["oid"], "size": asked["size"]} | ({} if asked["oid"] in self.stored else {"actions": upload})

    def commit(self, repository, name, lines):
        (header, *files) = lines
        assert header["key"] == "header"
        for line in files:
            value = line["value"]
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert line["key"] == "lfsFile"
                repository.files[value["path"]] = self.stored[value["oid"]]
        repository.commits.append(hashlib.sha1(str(lines).encode()).hexdigest())
        return {"commitUrl": f"{self.url}/{name}/commit/{repository.commits[-1]}", "commitOid": repository.commits[-1]}


def _git_oid(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        body, path = self.rfile.read(int(self.headers.get("Content-Length") or 0)), urlsplit(self.path).path
        self.server.requests.append((self.command, path))
        try:
            status, answer = 200, self.server.answer(self.command, path, self.headers, body)
        except RefusedError as refused:
            status, answer = refused.status, refused.answer
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_PUT = do_POST = do_GET  # noqa: N815

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub for this process, logged in."""
    server = Hub()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()
