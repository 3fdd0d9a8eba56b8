//! Compiles the shim against the libtorch that torch-sys found.

use std::env;
use std::path::PathBuf;

fn main() {
    println!("cargo:rerun-if-changed=cpp");
    // torch-sys has `links = "tch"` and publishes its library directory.
    let lib = PathBuf::from(env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys publishes it"));
    let include = lib.parent().expect("the library directory is inside libtorch").join("include");
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .warnings(false) // libtorch's headers are not ours to fix.
        .include(&include)
        .include(include.join("torch/csrc/api/include"))
        .file("cpp/shim.cpp")
        .file("cpp/cuda.cpp")
        .compile("percheron_shim");
}
