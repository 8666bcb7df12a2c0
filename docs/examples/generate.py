"""A plain gRPC client: no generated code, the messages come from the server by reflection.

    python3 -m venv .venv && .venv/bin/pip install grpcio grpcio-reflection
    .venv/bin/python docs/examples/generate.py 127.0.0.1:50051 "two penguins in the snow" penguins.png
"""
import sys

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

address, prompt, path = sys.argv[1:4]
channel = grpc.insecure_channel(address)
pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
GenerateRequest = GetMessageClass(pool.FindMessageTypeByName("efferent.v1.GenerateRequest"))
WatchJobRequest = GetMessageClass(pool.FindMessageTypeByName("efferent.v1.WatchJobRequest"))
JobEvent = GetMessageClass(pool.FindMessageTypeByName("efferent.v1.JobEvent"))
generate = channel.unary_stream(
    "/efferent.v1.ImageService/Generate",
    request_serializer=GenerateRequest.SerializeToString,
    response_deserializer=JobEvent.FromString,
)
watch = channel.unary_stream(
    "/efferent.v1.ImageService/WatchJob",
    request_serializer=WatchJobRequest.SerializeToString,
    response_deserializer=JobEvent.FromString,
)


def events():
    """The job's events to its end. A stream that ends before, as its coordinator stops, is taken up after the last event that was heard."""
    stream, event = generate(GenerateRequest(prompt=prompt, inline_images=True)), None
    while True:
        heard = event
        for event in stream:
            yield event
            if event.WhichOneof("event") in ("done", "failed"):
                return
        if event is heard:
            sys.exit("the events ended without telling how the job ended")
        request = WatchJobRequest(job_id=event.job_id, after=event.number, inline_images=True)
        # Patient with a coordinator that is being started again; where there are several, ask another.
        stream = watch(request, wait_for_ready=True, timeout=600)


try:
    for event in events():
        kind = event.WhichOneof("event")
        if kind == "step":
            print(f"step {event.step.step} of {event.step.steps}", end="\r", file=sys.stderr)
        elif kind == "image":
            if not event.image.data:
                sys.exit("the image is too large for an event: GetImage has it")
            with open(path, "wb") as file:
                file.write(event.image.data)
            print(path)
        elif kind == "failed":
            sys.exit(f"failed: {event.failed.error.message}")
except grpc.RpcError as error:
    sys.exit(f"{error.code().name}: {error.details()}")
