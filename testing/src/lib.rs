//! Real servers for tests, on ports of this machine that are free, and a proxy that breaks what is said to
//! them.
//!
//! **Invariant**: what a test starts here ends with it, and lies in a folder that goes away with it.

mod proxy;
mod s3;

pub use crate::{
    proxy::{Breakage, Proxy, Rule},
    s3::S3Server,
};
