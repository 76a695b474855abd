"""No command writes, prints or logs a password or a token that it was given."""

import http.client
import os
import shutil
import signal
import subprocess
import sys
from urllib.parse import urlsplit

import pytest

from anysplade._common.provenance import provenance
from anysplade.cli import main
from opensearch_server import Server

CANARY = "canary-of-some-length"
SMALL = "steps: 2\nbatch_size: 4\nmax_length: 16\n"


@pytest.fixture
def call(monkeypatch, capfd, caplog):
    """Run a command as if it had been typed; what it said."""
    caplog.set_level("DEBUG")

    def run(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["anysplade", *map(str, arguments), "--token", CANARY, f"https://me:{CANARY}@host/x"])
        assert main([str(argument) for argument in arguments]) == code
        return "".join(capfd.readouterr()) + caplog.text

    return run


def written(folder):
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_files_of_every_command(call, backbone, collection_folder, tmp_path):
    (tmp_path / "small.yaml").write_text(SMALL)
    options = ["--steps", 2, "--batch-size", 4, "--max-length", 16]
    said = call("train", backbone, collection_folder, "--out", tmp_path / "run", *options)
    said += call("index", backbone, collection_folder, "--out", tmp_path / "index")
    said += call("evaluate", backbone, collection_folder, "--metrics", "RR@10", "--out", tmp_path / "scores")
    said += call("mine", collection_folder, "--out", tmp_path / "mined.jsonl", "--negatives", 2)
    study = ["--backbones", backbone, "--data", collection_folder, "--collections", collection_folder, "--seeds", 1]
    said += call("study", "norm", "--out", tmp_path / "study", *study, "--training", tmp_path / "small.yaml", "--workers", 1)
    files = written(tmp_path)
    assert CANARY not in said
    assert CANARY.encode() not in files
    assert files.count(b"--token ... https://...@host/x") >= 6


@pytest.mark.parametrize("password", [CANARY, f"{CANARY}%40%2F", f"{CANARY}@x"])
def test_an_index_on_a_server(password, call, serve, backbone, collection_folder, monkeypatch, tmp_path):
    monkeypatch.setenv("ANYSPLADE_CACHE", str(tmp_path))
    server = serve(Server())
    address = f"opensearch://me:{password}@127.0.0.1:{server.server_port}/docs"
    shown = f"opensearch://...@127.0.0.1:{server.server_port}/docs"
    said = call("index", backbone, collection_folder, "--to", address)
    assert f"40 documents (40 sent now), at {shown}" in said
    assert f"next: anysplade search {shown}" in said
    said += call("index", backbone, collection_folder, "--to", address, "--json")
    said += call("search", address, "kabel")
    said += call("search", f"{address}-not-there", "kabel", code=2)
    server.faults = [("_search", 401)]
    said += call("search", address, "kabel", code=1)
    assert "give a user and password" in said
    assert CANARY not in said
    assert CANARY.encode() not in written(tmp_path)
    assert CANARY not in repr(server.indices["docs"].mappings)


def test_a_server_that_is_not_there_is_one_line(backbone, collection_folder, capfd):
    assert main(["index", backbone, str(collection_folder), "--to", f"opensearch://me:{CANARY}@127.0.0.1:9/docs"]) == 1
    said = capfd.readouterr()
    assert "check its address" in said.err
    assert "Traceback" not in said.err
    assert CANARY not in said.out + said.err


def test_the_server_logs_no_token(static_index, tmp_path):
    shutil.copytree(static_index, tmp_path / "index")
    code = "import sys; from anysplade.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "serve", str(tmp_path / "index"), "--port", "0", "--token", CANARY]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    lines = []
    for line in process.stderr:
        lines.append(line)
        if " at http://" in line:
            break
    place = urlsplit(lines[-1].split(" at ")[1].split()[0])
    for method, path, body, headers in (
        ("POST", "/login", f"token={CANARY}", {}),
        ("POST", "/login", f"token={CANARY}-wrong", {}),
        ("GET", "/health", None, {"Authorization": f"Bearer {CANARY}"}),
        ("GET", f"/?token={CANARY}", None, {"Cookie": f"anysplade-token={CANARY}"}),
        ("GET", f"/{CANARY}", None, {"Cookie": f"anysplade-token={CANARY}"}),
        ("GET", "/health", None, {"Cookie": f"anysplade-token={CANARY}", "Content-Length": "x"}),
    ):
        connection = http.client.HTTPConnection(place.hostname, place.port, timeout=30)
        connection.request(method, path, body, headers)
        connection.getresponse().read()
        connection.close()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert CANARY not in "".join(lines) + out + err
    assert CANARY.encode() not in written(tmp_path)


@pytest.mark.parametrize(
    "arguments, command",
    [
        (["--out", "a b", "--query-prompt=query: "], "--out 'a b' --query-prompt='query: '"),
        (["--out", "it's", "a=b c", "=", "a b=c"], """--out 'it'"'"'s' a='b c' = 'a b=c'"""),
        (["--token=x y", "z"], "--token=... z"),
        (["--token", "x y", "z"], "--token ... z"),
        (["--token", "x'y \"z", "z"], "--token ... z"),
        (["HF_TOKEN=x y", "z"], "HF_TOKEN=... z"),
        (["opensearch://me:x y@host/docs", "z"], "'opensearch://...@host/docs' z"),
        (["--to=opensearch://me:x y@host/docs", "z"], "--to='opensearch://...@host/docs' z"),
        (["--to", "opensearch://me:x'y@host/docs", "z"], "--to 'opensearch://...@host/docs' z"),
    ],
)
def test_the_command_is_whole_but_for_credentials(arguments, command, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/anysplade", "train", *arguments])
    assert provenance()["command"] == f"anysplade train {command}"
