//! Predicts how a run gets on while machines fail: the real rules of both sides over a modelled cluster.
//!
//! `cluster/tests/simulation` plays every message of small runs, to break the rules. Here thousands of
//! workers live for days, so time leaps from one event to the next: while a generation trains and
//! nothing happens, its steps are counted and not played, and no heartbeat is sent. A fault wakes the
//! coordinator, which takes the leap for its own sleep and begins all waits anew; from then on it hears
//! every heartbeat until the run trains again.
//!
//! | file | holds |
//! | --- | --- |
//! | `scenario` | what is asked, and what comes out |
//! | `world` | virtual time, the coordinator's host, faults |
//! | `crew` | the workers: who forms a generation, how far it is |
//! | `watch` | invariants, by name |

mod chance;
mod crew;
mod scenario;
mod watch;
mod world;

pub use scenario::{Forecast, Impossible, Scenario, Violation, predict};
