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
use object_store::{
    ClientOptions, PutMode, RetryConfig,
    aws::{AmazonS3Builder, AmazonS3ConfigKey},
    path::Path,
};
use thiserror::Error;

use crate::store::{OpenError, Store, StoreError};

/// How many creates race in the check of a store.
const RACERS: u8 = 8;
/// Requests that fail by the server's fault are repeated for so long; [`crate::Retries`] goes on from there.
const RETRY_TIMEOUT: Duration = Duration::from_secs(10);
/// A request that takes longer has failed. A part of 64 MiB takes this at 2 MiB/s.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

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

/// Opens `s3://BUCKET/PREFIX`. `variables` are those of the AWS tools: `AWS_ACCESS_KEY_ID`,
/// `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`, `AWS_REGION`, `AWS_ENDPOINT_URL_S3`, `AWS_ENDPOINT_URL`,
/// and those of roles (web identity, container, instance).
pub(crate) fn open(
    location: &str,
    variables: impl IntoIterator<Item = (String, String)>,
) -> Result<Store, OpenError> {
    let unsupported = || OpenError::Unsupported { location: location.to_owned() };
    let (bucket, prefix) = bucket_and_prefix(location).ok_or_else(unsupported)?;
    let retry = RetryConfig { retry_timeout: RETRY_TIMEOUT, ..RetryConfig::default() };
    let options =
        ClientOptions::new().with_timeout(REQUEST_TIMEOUT).with_connect_timeout(CONNECT_TIMEOUT);
    let mut builder = AmazonS3Builder::new()
        .with_client_options(options)
        .with_retry(retry)
        .with_bucket_name(bucket);
    for (name, value) in variables {
        let Some(key) = known(&name) else { continue };
        // Who names an endpoint without TLS wants it.
        let is_endpoint =
            matches!(key, AmazonS3ConfigKey::Endpoint | AmazonS3ConfigKey::S3Endpoint);
        if is_endpoint && value.starts_with("http://") {
            builder = builder.with_allow_http(true);
        }
        builder = builder.with_config(key, value);
    }
    let objects = builder
        .build()
        .map_err(|source| OpenError::Store { location: location.to_owned(), source })?;
    Ok(Store::new(Arc::new(objects), prefix, location))
}

fn known(variable: &str) -> Option<AmazonS3ConfigKey> {
    let name = variable.starts_with("AWS_").then(|| variable.to_ascii_lowercase())?;
    let key = name.parse().ok()?; // Most variables of AWS tools are not about the store.
    (!matches!(key, AmazonS3ConfigKey::Bucket)).then_some(key) // The location says it.
}

fn bucket_and_prefix(location: &str) -> Option<(&str, Path)> {
    let rest = location.strip_prefix("s3://")?;
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    let prefix = Path::parse(prefix.trim_end_matches('/')).ok()?;
    (!bucket.is_empty()).then_some((bucket, prefix))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_location_is_a_bucket_and_a_prefix() {
        let parsed = |location| bucket_and_prefix(location).map(|(b, p)| (b, p.to_string()));
        assert_eq!(parsed("s3://b/runs/one/"), Some(("b", "runs/one".to_owned())));
        assert_eq!(parsed("s3://b"), Some(("b", String::new())));
        assert_eq!(parsed("s3:///runs"), None);
        assert_eq!(parsed("s3://b/a//c"), None);
        assert_eq!(parsed("gs://b/a"), None);
    }

    #[test]
    fn only_what_is_about_the_store_is_taken_from_the_environment() {
        assert_eq!(known("AWS_ENDPOINT_URL"), Some(AmazonS3ConfigKey::Endpoint));
        assert_eq!(known("AWS_ENDPOINT_URL_S3"), Some(AmazonS3ConfigKey::S3Endpoint));
        assert_eq!(known("AWS_BUCKET"), None);
        assert_eq!(known("AWS_PAGER"), None);
        assert_eq!(known("REGION"), None);
    }
}
