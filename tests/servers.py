"""A server that runs in a thread, for tests that need real sockets."""

import contextlib
import http.client
import threading
import time
from urllib.parse import urlsplit

import uvicorn

from anysplade.serving.app import create_app
from anysplade.serving.batching import Searcher


@contextlib.contextmanager
def running(index, beside=None, **options):
    """The address of a server over an index."""
    app = create_app(Searcher(index, beside), **options)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=30)
    assert not thread.is_alive()


def http_get(address, path):
    """Status and body of a GET request."""
    place = urlsplit(address)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=30)
    connection.request("GET", path)
    response = connection.getresponse()
    return response.status, response.read()
