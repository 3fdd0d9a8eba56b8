//! Hosts the rules: carries messages, time and side effects for [`cluster::Coordinator`].
//!
//! ```text
//!   worker --session--> rpc --Input--> host (one task) --Event--> cluster::Coordinator
//!                                       |   Append  -> log: store (a file) or journal (objects, under a lease); durable before what follows
//!                                       |   Send    -> the session of the worker
//!                                       |   Commit  -> checkpoint::commit, in the background
//!                                       +-> watchers (entries of the log, liveness)
//! ```
//!
//! **Invariant**: one task owns the machine and the log. Nothing here decides.

mod commit;
mod config;
mod health;
mod host;
mod http;
mod journal;
mod lease;
mod log;
mod metrics;
mod rpc;
mod store;
mod watch;

pub use config::{Config, Lease, LogAt, StartError};
pub use health::Health;
pub use host::{Leader, serve};
pub use journal::{append as append_shared, read as read_shared};
pub use store::{Entry, EventLog, LogError};
