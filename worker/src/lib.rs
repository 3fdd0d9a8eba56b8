//! A worker: hosts [`cluster::Participant`], and trains.
//!
//! ```text
//!   coordinator <--session--> agent (tokio): Participant, outbox, uploads
//!                               |  Formation, orders          ^  what happened
//!                               v                             |
//!                             train (one OS thread): form -> agree on a state -> step, step, ...
//!                               ^                      |
//!                             feed (OS threads)        +-- collective: mesh or NCCL --> the peers
//! ```
//!
//! The training thread obeys between two virtual ranks and never waits for the coordinator. Start
//! reading at [`train`], then `train/step.rs`.
//!
//! **Invariants**: until the sum over the virtual ranks has succeeded, nothing of the state has changed.
//! What a step computes depends on the recipe, the step and the virtual rank, never on the rank, the
//! generation or the time.

pub mod agent;
pub mod bench;
pub mod device;
pub mod health;
pub mod progress;
pub mod setup;
pub mod tool;
pub mod train;
pub mod weights;

mod feed;
mod pass;
