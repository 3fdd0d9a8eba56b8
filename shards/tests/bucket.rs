//! A dataset in a bucket: the same bytes as in a folder, whatever the network and the cache do to them.
#![expect(clippy::unwrap_used, reason = "helpers of tests are tests too")]

use std::{
    error::Error,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};

use cluster::Epoch;
use object_store::{ObjectStoreExt as _, PutPayload, aws::AmazonS3Builder};
use shards::{
    Augment, Batch, Dataset, Loader, PackOptions, Sample, Transform,
    jpeg::{self, Pixels},
    pack,
};
use tempfile::TempDir;
use testing::{Breakage, Proxy, Rule, S3Server};

const SAMPLES: u32 = 40;
const BLOCK_BYTES: u64 = 4 << 20;
const FILES: [&str; 3] = ["train-000000.tar", "train-000000.idx", "train.json"];

/// A dataset in a folder and in a bucket, and an empty cache.
struct Place {
    folder: TempDir,
    server: S3Server,
    proxy: Proxy,
    whole: Vec<Sample>,
    /// Of its only shard.
    blocks: u64,
}

/// Noise, which no encoder makes small.
fn photo(number: u32) -> Vec<u8> {
    let mut state = number;
    let noise = (0..240 * 240 * 3).map(|_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    });
    jpeg::encode(&noise.collect::<Vec<_>>(), 240, 240, Pixels::Rgb, 95).unwrap()
}

