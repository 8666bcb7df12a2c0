"""The shipped pipeline beside the same pipeline in PyTorch, in one run: first picture, steady pictures, cached and new control signals, memory.

    python tests/peers/pipeline.py --binary target/release/efferent

Pictures are taken in turns, one of ours and one of PyTorch's, so that whatever else the machine does disturbs both alike. Without torch (see
training/requirements.txt) only our own figures are printed, and it says so.
"""
import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import grpc

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
PROMPTS = [f"{count} {color} {thing} {place}" for count in ("two", "three") for color in ("red", "blue", "green", "yellow", "pink")
           for thing in ("cats", "rockets", "apples", "cars") for place in ("", "in the snow")]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Ours:
    """`efferent up` in a process of its own, and a client."""

    def __init__(self, binary: Path, folder: str):
        port, self.started = free_port(), time.monotonic()
        command = [binary, "up", "--listen", f"127.0.0.1:{port}", "--admin", f"127.0.0.1:{free_port()}", "--data", folder]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        self.generate = None

    def connect(self):
        from google.protobuf.descriptor_pool import DescriptorPool
        from google.protobuf.message_factory import GetMessageClass
        from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

        grpc.channel_ready_future(self.channel).result(timeout=60)
        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(self.channel))
        message = lambda name: GetMessageClass(pool.FindMessageTypeByName(f"efferent.v1.{name}"))
        self.request, self.event = message("GenerateRequest"), message("JobEvent")
        self.generate = self.channel.unary_stream("/efferent.v1.ImageService/Generate", request_serializer=self.request.SerializeToString,
                                                  response_deserializer=self.event.FromString)

    def picture(self, prompt: str, seed: int, **more) -> bytes:
        for event in self.generate(self.request(prompt=prompt, seed=seed, inline_images=True, **more)):
            if event.HasField("image"):
                return event.image.data
            if event.HasField("failed"):
                raise SystemExit(event.failed.error.message)
        raise SystemExit("the stream ended without a picture")

    def first(self) -> float:
        """Seconds from the process's start to its first picture."""
        self.connect()
        while True:
            try:
                self.picture("a red apple", 0)
                return time.monotonic() - self.started
            except grpc.RpcError as error:
                if error.code() != grpc.StatusCode.UNAVAILABLE and error.code() != grpc.StatusCode.NOT_FOUND or time.monotonic() - self.started > 60:
                    raise
                time.sleep(.02)

    def peak_memory(self) -> int:
        """Most bytes that were resident."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

    def stop(self):
        self.process.terminate()
        self.process.wait(timeout=30)


def timed(work) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--binary", type=Path, default=ROOT / "target/release/efferent")
    parser.add_argument("--model", type=Path, default=ROOT / "models/pictogram")
    parser.add_argument("--pictures", type=int, default=40)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(options.binary, folder)
        try:
            measure(ours, options)
        finally:
            ours.stop()


def measure(ours: Ours, options):
    print(f"first picture, from process start: {ours.first():.2f} s")
    theirs = None
    try:
        import torch

        from training.evaluate import Prompt, torch_renderer
        torch.set_num_threads(os.cpu_count())
        started = time.monotonic()
        render = torch_renderer(options.model)
        theirs = lambda prompt, seed: render([Prompt("", prompt, None, seed, False)])
        theirs("a red apple", 0)
        print(f"first picture in PyTorch, imports not counted: {time.monotonic() - started:.2f} s")
    except ImportError as error:
        print(f"PYTORCH IS NOT MEASURED: {error}; see training/requirements.txt")
    mine, peer = [], []
    for seed in range(options.pictures):
        prompt = PROMPTS[seed % len(PROMPTS)]
        mine.append(timed(lambda: ours.picture(prompt, seed)))
        if theirs:
            peer.append(timed(lambda: theirs(prompt, seed)))
    median = statistics.median(mine)
    print(f"steady, new prompt each time: median {median * 1000:.0f} ms, {60 / median:.0f} pictures a minute")
    if peer:
        other = statistics.median(peer)
        print(f"PyTorch, same prompts and seeds in turn: median {other * 1000:.0f} ms, {60 / other:.0f} pictures a minute; ours takes {median / other:.2f} of its time")
    miss, hit = [], []
    for number in range(20):
        prompt = f"a photo of {number} stars"
        miss.append(timed(lambda: ours.picture(prompt, 1, steps=1)))
        hit.append(timed(lambda: ours.picture(prompt, 2, steps=1)))
    print(f"one step only, new prompt: median {statistics.median(miss) * 1000:.1f} ms; same prompt again (control signal cached): {statistics.median(hit) * 1000:.1f} ms")
    print(f"peak memory of the process: {ours.peak_memory() / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
