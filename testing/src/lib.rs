//! Real servers for tests, on ports of this machine that are free, and a proxy that breaks what is said to
//! them, and chance that can be played again.
//!
//! **Invariant**: what a test starts here ends with it, and lies in a folder that goes away with it.

mod chance;
mod proxy;
mod s3;

pub use crate::{
    chance::Chance,
    proxy::{Breakage, Proxy, Rule},
    s3::S3Server,
};
