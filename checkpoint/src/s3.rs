//! Checkpoints in S3, or in any store that speaks its protocol, and the check that it keeps the contract.
//!
//! Everything rests on one promise of the store: of several conditional creates (`If-None-Match: *`,
//! RFC 9110 §13.1.2) of one object, one wins and the others are told. Not every server keeps it.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use futures::future::join_all;
use object_store::{PutMode, RetryConfig};
use thiserror::Error;

use crate::store::{OpenError, Store, StoreError};

/// How many creates race in the check of a store.
const RACERS: u8 = 8;
/// Requests that fail by the server's fault are repeated for so long; [`crate::Retries`] goes on from there.
const RETRY_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a store must not hold checkpoints.
#[derive(Debug, Error)]
pub enum ContractError {
    /// Conditional creates do not exclude each other, or there are none.
    #[error(
        "{location} cannot keep checkpoints safely: {seen}; use a store with conditional writes (`If-None-Match` \
         on PUT), such as Amazon S3, or a folder"
    )]
    Broken {
        /// The store.
        location: String,
        /// What it did.
        seen: String,
    },
    /// The store did not answer, or said no.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Opens `s3://BUCKET/PREFIX`, with the variables that [`bucket::client`] knows.
pub(crate) fn open(
    location: &str,
    variables: impl IntoIterator<Item = (String, String)>,
) -> Result<Store, OpenError> {
    let unsupported = || OpenError::Unsupported { location: location.to_owned() };
    let (builder, prefix) = bucket::client(location, variables).ok_or_else(unsupported)?;
    let builder =
        builder.with_retry(RetryConfig { retry_timeout: RETRY_TIMEOUT, ..RetryConfig::default() });
    let objects = builder
        .build()
        .map_err(|source| OpenError::Store { location: location.to_owned(), source })?;
    Ok(Store::new(Arc::new(objects), prefix, location))
}

impl Store {
    /// Makes sure that the store keeps the contract: races conditional creates of one object, and wants one
    /// winner whose bytes stay. Leaves nothing behind.
    ///
    /// # Errors
    /// [`ContractError`].
    pub async fn check_contract(&self) -> Result<(), ContractError> {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let name = format!("probe/{}-{}", std::process::id(), since_epoch.as_nanos());
        let seen = self.race(&name).await;
        let deleted = self.delete(&self.path(&name)).await;
        match seen? {
            None => Ok(deleted?),
            Some(seen) => Err(ContractError::Broken { location: self.location().to_owned(), seen }),
        }
    }

    /// What the store did wrong, if anything.
    async fn race(&self, name: &str) -> Result<Option<String>, StoreError> {
        let racers = (0..RACERS).map(|racer| async move {
            (racer, self.put(name, Bytes::copy_from_slice(&[racer]), PutMode::Create).await)
        });
        let mut winners = Vec::new();
        for (racer, put) in join_all(racers).await {
            match put {
                Ok(()) => winners.push(racer),
                Err(error) if error.is_there() => {}
                Err(error) if error.is_unknown_to_the_store() => {
                    return Ok(Some(format!("it knows no conditional writes ({})", error.cause)));
                }
                Err(error) => return Err(error),
            }
        }
        let found = self.read(name).await?;
        Ok(match winners[..] {
            [winner] if found[..] == [winner] => None,
            [_] => Some("a conditional write that had failed replaced another's object".to_owned()),
            // An answer that got lost: a server that is under load, no verdict on its contract.
            [] => None,
            _ => Some(format!(
                "{} of {RACERS} conditional writes of one object all succeeded",
                winners.len()
            )),
        })
    }
}
