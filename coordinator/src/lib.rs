//! Hosts the rules: carries messages, time and side effects for [`cluster::Coordinator`].
//!
//! ```text
//!   worker --session--> rpc --Input--> host (one task) --Event--> cluster::Coordinator
//!                                       |   Append  -> store (synced before what follows)
//!                                       |   Send    -> the session of the worker
//!                                       |   Commit  -> checkpoint::commit, in the background
//!                                       +-> watchers (entries of the log, liveness)
//! ```
//!
//! **Invariant**: one task owns the machine and the log. Nothing here decides.

mod commit;
mod config;
mod host;
mod rpc;
mod store;
mod watch;

pub use config::{Config, StartError};
pub use host::serve;
pub use store::{Entry, EventLog, LogError};
