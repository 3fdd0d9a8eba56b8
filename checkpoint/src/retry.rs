//! The one place where what a store did not do is tried again.

use std::{fmt::Display, time::Duration};

use tracing::warn;

use crate::{
    commit::CommitError,
    load::{Fault, LoadError},
    save::SaveError,
    store::StoreError,
};

/// How often an operation is attempted before it is given up.
const ATTEMPTS: u32 = 5;
/// The pause after the first attempt; it doubles with each.
const PAUSE: Duration = Duration::from_millis(200);

/// An error of which it is known whether the same attempt may succeed later.
pub trait Transient: Display {
    /// Whether it may.
    fn is_transient(&self) -> bool;
}

macro_rules! transient {
    ($($error:ty),*) => {$(
        impl Transient for $error {
            fn is_transient(&self) -> bool {
                Self::is_transient(self)
            }
        }
    )*};
}

transient!(StoreError, SaveError, CommitError);

impl Transient for LoadError {
    fn is_transient(&self) -> bool {
        matches!(&self.fault, Fault::Store(error) if error.is_transient())
    }
}

/// Decides, after each failure of one operation, whether it is attempted again.
#[derive(Debug)]
pub struct Retries {
    what: &'static str,
    left: u32,
    pause: Duration,
}

impl Retries {
    /// For the operation that people call `what`: five attempts in some three seconds.
    #[must_use]
    pub fn of(what: &'static str) -> Self {
        Self { what, left: ATTEMPTS - 1, pause: PAUSE }
    }

    /// Waits, and returns whether to attempt it again; not if the failure is for good.
    pub async fn again<E: Transient>(&mut self, error: &E) -> bool {
        if self.left == 0 || !error.is_transient() {
            return false;
        }
        let (what, pause) = (self.what, self.pause);
        let pause_ms = pause.as_millis();
        warn!(%error, what, pause_ms, "the store failed; it is tried again");
        self.left -= 1;
        self.pause *= 2;
        tokio::time::sleep(pause).await;
        true
    }
}

/// Attempts an operation as often as [`Retries`] allows.
///
/// # Errors
/// That of the last attempt.
pub async fn retrying<T, E: Transient, Attempt: Future<Output = Result<T, E>>>(
    mut retries: Retries,
    mut attempt: impl FnMut() -> Attempt,
) -> Result<T, E> {
    loop {
        match attempt().await {
            Err(error) => {
                if !retries.again(&error).await {
                    return Err(error);
                }
            }
            Ok(done) => return Ok(done),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq)]
    struct Refusal(bool);

    impl Display for Refusal {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("no")
        }
    }

    impl Transient for Refusal {
        fn is_transient(&self) -> bool {
            self.0
        }
    }

    /// What `retrying` returns, and after how many attempts, if the first `failures` fail so.
    async fn outcome(failures: u32, is_transient: bool) -> (Result<(), Refusal>, u32) {
        let mut attempts = 0;
        let retries = Retries { pause: Duration::ZERO, ..Retries::of("a test") };
        let result = retrying(retries, || {
            attempts += 1;
            let fails = attempts <= failures;
            async move { if fails { Err(Refusal(is_transient)) } else { Ok(()) } }
        });
        (result.await, attempts)
    }

    #[tokio::test]
    async fn only_what_may_pass_is_tried_again_and_not_for_ever() {
        assert_eq!(outcome(0, true).await, (Ok(()), 1));
        assert_eq!(outcome(4, true).await, (Ok(()), 5));
        assert_eq!(outcome(5, true).await, (Err(Refusal(true)), 5));
        assert_eq!(outcome(1, false).await, (Err(Refusal(false)), 1));
    }
}
