//! Compiles the `.proto` files with protox, so that no system `protoc` is needed.

use std::{env, fs, path::PathBuf};

use prost::Message as _;

const FILES: [&str; 10] = [
    "efferent/v1/common.proto",
    "efferent/v1/image.proto",
    "efferent/v1/cluster.proto",
    "efferent/v1/batch.proto",
    "efferent/v1/object.proto",
    "efferent/v1/dead.proto",
    "efferent/v1/signal.proto",
    "efferent/internal/v1/task.proto",
    "efferent/internal/v1/batch.proto",
    "efferent/internal/v1/transfer.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=efferent");
    let descriptors = protox::compile(FILES, ["."])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    // What processes tell one another is not for reflection to show.
    let mut public = descriptors.clone();
    public.file.retain(|file| !file.name().starts_with("efferent/internal/"));
    fs::write(out.join("efferent.bin"), public.encode_to_vec())?;
    // Ordered maps, so that equal control signals have equal bytes.
    tonic_prost_build::configure()
        .bytes(".")
        .btree_map(".efferent.internal.v1.ControlSignal")
        .compile_fds(descriptors)?;
    Ok(())
}
