//! Parity with the reference implementation: activations, losses, gradients, updates and averages against
//! stored numbers. Without the numbers beside the repository these tests say so and pass.
#![expect(
    clippy::unwrap_used,
    clippy::wildcard_enum_match_arm,
    clippy::print_stdout,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a test: a broken golden file ends it, a missing one is told, and its numbers are small"
)]

mod golden;
mod network;
mod training;
mod units;
