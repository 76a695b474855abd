import asyncio
import concurrent.futures
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

from starlette.testclient import TestClient

from anysplade import Index
from anysplade.cli import main
from anysplade.errors import AnyspladeError
from anysplade.serving import app
from anysplade.serving.app import create_app
from anysplade.serving.batching import Searcher
from servers import http_get, running

TOKEN = "a-token-of-some-length"


def test_an_internal_error_is_only_in_the_log(client, monkeypatch, caplog):
    def fail(*_, **__):
        raise AnyspladeError("/a/folder: the disk is full")

    monkeypatch.setattr(Index, "search_vector", fail)
    response = client.post("/search", json={"query": "kabel"})
    assert (response.status_code, response.json()) == (500, {"error": "the server failed; its log has the reason"})
    assert "/search: /a/folder: the disk is full" in caplog.text


def test_every_response_has_the_security_headers(client):
    for path in ("/", "/health", "/static/page.js", "/nowhere", "/head.svg"):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
    text = client.get("/?q=kabel").text
    assert not re.search(r"\son\w+=|<style|style=|javascript:|https?://", text)


def test_other_host_names_are_refused(folder):
    with TestClient(create_app(Searcher(folder)), base_url="http://evil.example") as client:
        refused = client.get("/health")
        assert (refused.status_code, "evil.example" in refused.json()["error"]) == (400, True)
    for name in ("localhost:8080", "127.0.0.1", "[::1]:8080"):
        with TestClient(create_app(Searcher(folder)), base_url=f"http://{name}") as client:
            assert client.get("/health").status_code == 200


def test_a_token_is_required(folder):
    with TestClient(create_app(Searcher(folder), TOKEN, None), base_url="https://search.example") as client:
        assert client.get("/health").status_code == 401
        assert client.get("/metrics").status_code == 401
        assert client.get("/nowhere").status_code == 401
        for given in ("Bearer wrong", f"Basic {TOKEN}", "Bearer ", f"Bearer {TOKEN}x", "Bearer é"):
            assert client.get("/health", headers=[(b"authorization", given.encode())]).status_code == 401
        assert client.get("/health", headers={"authorization": f"Bearer {TOKEN}"}).json()["status"] == "ok"
        page = client.get("/", headers={"accept": "text/html"})
        assert page.url.path == "/login"
        assert "needs a token" in page.text
        assert client.post("/login", data={"token": "wrong"}).status_code == 401
        assert client.post("/login", data={"token": TOKEN}).url.path == "/"
        cookie = next(iter(client.cookies.jar))
        assert cookie.secure
        assert cookie.has_nonstandard_attr("HttpOnly")
        assert client.get("/?q=kabel").status_code == 200
        description = client.get("/openapi.json").json()
        assert description["security"] == [{"token": []}]
        assert "401" in description["paths"]["/health"]["get"]["responses"]


def start(folder, *more):
    code = "import sys; from anysplade.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = [sys.executable, "-c", code, "serve", str(folder), "--port", "0", *more]
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    for line in process.stderr:
        match = re.search(r"at (http://\S+)", line)
        if match:
            return process, match[1]
    raise AssertionError(process.wait())


def test_the_command_serves_until_it_is_stopped(folder):
    process, address = start(folder, "--json")
    assert http_get(address, "/health")[0] == 200
    assert main(["serve", str(folder), "--port", str(urlsplit(address).port)]) == 2
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert json.loads(out) == {"index": str(folder), "address": address, "requests": 1}


def test_running_requests_are_answered_before_the_server_stops(folder, monkeypatch):
    work = Searcher._run_batch

    def slow(self, jobs):
        time.sleep(0.5)
        return work(self, jobs)

    monkeypatch.setattr(Searcher, "_run_batch", slow)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with running(folder) as address:
            pending = pool.submit(http_get, address, "/?q=kabel")
            time.sleep(0.2)
        assert pending.result()[0] == 200


def test_a_request_that_is_cancelled_when_the_server_stops_gets_503(folder, monkeypatch):
    reached, go, work, sent = threading.Event(), threading.Event(), Searcher._run_batch, []
    monkeypatch.setattr(Searcher, "_run_batch", lambda self, jobs: (reached.set(), go.wait(60), work(self, jobs))[2])

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    async def stopped():
        searcher = Searcher(folder)
        app = create_app(searcher, hosts=None)
        searcher.start()
        scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"q=kabel", "headers": [], "http_version": "1.1"}
        pending = asyncio.create_task(app(scope, receive, send))
        await asyncio.to_thread(reached.wait, 30)
        pending.cancel()
        await pending
        go.set()
        await searcher.stop()

    asyncio.run(stopped())
    assert sent[0]["status"] == 503
    assert json.loads(sent[1]["body"]) == {"error": "the server is stopping"}


def test_wrong_options_of_the_command(folder, tmp_path, capsys):
    for arguments, message in (
        ([str(tmp_path)], "no index there"),
        ([str(folder), "--host", "0.0.0.0"], "set a token"),
        ([str(folder), "--host", "0.0.0.0", "--token", "short"], "at least 16"),
        ([str(folder), "--host", "no.such.name.invalid", "--token", TOKEN], "host no.such.name.invalid, port 8080: "),
        ([str(folder), "--host", "label" * 20, "--token", TOKEN], "choose another port (0 to 65535) or host"),
        ([str(folder), "--host", "a..b", "--token", TOKEN], "choose another port (0 to 65535) or host"),
        ([str(folder), "--host", "::1%none", "--token", TOKEN], "choose another port (0 to 65535) or host"),
        *(
            ([str(folder), "--port", port], f"host 127.0.0.1, port {port}: ")
            for port in ("65536", "99999", "-1", "99999999999999999999")
        ),
    ):
        assert main(["serve", *arguments]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert message in lines[-1]


def test_no_pickle_anywhere():
    sources = "\n".join(path.read_text() for path in Path(app.__file__).parent.rglob("*.py"))
    assert not re.search(r"import pickle|allow_pickle=True|pickle\.load", sources)
    assert "weights_only=False" not in sources
