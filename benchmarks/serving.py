"""Load on a server over loopback: latency for several numbers of clients, batching, overload, and memory under a long load.

Starts `anysplade serve INDEX` and sends POST /search from the threads of another process. Each thread keeps one connection and
sends one request at a time.
"""

import http.client
import json
import multiprocessing
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from anysplade import Index
from harness import finish, memory, parser


def send_requests(port: int, queries: list[str], seconds: float, clients: int) -> list[tuple[float, int]]:
    """Send requests from several clients for some seconds; returns the seconds and the status of each answer."""
    answers: list[tuple[float, int]] = []
    end = time.perf_counter() + seconds

    def client(seed: int) -> None:
        generator = random.Random(seed)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        while time.perf_counter() < end:
            body = json.dumps({"query": generator.choice(queries), "k": 10})
            start = time.perf_counter()
            connection.request("POST", "/search", body, {"content-type": "application/json"})
            response = connection.getresponse()
            response.read()
            answers.append((time.perf_counter() - start, response.status))

    with ThreadPoolExecutor(clients) as threads:
        list(threads.map(client, range(clients, 2 * clients)))
    return answers


def load(port: int, queries: list[str], seconds: float, clients: int) -> dict[str, Any]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        answers = process.submit(send_requests, port, queries, seconds, clients).result()
    latencies = sorted(seconds for seconds, _ in answers)
    statuses = Counter(status for _, status in answers)
    return {
        "clients": clients,
        "requests": len(latencies),
        "queries_per_second": len(latencies) / seconds,
        "p50_ms": 1000 * latencies[len(latencies) // 2],
        "p99_ms": 1000 * latencies[int(0.99 * len(latencies))],
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
    }


def soak(pid: int, port: int, queries: list[str], seconds: float) -> list[float]:
    """Resident memory of the server in MiB, ten samples, under the load of eight clients."""
    samples: list[float] = []
    for _ in range(10):
        load(port, queries, seconds / 10, 8)
        samples.append(round(memory("VmRSS", pid) / 2**20, 1))
    return samples


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--index", type=Path, required=True)
    arguments.add_argument("--seconds", type=float, default=15, help="length of a round")
    arguments.add_argument("--soak", type=float, default=0, help="length of the soak in seconds; 0 for none")
    options = arguments.parse_args()
    with Index.load(options.index) as index:
        texts = [document.content.full_text.split() for document in index.store]
        generator = random.Random(0)
        queries = [" ".join(generator.choices(words, k=5)) for words in texts if len(words) > 5][:2000]
        encoding = []
        for query in [*queries[:20], *queries[:300]]:
            start = time.perf_counter()
            index.queries.encode([query])
            encoding.append(1000 * (time.perf_counter() - start))
    encoding_ms = statistics.median(encoding[20:])
    code = "import sys; from anysplade.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "serve", str(options.index), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        port = next(int(match[1]) for line in process.stderr if (match := re.search(r"127\.0\.0\.1:(\d+)", line)))
        load(port, queries, 3, 1)
        rounds: dict[str, list[dict[str, Any]]] = {"1": [], "8": [], "64": []}
        for _ in range(options.rounds):
            for clients, results in rounds.items():
                results.append(load(port, queries, options.seconds, int(clients)))
        medians = {
            clients: sorted(results, key=lambda result: result["queries_per_second"])[len(results) // 2]
            for clients, results in rounds.items()
        }
        overload = load(port, queries, options.seconds, 600)
        after = load(port, queries, 3, 1)
        finish(
            "serving",
            options,
            {
                "documents": len(texts),
                "encoding_ms": encoding_ms,
                "load": medians,
                "p50_over_encoding_ms": medians["1"]["p50_ms"] - encoding_ms,
                "eight_over_one": medians["8"]["queries_per_second"] / medians["1"]["queries_per_second"],
                "overload": overload,
                "after_overload": after,
                "soak_mib": soak(process.pid, port, queries, options.soak) if options.soak else None,
            },
        )
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
