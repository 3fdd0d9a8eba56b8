//! A dataset in S3, or in any store that speaks its protocol: where it is, and reads that heal.
//!
//! A read that fails by the network's or the server's fault is repeated, ever later. One that takes longer
//! than 99 of the last 100 is asked for a second time, and whichever answer comes first counts.

mod upload;

use std::{
    collections::VecDeque,
    fmt,
    ops::Range,
    pin::pin,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::{
    TryStreamExt as _,
    executor::block_on,
    future::{Either, select},
};
use object_store::{
    Error, ObjectStore as _, ObjectStoreExt as _, RetryConfig, aws::AmazonS3, path::Path,
};
use tokio::{
    runtime::{Builder, Runtime},
    sync::Semaphore,
    task::unconstrained,
    time::{Instant, sleep},
};

use crate::source::SourceError;

/// Seven waits of 0.1 s, 0.2 s, ... 5 s: 11.3 s in all.
const ATTEMPTS: u32 = 8;
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// Requests at a time for one dataset, of one block each: 64 MiB in flight, and as much again at worst while
/// every one of them is asked for a second time.
pub(super) const IN_FLIGHT: usize = 16;

/// What has gone over the network. Numbers for a person.
#[derive(Debug, Default)]
pub(crate) struct Traffic {
    pub(crate) fetched_bytes: AtomicU64,
    pub(crate) hits: AtomicU64,
    pub(crate) misses: AtomicU64,
    pub(crate) unkept: AtomicU64,
    pub(crate) hedged: AtomicU64,
    pub(crate) retried: AtomicU64,
}

pub(super) fn count(counter: &AtomicU64, amount: u64) {
    counter.fetch_add(amount, Ordering::Relaxed);
}

/// An object under a prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Object {
    /// What follows the prefix.
    pub(crate) name: String,
    /// Where it is in its bucket.
    pub(crate) path: Path,
    /// Bytes.
    pub(crate) length: u64,
}

/// The objects under a prefix of a bucket.
pub(super) struct Bucket {
    objects: AmazonS3,
    /// The same, for writing: it repeats requests by itself.
    uploads: AmazonS3,
    prefix: Path,
    runtime: Option<Runtime>,
    permits: Semaphore,
    latencies: Mutex<Latencies>,
    pub(super) traffic: Traffic,
}

impl fmt::Debug for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Bucket").field(&self.prefix).finish()
    }
}

impl Drop for Bucket {
    fn drop(&mut self) {
        // Dropped as it is, it would wait, which an async caller must not.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Bucket {
    /// Opens `s3://BUCKET/PREFIX` with the variables of the AWS tools. Asks nothing of the store yet.
    pub(super) fn open(
        location: &str,
        variables: &[(String, String)],
    ) -> Result<Self, SourceError> {
        let (builder, prefix) = bucket::client(location, variables.iter().cloned())
            .ok_or_else(|| SourceError::NoBucket { location: location.to_owned() })?;
        let unusable = |source| SourceError::Settings { location: location.to_owned(), source };
        let uploads = upload::settings(builder.clone()).build().map_err(unusable)?;
        // `retried` counts them.
        let builder = builder.with_retry(RetryConfig { max_retries: 0, ..RetryConfig::default() });
        let objects = builder.build().map_err(unusable)?;
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("dataset")
            .enable_all()
            .build()
            .map_err(|source| SourceError::Threads { location: location.to_owned(), source })?;
        Ok(Self {
            objects,
            uploads,
            prefix,
            runtime: Some(runtime),
            permits: Semaphore::new(IN_FLIGHT),
            latencies: Mutex::default(),
            traffic: Traffic::default(),
        })
    }

    /// Waits on the calling thread, which may be one of another runtime; the network is served by our own.
    ///
    /// Of a task of another runtime the budget must not count: it is used up while this waits, and only renewed
    /// after. Everything would then seem to be busy for ever.
    pub(super) fn wait<F: Future>(&self, work: F) -> F::Output {
        let _inside = self.runtime.as_ref().map(Runtime::enter);
        block_on(unconstrained(work))
    }

    fn path(&self, name: &str) -> Path {
        self.prefix.clone().join(name)
    }

    /// Length of an object in bytes.
    pub(super) async fn length(&self, name: &str) -> Result<u64, Error> {
        let path = self.path(name);
        Ok(self.healed(|| self.objects.head(&path)).await?.size)
    }

    /// Some bytes of an object.
    pub(super) async fn range(&self, name: &str, range: Range<u64>) -> Result<Bytes, Error> {
        self.range_at(&self.path(name), range).await
    }

    /// Some bytes of the object at a path of the bucket.
    pub(super) async fn range_at(&self, path: &Path, range: Range<u64>) -> Result<Bytes, Error> {
        self.healed(|| self.hedged(path, range.clone())).await
    }

    /// Every object under the prefix.
    pub(super) async fn list(&self) -> Result<Vec<Object>, Error> {
        let prefix = &self.prefix;
        let listed =
            self.healed(|| self.objects.list(Some(prefix)).try_collect::<Vec<_>>()).await?;
        let named = listed.into_iter().filter_map(|found| {
            let parts: Vec<_> = found.location.prefix_match(prefix)?.collect();
            let name = parts.iter().map(AsRef::as_ref).collect::<Vec<_>>().join("/");
            Some(Object { name, path: found.location, length: found.size })
        });
        Ok(named.collect())
    }

    /// Repeats what fails by no fault of ours.
    async fn healed<T, F>(&self, ask: impl Fn() -> F) -> Result<T, Error>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let _permit = self.permits.acquire().await.expect("it is never closed");
        let mut wait = BACKOFF_FIRST;
        for _ in 1..ATTEMPTS {
            match ask().await {
                Err(error) if is_transient(&error) => {}
                settled => return settled,
            }
            count(&self.traffic.retried, 1);
            sleep(wait).await;
            wait = (wait * 2).min(BACKOFF_MAX);
        }
        ask().await
    }

