//! What tch lacks, behind safe functions: start-up of the runtime, the fingerprint of what can change
//! bits, slices over tensor storage, own kernels with own backward, gradients written into one flat
//! tensor, autocast, and CUDA streams and graphs.
//!
//! Call [`init`] first thing in every program and test that computes: CUDA kernels register only if
//! their library is loaded before the first question about CUDA.
//!
//! **Invariant**: this crate and the bindings of libjpeg-turbo and NCCL are the only homes of `unsafe`.

mod autocast;
pub mod cuda;
mod custom;
mod fingerprint;
mod flat;
mod gradient;
mod refusals;
mod runtime;
mod sys;
mod vector;

pub use autocast::autocast;
pub use custom::with_backward;
pub use fingerprint::{Precision, fingerprint};
pub use flat::{Element, FlatError, slice, slice_mut};
pub use gradient::gradients_into;
pub use refusals::refusals;
pub use runtime::{Cuda, InitError, init};
pub use sys::ShimError;
pub use vector::{Kernel, vectorized};
