"""A plain gRPC client: no generated code, the messages come from the server by reflection.

    pip install grpcio grpcio-reflection
    python docs/examples/generate.py 127.0.0.1:50051 "two penguins in the snow" penguins.png
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
JobEvent = GetMessageClass(pool.FindMessageTypeByName("efferent.v1.JobEvent"))
generate = channel.unary_stream(
    "/efferent.v1.ImageService/Generate",
    request_serializer=GenerateRequest.SerializeToString,
    response_deserializer=JobEvent.FromString,
)
try:
    for event in generate(GenerateRequest(prompt=prompt, inline_images=True)):
        kind = event.WhichOneof("event")
        if kind == "step":
            print(f"step {event.step.step} of {event.step.steps}", end="\r", file=sys.stderr)
        elif kind == "image":
            with open(path, "wb") as file:
                file.write(event.image.data)
            print(path)
        elif kind == "failed":
            sys.exit(f"failed: {event.failed.error.message}")
except grpc.RpcError as error:
    sys.exit(f"{error.code().name}: {error.details()}")
