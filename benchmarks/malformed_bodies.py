"""Bodies of 16 MB that cannot be served, one after the other, and what small requests beside them feel of it.

    python -m benchmarks.malformed_bodies

For each shape: what was answered, the seconds of processor that the API process took for one, and how long a small request of the same
process, which the engine has no part in, took alone and beside.
"""

from __future__ import annotations

import http.client
import json
import threading
import time

import psutil

from lockstep.testing.server import running_server

BYTES = (16 << 20) - 256  # of a body: all that --max-body-bytes lets in
TIMES = 3
PAUSE_S = 0.005
ALONE_S = 3.0


def shapes() -> dict[str, tuple[str, bytes]]:
    """name -> (route, body)."""

    def filled(begin: bytes, one: bytes, end: bytes, most: int = BYTES) -> bytes:
        return begin + one * ((most - len(begin) - len(end)) // len(one)) + end

    names = b",".join(b'"%07d":1' % i for i in range(BYTES // 12))
    return {
        "token ids": ("/v1/completions", filled(b'{"max_tokens":1,"prompt":[', b"1,", b"1]}")),
        "token ids, just within the bound": ("/v1/completions", filled(b'{"prompt":[', b"12345,", b"1]}", 6 * ((1 << 20) - 2))),
        "a text and token ids": ("/v1/completions", filled(b'{"prompt":["x",', b"1,", b"1]}", 2 * ((1 << 20) - 2))),
        "empty texts": ("/v1/completions", filled(b'{"prompt":[', b'"",', b'""]}')),
        "empty lists": ("/v1/completions", filled(b'{"prompt":[', b"[],", b"[]]}")),
        "one text": ("/v1/completions", filled(b'{"prompt":"', b"a", b'"}')),
        "one text of escapes": ("/v1/completions", filled(b'{"prompt":"', b"\\n", b'"}')),
        "one text of commas and quotes": ("/v1/completions", filled(b'{"prompt":"', b'\\",', b'"}')),
        "messages of numbers": ("/v1/chat/completions", filled(b'{"messages":[', b"1,", b"1]}")),
        "a message of parts that are none": (
            "/v1/chat/completions",
            filled(b'{"messages":[{"role":"user","content":[', b"null,", b"1]}]}"),
        ),
        "names": ("/v1/completions", b'{"prompt":"x","logit_bias":{' + names + b"}}"),
        "embeddings of nothing": ("/v1/embeddings", filled(b'{"input":[', b"null,", b"null]}")),
        "numbers, just within the bound": ("/v1/responses", filled(b'{"input":[', b"1.5,", b"1]}", 4 * ((1 << 20) - 2))),
        "nesting": ("/tokenize", filled(b"", b"[", b"")),
        "no JSON": ("/tokenize", filled(b'{"prompt":"', b"\\ud800", b'"}')),
    }


class Beside:
    """Small requests, one after the other, until it is left: how long each took. A context manager."""

    def __init__(self, port: int) -> None:
        self._port, self._end, self.took_s = port, threading.Event(), list[float]()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
        while not self._end.wait(PAUSE_S):
            began_s = time.perf_counter()
            connection.request("POST", "/tokenize", b'{"prompt":"def f("}', {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200
            self.took_s.append(time.perf_counter() - began_s)
        connection.close()

    def __enter__(self) -> Beside:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def told(self) -> str:
        ordered = sorted(self.took_s)
        return f"{1e3 * ordered[len(ordered) // 2]:7.1f} {1e3 * ordered[int(0.99 * (len(ordered) - 1))]:8.1f} {1e3 * ordered[-1]:8.1f}"


def send(port: int, path: str, body: bytes) -> str:
    """What is answered, in short."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    told = json.loads(answer.read()).get("error", {})
    connection.close()
    return f"{answer.status} {told.get('message', '')[:70]}"


def main() -> None:
    print(f"{'body':34s} {'CPU s':>6s}   small requests: {'p50':>4s} {'p99':>8s} {'max':>8s} ms   answer")
    with running_server(tp=1) as server:
        process = psutil.Process(server.pid)
        with Beside(server.port) as beside:
            time.sleep(ALONE_S)
        print(f"{'(none)':34s} {'':6s}                 {beside.told()}", flush=True)
        for name, (path, body) in shapes().items():
            before = process.cpu_times()
            with Beside(server.port) as beside:
                answers = {send(server.port, path, body) for _ in range(TIMES)}
            after = process.cpu_times()
            spent_s = (after.user + after.system - before.user - before.system) / TIMES
            print(f"{name:34s} {spent_s:6.2f}                 {beside.told()}      {'; '.join(sorted(answers))}", flush=True)


if __name__ == "__main__":
    main()