fn chain(error: &dyn Error) -> String {
    let causes = std::iter::successors(Some(error), |&error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

impl Place {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        for number in 0..SAMPLES {
            let class = folder.path().join(format!("src/class{}", number % 2));
            fs::create_dir_all(&class).unwrap();
            fs::write(class.join(format!("{number}.jpg")), photo(number)).unwrap();
        }
        let packed = folder.path().join("packed");
        let location = packed.display().to_string();
        let options = PackOptions { split: "train".to_owned(), ..PackOptions::default() };
        pack(&folder.path().join("src"), &location, &options, &mut |_| ()).unwrap();
        let dataset = Dataset::open(&location, "train").unwrap();
        let blocks = dataset.indexes()[0].tar_length.div_ceil(BLOCK_BYTES);
        assert!(blocks > 1);
        let whole = (0..dataset.len()).map(|sample| dataset.read(sample).unwrap()).collect();

        let server = S3Server::start().await;
        let mut builder = AmazonS3Builder::new().with_bucket_name("test").with_allow_http(true);
        for (name, value) in server.variables() {
            builder = builder.with_config(name.to_lowercase().parse().unwrap(), value);
        }
        let bucket = builder.build().unwrap();
        for name in FILES {
            let bytes = fs::read(packed.join(name)).unwrap();
            let path = format!("sets/noise/{name}").into();
            bucket.put(&path, PutPayload::from(bytes)).await.unwrap();
        }
        let proxy = Proxy::before(server.port()).await;
        Self { folder, server, proxy, whole, blocks }
    }

    fn location(&self) -> String {
        self.server.location("sets/noise")
    }

    /// What a client has in its environment that reaches the server through the proxy.
    fn variables(&self) -> Vec<(String, String)> {
        let mut variables = self.server.variables();
        variables.retain(|(name, _)| name != "AWS_ENDPOINT_URL");
        let endpoint = format!("http://127.0.0.1:{}", self.proxy.port());
        variables.push(("AWS_ENDPOINT_URL".to_owned(), endpoint));
        variables.push(("PERCHERON_DATA_CACHE".to_owned(), self.cache().display().to_string()));
        variables
    }

    fn open(&self) -> Dataset {
        Dataset::open_with(&self.location(), "train", &self.variables()).unwrap()
    }

    /// Opened with nothing in the cache.
    fn open_cold(&self) -> Dataset {
        fs::remove_dir_all(self.cache()).unwrap();
        self.open()
    }

    fn cache(&self) -> PathBuf {
        self.folder.path().join("cache")
    }

    fn packed(&self) -> Dataset {
        Dataset::open(&self.folder.path().join("packed").display().to_string(), "train").unwrap()
    }

    fn breaks(&self, breakage: Breakage, times: u32) {
        self.proxy.add(Rule { method: "GET", path: ".tar", breakage, times });
    }

    /// The sample that the last byte of the first block belongs to, and its offset.
    fn last_of_first_block(&self) -> (u64, u64) {
        let index = self.packed().indexes()[0].clone();
        let mut records = (0..).zip(&index.records);
        let (sample, record) = records
            .find(|(_, record)| record.offset + u64::from(record.length) >= BLOCK_BYTES)
            .unwrap();
        assert!(record.offset < BLOCK_BYTES);
        (sample, record.offset)
    }

    fn assert_whole(&self, dataset: &Dataset) {
        for (sample, expected) in (0..).zip(&self.whole) {
            assert_eq!(&dataset.read(sample).unwrap(), expected);
        }
    }
}

/// The files of the cache.
fn entries(cache: &Path) -> Vec<PathBuf> {
    let parts = fs::read_dir(cache).unwrap().map(|part| part.unwrap().path());
    let files = parts.flat_map(|part| fs::read_dir(part).unwrap());
    files.map(|file| file.unwrap().path()).collect()
}

fn held_bytes(cache: &Path) -> u64 {
    entries(cache).iter().map(|entry| entry.metadata().unwrap().len()).sum()
}

fn batch(dataset: Dataset) -> Batch {
    let transform = Transform::training(&Augment::default(), 64, 7).unwrap();
    let mut batch = Batch::default();
    let ids = [3, 17, 39, 0, 21, 38];
    Loader::new(Arc::new(dataset), transform).load(&ids, Epoch(2), &mut batch).unwrap();
    batch
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bucket_gives_the_bytes_and_pixels_of_the_folder_and_then_the_cache_does() {
    let place = Place::new().await;
    let dataset = place.open();
    place.assert_whole(&dataset);
    let reads = dataset.reads().remote;
    let tar_bytes = dataset.indexes()[0].tar_length;
    let idx_bytes = fs::metadata(place.folder.path().join("packed").join(FILES[1])).unwrap().len();
    assert_eq!(reads.fetched_bytes, tar_bytes + idx_bytes);
    assert_eq!((reads.cache_misses, reads.cache_unkept, reads.retried), (place.blocks + 1, 0, 0));

    let again = place.open();
    place.assert_whole(&again);
    let reads = again.reads().remote;
    assert_eq!((reads.fetched_bytes, reads.cache_misses), (0, 0));
    assert_eq!(reads.cache_hits, place.blocks + 1);

    let expected = batch(place.packed());
    assert_eq!(batch(place.open()), expected);
    assert_eq!(batch(place.open_cold()), expected);
    assert!(entries(&place.cache()).len() > 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_breaks_on_the_way_heals_and_what_is_damaged_for_good_is_named() {
    let place = Place::new().await;
    let dataset = place.open();
    place.breaks(Breakage::SlowDown, 2);
    place.breaks(Breakage::ResetBefore, 1);
    place.breaks(Breakage::ResetAfter, 1);
    place.assert_whole(&dataset);
    let retried = dataset.reads().remote.retried;
    assert!(place.proxy.left() == 0 && (2..=4).contains(&retried), "{retried} retried");

    let dataset = place.open_cold();
    place.breaks(Breakage::Corrupt, 1);
    place.assert_whole(&dataset);
    assert_eq!(place.proxy.left(), 0);
    assert!(dataset.reads().remote.cache_misses > place.blocks + 1);

    let dataset = place.open_cold();
    place.breaks(Breakage::Corrupt, 4); // Both blocks of the sample, twice; its key is then read whole.
    let (sample, offset) = place.last_of_first_block();
    let message = chain(&dataset.read(sample).unwrap_err());
    let shard = format!("{}/train-000000.tar", place.location());
    for part in [&*shard, "(key 0000", &format!("offset {offset}")] {
        assert!(message.contains(part), "{message}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_torn_or_rotten_entry_is_fetched_again() {
    let place = Place::new().await;
    let open = place.open();
    place.assert_whole(&open);
    let entries = entries(&place.cache());
    let intact: Vec<_> = entries.iter().map(|entry| fs::read(entry).unwrap()).collect();
    // Long after their checksums held, and when a process first uses them.
    for (entry, intact) in entries.iter().zip(&intact) {
        fs::write(entry, intact.iter().map(|byte| byte ^ 16).collect::<Vec<_>>()).unwrap();
    }
    place.assert_whole(&open);
    for (entry, intact) in entries.iter().zip(&intact) {
        fs::write(entry, &intact[..intact.len() / 2]).unwrap();
    }
    place.assert_whole(&place.open());
    for (entry, intact) in entries.iter().zip(&intact) {
        assert!(&fs::read(entry).unwrap() == intact);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_limit_is_held_and_readers_of_one_cache_agree() {
    const LIMIT_BYTES: u64 = 17 << 18; // 4.25 MiB, one whole block.
    let place = Place::new().await;
    let limited = |gib: &str| {
        let mut variables = place.variables();
        variables.push(("PERCHERON_DATA_CACHE_GIB".to_owned(), gib.to_owned()));
        Dataset::open_with(&place.location(), "train", &variables)
    };
    let open = || limited("0.004150390625").unwrap();
    let dataset = open();
    for _ in 0..2 {
        place.assert_whole(&dataset);
        assert!(held_bytes(&place.cache()) <= LIMIT_BYTES);
    }
    let reads = dataset.reads().remote;
    assert!(reads.cache_misses > place.blocks + 1 && reads.cache_unkept == 0, "{reads:?}");
    thread::scope(|scope| {
        for dataset in [open(), open(), open()] {
            let place = &place;
            scope.spawn(move || place.assert_whole(&dataset));
        }
    });

    let error = limited("much").unwrap_err().to_string();
    assert!(error.contains("PERCHERON_DATA_CACHE_GIB"), "{error}");
    let nowhere = place.server.location("nothing/here");
    let error = Dataset::open_with(&nowhere, "train", &place.variables()).unwrap_err().to_string();
    assert!(error.contains("has no split \"train\""), "{error}");
}
