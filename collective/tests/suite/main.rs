//! The exchange, the sum and the formation of groups, seen from outside.
#![expect(clippy::unwrap_used, reason = "what the tests share may panic as they do")]

mod contract;
mod forming;
mod nccl;
mod reduction;
mod transports;
