//! Where an S3 location leads: `s3://BUCKET/PREFIX`, and the variables of the AWS tools that say how to get
//! there. Datasets and checkpoints are found by the same rules.
//!
//! **Invariant**: nothing is asked of a store here.

use std::{ffi::OsString, time::Duration};

use object_store::{
    ClientOptions,
    aws::{AmazonS3Builder, AmazonS3ConfigKey},
    path::Path,
};

/// A request that takes longer has failed. A part of 64 MiB takes this at 2 MiB/s.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The environment variables of this process, without those that are not UTF-8.
pub fn environment() -> impl Iterator<Item = (String, String)> {
    let in_utf_8 = |(name, value): (OsString, OsString)| {
        Some((name.into_string().ok()?, value.into_string().ok()?))
    };
    std::env::vars_os().filter_map(in_utf_8)
}

/// A client of the bucket in `s3://BUCKET/PREFIX`, still to be built, and the prefix; nothing if `location` is
/// something else. How often a request is repeated is for the caller to say.
///
/// `variables` are those of the AWS tools: `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`,
/// `AWS_REGION`, `AWS_ENDPOINT_URL_S3`, `AWS_ENDPOINT_URL`, and those of roles (web identity, container,
/// instance).
pub fn client(
    location: &str,
    variables: impl IntoIterator<Item = (String, String)>,
) -> Option<(AmazonS3Builder, Path)> {
    let (bucket, prefix) = bucket_and_prefix(location)?;
    let options =
        ClientOptions::new().with_timeout(REQUEST_TIMEOUT).with_connect_timeout(CONNECT_TIMEOUT);
    let mut builder = AmazonS3Builder::new().with_client_options(options).with_bucket_name(bucket);
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
    Some((builder, prefix))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_location_is_a_bucket_and_a_prefix() {
        let parsed = |location| bucket_and_prefix(location).map(|(b, p)| (b, p.to_string()));
        assert_eq!(parsed("s3://b/runs/one/"), Some(("b", "runs/one".to_owned())));
        assert_eq!(parsed("s3://b/data/pets/"), Some(("b", "data/pets".to_owned())));
        assert_eq!(parsed("s3://b"), Some(("b", String::new())));
        assert_eq!(parsed("s3:///runs"), None);
        assert_eq!(parsed("s3:///data"), None);
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
