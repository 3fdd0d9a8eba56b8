//! The rules of Percheron: who trains with whom, from which step, and what may be forgotten.
//!
//! Start here. Everything that *decides* lives in this crate, and nothing in it touches the world: no
//! sockets, files, threads, clocks or chance. Two machines talk to each other through hosts that
//! carry messages and side effects for them:
//!
//! ```text
//!    coordinator process                          worker process (one of N)
//!  +--------------------------+   orders    +---------------------------+
//!  | Coordinator::handle      | ----------> | Participant::handle       |
//!  |   (now, Event)           |             |   (Notice)                |
//!  |     -> Vec<Command>      | <---------- |     -> Vec<Action>        |
//!  +--------------------------+   reports   +---------------------------+
//!    Append: the event log                    Form, Abort: the training thread
//! ```
//!
//! # The ideas
//!
//! * **A run is a sequence of steps whose results are fixed in advance.** The global batch is split
//!   into `V` virtual ranks, and what each contributes depends on the seed and the step alone
//!   ([`blocks`] says who hosts which, and in which order the contributions are added). So any worker
//!   that holds the state after step *s* holds *the* state after step *s*.
//! * **Generations fence the past.** Each change of the membership opens a [`Generation`]; it is made
//!   durable before anyone hears of it, and messages of an older one are refused.
//! * **The highest step wins.** When a generation forms, its members compare the steps they hold; the
//!   first that holds the highest gives its state to the others. Nothing that was applied is lost as
//!   long as one of those that applied it lives; at most the step in flight is computed again.
//! * **Planned changes lose nothing.** A newcomer is announced while training goes on; rank 0 raises
//!   a flag inside the sum of the next step, so all members leave after the same step.
//! * **The coordinator is off the hot path.** Workers train on while it is away. What it must not
//!   forget is a fold of its records: the [`Ledger`].
//!
//! # Where things are
//!
//! | file | holds |
//! | --- | --- |
//! | `ids`, `time`, `fingerprint` | the words: [`Step`], [`Rank`], [`Timestamp`], [`Fingerprint`], … |
//! | `config` | [`RunConfig`], and all waits derived from one knob ([`Timeouts`]) |
//! | `event`, `command`, `record` | what goes in, what comes out, what is durable |
//! | `coordinator` | the machine of the coordinator; `change`: who comes and goes; `results`: what counts |
//! | `membership`, `ledger` | the workers it knows; what it must never forget |
//! | `leadership` | who leads: the lease, and the term that fences leaders before |
//! | `progress` | how long phases take, and who keeps the others waiting |
//! | `participant` | the machine of a worker |
//! | `audit` | what a log proves, or the first record that cannot be true |
//! | `blocks` | virtual ranks to workers, and the fixed tree of the sum |
//! | `tests/rules`, `tests/simulation` | one test a rule; many made-up runs, with named invariants |

pub mod audit;
pub mod blocks;
mod command;
mod config;
mod coordinator;
mod event;
mod fingerprint;
mod ids;
mod leadership;
mod ledger;
mod membership;
mod participant;
mod progress;
mod record;
mod time;

pub use command::{Command, Group, Member, Order};
pub use config::{InvalidConfig, RunConfig, Timeouts, Wait};
pub use coordinator::{Coordinator, Formed, Phase};
pub use event::{
    Evaluation, Event, ExitScores, Hello, Part, Progress, Report, Share, StepMetrics, StepPhase,
};
pub use fingerprint::{Fingerprint, FingerprintMismatch};
pub use ids::{Epoch, Generation, InvalidRunId, Rank, RunId, Step, Term, VirtualRank, WorkerId};
pub use leadership::{Claim, Due, Found, Leadership};
pub use ledger::{Ledger, Outcome};
pub use membership::{Membership, Worker};
pub use participant::{Action, Exit, Notice, Participant, State};
pub use record::Record;
pub use time::Timestamp;
