//! gRPC front door: validation, admission, job state, event streams.
