//! Checkpoints from outside: what is saved is loaded, what is damaged is found, what is committed stays.
#![expect(clippy::unwrap_used, reason = "what the tests share may panic as they do")]

mod committing;
mod crashes;
mod damage;
mod fixture;
mod s3;
mod unreliable;