    async fn hedged(&self, path: &Path, range: Range<u64>) -> Result<Bytes, Error> {
        let latencies = || self.latencies.lock().unwrap_or_else(PoisonError::into_inner);
        let patience = latencies().p99();
        let start = Instant::now();
        let ask = || self.objects.get_range(path, range.clone());
        let read = first_of_two(patience, ask, || count(&self.traffic.hedged, 1)).await;
        if read.is_ok() {
            latencies().add(start.elapsed());
        }
        read
    }
}

/// The first answer that is no error, of one request or, after `patience`, of two.
async fn first_of_two<T, F>(
    patience: Option<Duration>,
    ask: impl Fn() -> F,
    hedged: impl FnOnce(),
) -> Result<T, Error>
where
    F: Future<Output = Result<T, Error>>,
{
    let first = pin!(ask());
    let Some(patience) = patience else { return first.await };
    let first = match select(first, pin!(sleep(patience))).await {
        Either::Left((read, _)) => return read,
        Either::Right(((), first)) => first,
    };
    hedged();
    match select(first, pin!(ask())).await {
        Either::Left((Ok(read), _)) | Either::Right((Ok(read), _)) => Ok(read),
        Either::Left((Err(_), second)) => second.await,
        Either::Right((Err(_), first)) => first.await,
    }
}

/// How long the last reads took.
#[derive(Debug, Default)]
struct Latencies(VecDeque<Duration>);

impl Latencies {
    const KEPT: usize = 256;
    /// Below this many the slowest says little.
    const TELLING: usize = 64;
    /// Asking twice for what comes that fast gains nothing.
    const LEAST: Duration = Duration::from_millis(20);

    fn add(&mut self, latency: Duration) {
        if self.0.len() == Self::KEPT {
            self.0.pop_front();
        }
        self.0.push_back(latency);
    }

    fn p99(&self) -> Option<Duration> {
        let mut sorted: Vec<_> = self.0.iter().copied().collect();
        sorted.sort_unstable();
        let p99 = sorted.get(sorted.len() * 99 / 100)?;
        (sorted.len() >= Self::TELLING).then(|| (*p99).max(Self::LEAST))
    }
}

/// Broken connections, time-outs and answers of the kind 5xx. What the store has decided stays decided.
fn is_transient(error: &Error) -> bool {
    matches!(error, Error::Generic { .. })
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, future::pending};

    use super::*;

    #[test]
    fn patience_ends_with_the_slowest_of_a_hundred() {
        let mut latencies = Latencies::default();
        for ms in 1..=63 {
            latencies.add(Duration::from_millis(ms));
        }
        assert_eq!(latencies.p99(), None);
        for ms in 64..=1000 {
            latencies.add(Duration::from_millis(ms));
        }
        assert_eq!(latencies.p99(), Some(Duration::from_millis(998))); // Of 745..=1000.
    }

    #[tokio::test]
    async fn a_read_that_hangs_is_overtaken_by_a_second() {
        let (asked, hedged) = (Cell::new(0), Cell::new(0));
        let ask = || {
            asked.set(asked.get() + 1);
            let hangs = asked.get() == 1;
            async move { if hangs { pending().await } else { Ok("bytes") } }
        };
        let read = first_of_two(Some(Duration::ZERO), ask, || hedged.set(1)).await;
        assert_eq!(read.unwrap(), "bytes");
        assert_eq!((asked.get(), hedged.get()), (2, 1));
    }
}
