//! Parity with the reference implementation: activations, losses, gradients, updates and averages against
//! stored numbers. Without the numbers beside the repository these tests say so and pass.

mod golden;
mod network;
mod training;
mod units;
