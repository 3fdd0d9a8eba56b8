//! Generates the wire types with a compiler written in Rust, so that no system protoc is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["v1/cluster.proto", "v1/inference.proto"];
    files.iter().for_each(|file| println!("cargo::rerun-if-changed={file}"));
    let descriptors = protox::compile(files, ["."])?;
    // Thousands of messages share the bytes of a roster.
    let build = tonic_prost_build::configure().bytes(".percheron.v1.Roster.members");
    // A coordinator has thousands of sessions, so each has small buffers.
    let build = build.codec_path("crate::codec::SmallBuffers");
    build.compile_fds(descriptors)?;
    Ok(())
}
