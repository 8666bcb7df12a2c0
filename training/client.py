"""A client of a running cluster, and a server to ask: what evaluation and benches share. Needs grpcio and grpcio-reflection."""
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from . import packages


class Client:
    """Pictures over gRPC. Messages come from the server by reflection."""

    def __init__(self, address: str):
        channel = grpc.insecure_channel(address.removeprefix("http://"))
        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        message = lambda name: GetMessageClass(pool.FindMessageTypeByName(f"efferent.v1.{name}"))
        self.request, event = message("GenerateRequest"), message("JobEvent")
        self.generate = channel.unary_stream("/efferent.v1.ImageService/Generate", request_serializer=self.request.SerializeToString, response_deserializer=event.FromString)

    def picture(self, prompt: str, seed: int, **more) -> bytes:
        """A PNG file."""
        for event in self.generate(self.request(prompt=prompt, seed=seed, inline_images=True, **more)):
            if event.HasField("image"):
                return event.image.data
            if event.HasField("failed"):
                raise SystemExit(f"{prompt!r}: {event.failed.error.message}")
        raise SystemExit(f"{prompt!r}: the stream ended without a picture")


class Server:
    """`efferent up` as a process of its own with a queue in a temporary folder; the fetched weights are shared."""

    def __init__(self, binary: Path):
        self.folder = tempfile.TemporaryDirectory()
        packages.gguf()
        os.symlink((packages.home() / "brains").resolve(), Path(self.folder.name) / "brains")
        command = [binary, "up", "--listen", "127.0.0.1:0", "--admin", "off", "--home", self.folder.name]
        self.started = time.monotonic()
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        found = next((found for line in self.process.stdout if (found := re.search(r"grpc\s+(http://\S+)", line))), None)
        if not found:
            raise SystemExit(f"{binary} up did not start: run it to see why")
        self.address = found[1]

    def peak_memory(self) -> int:
        """Most bytes that were resident."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(timeout=30)
        self.folder.cleanup()
