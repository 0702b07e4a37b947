"""Many visitors of the page, one after another and at once: what the server's memory and disk do.

    python scripts/load_app.py [--visitors 50] [--rounds 4] [--at-once 16]

The server runs in a process of its own, with a small untrained backbone: what is looked for is growth, not speed.
Every visitor opens the page, gives an example and two photos, searches, moves the threshold, makes files, and
closes the page or, every second one, leaves it open. Exit code 1 where a visitor fails, files are left at the end, or
the memory after the last round is more than `--allowed` megabytes above that of the round in the middle.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fewshot_seg.app.guard import held_bytes
from fewshot_seg.app.limits import Limits
from fewshot_seg.app.serving import serve
from fewshot_seg.app.session import Engine
from fewshot_seg.backbones import build_backbone
from fewshot_seg.segmenter import training_free


@contextmanager
def server(limits: Limits) -> Iterator[tuple[int, str, Path]]:
    """(process id, address, folder) of a page in a process of its own."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        torch.set_num_threads(1)
        backbone = build_backbone("mobilenetv3_small_050", weights="random")
        engine = Engine(segmenter=training_free(backbone).eval(), resolution=128, fit="squash", name="untrained")
        with serve(engine, limits=limits) as served:
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            os.write(writing, f"{served.address} {served.folder}\n".encode())
            with suppress(KeyboardInterrupt):
                threading.Event().wait()
        os._exit(0)
    address, folder = os.read(reading, 4096).decode().split()
    try:
        yield process, address.split("//")[1].strip("/"), Path(folder)
    finally:
        os.kill(process, signal.SIGTERM)
        os.waitpid(process, 0)


def photo(seed: int, side: int = 400) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


class Visitor:
    """One page in one browser."""

    def __init__(self, host: str, listeners: dict[str, int], seed: int) -> None:
        self.host, self.listeners, self.seed, self.session = host, listeners, seed, uuid.uuid4().hex[:11]

    def _post(self, path: str, body: bytes, kind: str) -> Any:
        connection = http.client.HTTPConnection(self.host, timeout=300)
        connection.request("POST", path, body, {"Content-Type": kind})
        response = connection.getresponse()
        content = response.read()
        connection.close()
        if response.status != 200:
            raise RuntimeError(f"{path}: {response.status} {content[:200]!r}")
        return json.loads(content)

    def upload(self, name: str, content: bytes) -> dict[str, Any]:
        mark = uuid.uuid4().hex
        head = f'--{mark}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
        body = head.encode() + content + f"\r\n--{mark}--\r\n".encode()
        (path,) = self._post("/gradio_api/upload", body, f"multipart/form-data; boundary={mark}")
        return {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}

    def call(self, listener: str, *values: Any) -> None:
        asked = {"data": list(values), "fn_index": self.listeners[listener], "session_hash": self.session}
        self._post("/gradio_api/queue/join", json.dumps(asked).encode(), "application/json")
        connection = http.client.HTTPConnection(self.host, timeout=300)
        connection.request("GET", f"/gradio_api/queue/data?session_hash={self.session}")
        response = connection.getresponse()
        while line := response.readline():
            if line.startswith(b"data:"):
                message = json.loads(line[5:])
                if message["msg"] == "process_completed":
                    connection.close()
                    if not message["success"]:
                        raise RuntimeError(f"{listener}: {message}")
                    return
        raise RuntimeError(f"{listener}: no answer")

    def visit(self) -> None:
        """Everything a visitor does; every second one closes the page at the end."""
        heart = http.client.HTTPConnection(self.host, timeout=300)
        heart.request("GET", f"/gradio_api/heartbeat/{self.session}")
        beating = heart.getresponse()
        self.call("add_examples", [self.upload("example.jpg", photo(self.seed))])
        self.call("add_queries", [self.upload(f"{n}.jpg", photo(self.seed + n)) for n in (1, 2)])
        box = {"kind": "box", "shapes": [{"tool": "box", "points": [[50, 50], [300, 300]], "radius": 1}]}
        self.call("find", {"drawings": {"1": box}}, "thing", 0.0)
        self.call("cut", 0.1, 1)
        self.call("make_files", 0.1)
        if self.seed % 2:
            beating.close()
            heart.close()
        else:
            self.left_open = heart, beating


def megabytes(process: int) -> float:
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmRSS")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--visitors", type=int, default=50, help="of a round")
    parser.add_argument("--rounds", type=int, default=6, help="every second one with visitors at once")
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--allowed", type=float, default=30.0, help="megabytes of growth")
    given = parser.parse_args()
    limits, failures, memory = Limits(idle_seconds=3600.0), 0, list[float]()
    with server(limits) as (process, host, folder):
        connection = http.client.HTTPConnection(host, timeout=60)
        connection.request("GET", "/config")
        listeners = {one["api_name"]: one["id"] for one in json.loads(connection.getresponse().read())["dependencies"]}
        print(f"before the first visitor: {megabytes(process):.0f} MB", flush=True)
        for number in range(given.rounds):
            workers, began = (given.at_once if number % 2 else 1), time.perf_counter()
            visitors = [Visitor(host, listeners, 1000 * number + n) for n in range(given.visitors)]
            with ThreadPoolExecutor(workers) as pool:
                for outcome in [pool.submit(one.visit) for one in visitors]:
                    error = outcome.exception()
                    failures += error is not None
                    if error is not None:
                        print(f"failed: {error}", flush=True)
            memory.append(megabytes(process))
            sessions = sum(one.name.startswith("session-") for one in folder.iterdir())
            took, disk = time.perf_counter() - began, held_bytes(folder) / 1e6
            print(
                f"round {number + 1}: {given.visitors} visitors, {workers} at once, {took:.0f} s; "
                f"memory {memory[-1]:.0f} MB, disk {disk:.1f} MB in {sessions} sessions",
                flush=True,
            )
        middle = given.rounds // 2  # by then every thread has its share of memory
        grown = memory[-1] - memory[middle]
    print(
        f"growth from round 2 to {given.rounds}: {grown:.1f} MB; failures: {failures}; left on disk: {folder.exists()}"
    )
    return 0 if grown <= given.allowed and not failures and not folder.exists() else 1


if __name__ == "__main__":
    sys.exit(main())
