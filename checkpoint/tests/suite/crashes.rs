//! A process dies at any operation on the store, before or after it took effect, and the next goes on:
//! the newest checkpoint can always be read, and none that was reported as committed is missing.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use async_trait::async_trait;
use bytes::Bytes;
use checkpoint::{
    Checkpoint, Retention, Store, commit, committed_steps, newest_intact, prune, save_part,
};
use cluster::{Rank, Step};
use futures::{StreamExt as _, stream::BoxStream};
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, memory::InMemory,
    path::Path,
};
use testing::Chance;

use crate::fixture::{in_memory, layout, manifest, state};

/// Lives that end in a crash, over all seeds.
const CRASHES: u64 = 10_000;
/// Steps between two checkpoints.
const EVERY: u64 = 10;

/// The store as one process sees it: after so many operations the process is dead, and nothing that it
/// still asks for is done.
#[derive(Debug)]
struct Mortal {
    objects: Arc<InMemory>,
    /// Operations left.
    left: AtomicU64,
    /// Whether the last one takes effect, unheard of.
    last_takes_effect: bool,
    dead: AtomicBool,
}

#[derive(Debug, PartialEq, Eq)]
enum Fate {
    Lives,
    DiesBefore,
    DiesAfter,
}

impl Mortal {
    fn fate(&self) -> Fate {
        if self.dead.load(Ordering::SeqCst) {
            return Fate::DiesBefore;
        }
        if self.left.fetch_sub(1, Ordering::SeqCst) > 1 {
            return Fate::Lives;
        }
        self.dead.store(true, Ordering::SeqCst);
        if self.last_takes_effect { Fate::DiesAfter } else { Fate::DiesBefore }
    }
}

fn dead() -> Error {
    // Not transient: the process does not try again.
    Error::NotImplemented { operation: "anything".to_owned(), implementer: "the dead".to_owned() }
}

impl fmt::Display for Mortal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Mortal")
    }
}

#[async_trait]
impl ObjectStore for Mortal {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> Result<PutResult> {
        match self.fate() {
            Fate::Lives => self.objects.put_opts(location, payload, options).await,
            Fate::DiesBefore => Err(dead()),
            Fate::DiesAfter => {
                self.objects.put_opts(location, payload, options).await.and(Err(dead()))
            }
        }
    }

    async fn put_multipart_opts(
        &self,
        _location: &Path,
        _options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        Err(dead()) // Not used.
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        match self.fate() {
            Fate::Lives => self.objects.get_opts(location, options).await,
            Fate::DiesBefore | Fate::DiesAfter => Err(dead()),
        }
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        match self.fate() {
            Fate::Lives => self.objects.delete_stream(locations),
            Fate::DiesBefore => futures::stream::once(async { Err(dead()) }).boxed(),
            Fate::DiesAfter => {
                self.objects.delete_stream(locations).map(|done| done.and(Err(dead()))).boxed()
            }
        }
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        match self.fate() {
            Fate::Lives => self.objects.list(prefix),
            Fate::DiesBefore | Fate::DiesAfter => {
                futures::stream::once(async { Err(dead()) }).boxed()
            }
        }
    }

    async fn list_with_delimiter(&self, _prefix: Option<&Path>) -> Result<ListResult> {
        Err(dead()) // Not used.
    }

    async fn copy_opts(&self, _from: &Path, _to: &Path, _options: CopyOptions) -> Result<()> {
        Err(dead()) // Not used.
    }
}

fn view(objects: Arc<dyn ObjectStore>) -> Store {
    Store::new(objects, Path::from("run"), "memory:///run")
}

/// One process: from the newest checkpoint on it keeps states, and prunes. Adds the steps that it knows
/// to be committed to `known`; ends where it dies.
async fn live(
    store: &Store,
    ranks: u32,
    known: &mut Vec<u64>,
) -> Result<(), Box<dyn std::error::Error>> {
    let newest = newest_intact(store, None).await?.map_or(0, |step| step.0);
    for step in (newest + EVERY..).step_by(usize::try_from(EVERY).unwrap()).map(Step) {
        let (layout, state) = (layout(), state(step));
        let mut parts = Vec::new();
        for rank in (0..ranks).map(Rank) {
            for part in layout.share(rank, ranks) {
                let bytes = Bytes::copy_from_slice(&state[in_memory(layout.part_range(part))]);
                parts.push(save_part(store, &layout, step, part, bytes).await?);
            }
        }
        commit(store, &manifest(step, parts, &format!("{step} by {ranks}"))).await?;
        known.push(step.0);
        let retention = Retention { newest: 2, every_steps: 0, best: false };
        for old in retention.prunable(&committed_steps(store).await?, &[]) {
            prune(store, old).await?;
        }
    }
    Ok(())
}

#[tokio::test]
async fn whenever_a_process_dies_the_newest_checkpoint_is_whole_and_none_is_lost() {
    let (mut crashes, mut reached) = (0, 0);
    for seed in 0.. {
        let mut chance = Chance::new(seed);
        let objects = Arc::new(InMemory::new());
        let mut known = Vec::new();
        for life in 0..4 {
            let mortal = Mortal {
                objects: Arc::clone(&objects),
                left: AtomicU64::new(1 + chance.below(90)),
                last_takes_effect: chance.below(2) == 1,
                dead: AtomicBool::new(false),
            };
            let ranks = u32::try_from(1 + chance.below(4)).unwrap();
            live(&view(Arc::new(mortal)), ranks, &mut known).await.expect_err("it dies");
            crashes += 1;

            let store = view(Arc::clone(&objects) as _);
            let place = format!("seed {seed}, life {life}");
            let kept = committed_steps(&store).await.unwrap();
            assert!(kept.first().map(|step| step.0) >= known.last().copied(), "{place}: {kept:?}");
            assert!(kept.len() >= known.len().min(2), "{place}: {kept:?} of {known:?}");
            for step in kept {
                let checkpoint = Checkpoint::open(&store, step).await.unwrap_or_else(|error| {
                    panic!("{place}: {error}");
                });
                let mut loaded = vec![0; state(step).len()];
                let mut sink = |range: std::ops::Range<u64>, bytes: &[u8]| {
                    loaded[in_memory(range)].copy_from_slice(bytes);
                };
                let read = checkpoint.read(&mut sink).await;
                read.unwrap_or_else(|error| panic!("{place}: {error}"));
                assert_eq!(loaded, state(step), "{place}: step {step}");
            }
        }
        reached = reached.max(known.last().copied().unwrap_or(0));
        if crashes >= CRASHES {
            break;
        }
    }
    assert!(reached >= 10 * EVERY, "the lives are too short to show anything: {reached}");
    println!("{crashes} crashes, up to step {reached}");
}
