//! The wire: `v1/cluster.proto` and `v1/inference.proto`, the code generated from them, and the only conversions
//! between the messages of the first and the types of `cluster`.

mod codec;
mod convert;
mod group;

/// Generated from `v1/cluster.proto` and `v1/inference.proto`.
#[allow(
    clippy::all,
    missing_debug_implementations,
    unreachable_pub,
    unused_qualifications,
    clippy::allow_attributes_without_reason,
    clippy::wildcard_enum_match_arm,
    clippy::cast_lossless,
    clippy::allow_attributes,
    reason = "generated code is not ours to style"
)]
pub mod v1 {
    tonic::include_proto!("percheron.v1");
}

pub use convert::{
    Malformed, heartbeat, order_from_response, order_to_response, progress, report_from_wire,
    report_to_wire,
};

pub use group::{Announcer, Listener, Told};

/// Largest message either side takes, in bytes. The longest are records of the log: a generation of 4,096 workers takes
/// about 600 KB.
pub const MESSAGE_BYTES_MAX: usize = 8 << 20;

/// Metadata key under which a session carries the run's token.
pub const TOKEN_HEADER: &str = "x-percheron-token";
