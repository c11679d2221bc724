"""llama.cpp for `penstock bench engine`: its own server, over HTTP, streaming.

    --peer "llama.cpp=VENV/bin/python benchmarks/peers/llama_cpp.py --bin BIN --source LLAMA_CPP"

BIN holds llama-server and llama-quantize; LLAMA_CPP is the source tree with convert_hf_to_gguf.py, which needs torch,
transformers and gguf: VENV has them. Weights: bf16, int8 as Q8_0, int4 as Q4_0. A slot for each request, all else as
the server has it by default. Only the server's processor time is counted, not this driver's.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import runpy
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from lines import Cannot, serve

KINDS = {"bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}
START_S = 300


class LlamaCpp:
    weights = tuple(KINDS)

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._server: subprocess.Popen[bytes] | None = None
        self._environment = {**os.environ, "LD_LIBRARY_PATH": str(args.bin)}
        told = subprocess.run(
            [args.bin / "llama-server", "--version"],
            capture_output=True,
            text=True,
            env=self._environment,
        )
        found = re.search(r"version:\s*(.*)", told.stdout + told.stderr)
        self.hello = f"llama.cpp {found[1].strip() if found else '?'}"

    def prepare(self, ask: dict[str, Any]) -> None:
        target = gguf_path(ask)
        if target.exists():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        plain = gguf_path({**ask, "weights": "bf16"})
        if not plain.exists():
            self._run(
                [
                    sys.executable,
                    __file__,
                    "--convert",
                    ask["model"],
                    str(plain),
                    "--source",
                    self._args.source,
                ]
            )
        if target != plain:
            kind = KINDS[ask["weights"]]
            half = target.with_suffix(".half")
            self._run([self._args.bin / "llama-quantize", plain, half, kind])
            half.rename(target)

    def _run(self, command: list[Any]) -> None:
        done = subprocess.run(
            [str(each) for each in command], env=self._environment, stdout=subprocess.DEVNULL
        )
        if done.returncode:
            raise Cannot(f"{Path(str(command[0])).name} failed with {done.returncode}")

    def load(self, ask: dict[str, Any]) -> dict[str, Any]:
        self.close()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        slots, threads = ask["requests"], str(ask["threads"])
        command = [
            self._args.bin / "llama-server", "-m", gguf_path(ask), "-t", threads, "-tb", threads,
            "-np", slots, "-c", slots * (ask["longest"] + 8), "--port", self._port, "--host", "127.0.0.1",
            "--no-webui", "--cache-ram", "1024", *self._args.more,
        ]  # fmt: skip
        self._server = subprocess.Popen(
            [str(each) for each in command], env=self._environment, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL if not self._args.loud else None,
        )  # fmt: skip
        self._wait()
        return {"about": f"{self.hello}, {KINDS[ask['weights']]}", "pids": [self._server.pid]}

    def _wait(self) -> None:
        assert self._server is not None
        end = time.monotonic() + START_S
        while time.monotonic() < end and self._server.poll() is None:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                pass
            time.sleep(0.005)
        raise Cannot("llama-server did not start; --loud shows what it says")

    def generate(self, prompts: list[list[int]], tokens: list[int], tell: Any) -> None:
        faults: list[str] = []
        threads = [
            threading.Thread(target=self._one, args=(at, prompt, count, tell, faults))
            for at, (prompt, count) in enumerate(zip(prompts, tokens, strict=True))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if faults:
            raise Cannot(faults[0])

    def _one(self, at: int, prompt: list[int], count: int, tell: Any, faults: list[str]) -> None:
        body = {"prompt": prompt, "n_predict": count, "ignore_eos": True, "temperature": 0, "stream": True,
                "return_tokens": True}  # fmt: skip
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=900)
            connection.request(
                "POST", "/completion", json.dumps(body), {"Content-Type": "application/json"}
            )
            reply = connection.getresponse()
            told = 0
            for line in reply:
                if not line.startswith(b"data: "):
                    continue
                event = json.loads(line[6:])
                for _ in event.get("tokens") or ([0] if event.get("content") else []):
                    if told < count:
                        told += 1
                        tell(at, told)
                if event.get("stop"):
                    break
            if told < count:
                faults.append(f"{told} of {count} tokens came ({reply.status})")
        except OSError as error:
            faults.append(f"llama-server: {error}")

    def close(self) -> None:
        if self._server is not None:
            self._server.terminate()
            self._server.wait(20)
            self._server = None


def gguf_path(ask: dict[str, Any]) -> Path:
    return Path(ask["scratch"]) / "gguf" / f"{Path(ask['model']).name}-{KINDS[ask['weights']]}.gguf"


def convert(source: Path, model: str, target: str) -> None:
    """llama.cpp's own converter. It knows tokenizers by a digest; one it does not know is read as GPT-2's."""
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    import conversion.base

    known = conversion.base.TextModel.get_vocab_base_pre

    def named(self: Any, tokenizer: Any) -> str:
        try:
            return known(self, tokenizer)
        except NotImplementedError:
            return "gpt-2"

    conversion.base.TextModel.get_vocab_base_pre = named
    half = target + ".half"
    sys.argv = ["convert_hf_to_gguf.py", model, "--outfile", half, "--outtype", "bf16"]
    runpy.run_path(str(source / "convert_hf_to_gguf.py"), run_name="__main__")
    os.rename(half, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bin", type=Path)
    parser.add_argument("--source", type=Path)
    parser.add_argument("--convert", nargs=2, metavar=("MODEL", "GGUF"), help="only convert")
    parser.add_argument("--loud", action="store_true", help="let the server write to stderr")
    parser.add_argument("more", nargs="*", help="more arguments of llama-server, after --")
    args = parser.parse_args()
    if args.convert:
        convert(args.source, *args.convert)
    else:
        serve(LlamaCpp(args))


if __name__ == "__main__":
    main()
