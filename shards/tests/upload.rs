//! Packing into a bucket: the files that a folder gets, whatever the network does, and taken up where it was
//! cut short.
#![expect(clippy::unwrap_used, reason = "helpers of tests are tests too")]

use std::{error::Error, fs, path::PathBuf};

use futures::TryStreamExt as _;
use object_store::{ObjectStore, ObjectStoreExt as _, aws::AmazonS3Builder, prefix::PrefixStore};
use shards::{
    Dataset, Manifest, PackError, PackOptions,
    jpeg::{self, Pixels},
    pack, pack_with, verify_dataset,
};
use tempfile::TempDir;
use testing::{Breakage, Proxy, Rule, S3Server};

/// One shard has at most 2048 samples.
const FIRST_SHARD: u64 = 2048;
const SAMPLES: u64 = FIRST_SHARD + 12;

/// Images, and a server to pack them to.
struct Place {
    folder: TempDir,
    server: S3Server,
}

/// Noise, which no encoder makes small.
fn photo(number: u32) -> Vec<u8> {
    let mut state = number;
    let noise = (0..44 * 44 * 3).map(|_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    });
    jpeg::encode(&noise.collect::<Vec<_>>(), 44, 44, Pixels::Rgb, 95).unwrap()
}

fn chain(error: &dyn Error) -> String {
    let causes = std::iter::successors(Some(error), |&error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

fn train() -> PackOptions {
    PackOptions { split: "train".to_owned(), seed: 3, ..PackOptions::default() }
}

impl Place {
    /// Two classes. The first shard is longer than a part of an upload.
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let photos: Vec<_> = (0..32).map(photo).collect();
        for class in ["ash", "oak"] {
            fs::create_dir_all(folder.path().join("src").join(class)).unwrap();
        }
        for (number, photo) in
            photos.iter().cycle().take(usize::try_from(SAMPLES).unwrap()).enumerate()
        {
            let class = ["ash", "oak"][number % 2];
            fs::write(folder.path().join(format!("src/{class}/{number}.jpg")), photo).unwrap();
        }
        Self { folder, server: S3Server::start().await }
    }

    fn source(&self) -> PathBuf {
        self.folder.path().join("src")
    }

    fn location(&self) -> String {
        self.server.location("sets/trees")
    }

    /// What a client has in its environment that speaks to `port`.
    fn variables(&self, port: u16) -> Vec<(String, String)> {
        let mut variables = self.server.variables();
        variables.retain(|(name, _)| name != "AWS_ENDPOINT_URL");
        variables.push(("AWS_ENDPOINT_URL".to_owned(), format!("http://127.0.0.1:{port}")));
        let cache = self.folder.path().join("cache").display().to_string();
        variables.push(("PERCHERON_DATA_CACHE".to_owned(), cache));
        variables
    }

    /// Packs into the bucket, and says where in the packing order it began.
    fn pack(&self, port: u16) -> (Option<u64>, Result<Manifest, PackError>) {
        let mut began = None;
        let variables = self.variables(port);
        let packed =
            pack_with(&self.source(), &self.location(), &train(), &variables, &mut |progress| {
                began.get_or_insert(progress.files - 1);
            });
        (began, packed)
    }

    /// The server's objects, without the network that breaks.
    fn bucket(&self) -> impl ObjectStore {
        let mut builder = AmazonS3Builder::new().with_bucket_name("test").with_allow_http(true);
        for (name, value) in self.server.variables() {
            builder = builder.with_config(name.to_lowercase().parse().unwrap(), value);
        }
        PrefixStore::new(builder.build().unwrap(), "sets/trees")
    }

    async fn objects(&self) -> Vec<String> {
        let listed: Vec<_> = self.bucket().list(None).try_collect().await.unwrap();
        let mut names: Vec<_> = listed.iter().map(|found| found.location.to_string()).collect();
        names.sort();
        names
    }

    async fn object(&self, name: &str) -> Vec<u8> {
        self.bucket().get(&name.into()).await.unwrap().bytes().await.unwrap().to_vec()
    }

    async fn put(&self, name: &str, bytes: Vec<u8>) {
        self.bucket().put(&name.into(), bytes.into()).await.unwrap();
    }

    fn open(&self) -> Dataset {
        let variables = self.variables(self.server.port());
        Dataset::open_with(&self.location(), "train", &variables).unwrap()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_packing_that_a_broken_connection_cuts_short_is_taken_up_and_ends_as_in_a_folder() {
    let place = Place::new().await;
    let in_folder = place.folder.path().join("packed").display().to_string();
    let expected = pack(&place.source(), &in_folder, &train(), &mut |_| ()).unwrap();
    assert_eq!(expected.shards.len(), 2);

    let broken = Proxy::before(place.server.port()).await;
    let heals = |method, path, breakage| Rule { method, path, breakage, times: 1 };
    broken.add(heals("PUT", "partNumber=1", Breakage::SlowDown));
    broken.add(heals("PUT", "partNumber=2", Breakage::ResetBefore));
    broken.add(heals("POST", "uploadId=", Breakage::ResetAfter));
    broken.add(heals("PUT", "train-000000.idx", Breakage::ResetAfter));
    let never = u32::MAX;
    let rule = heals("PUT", "train-000001.tar", Breakage::ResetBefore);
    broken.add(Rule { times: never, ..rule });
    let (began, cut) = place.pack(broken.port());
    let cut = cut.unwrap_err();
    assert_eq!(began, Some(0));
    let message = chain(&cut);
    let file = format!("file {}/train-000001.tar cannot be written", place.location());
    assert!(message.starts_with(&file), "{message}");
    assert!(broken.left() < never && never - broken.left() < 100, "the others have all broken");
    let variables = place.variables(place.server.port());
    let unopened = Dataset::open_with(&place.location(), "train", &variables).unwrap_err();
    assert!(unopened.to_string().contains("train.json is missing"), "{unopened}");

    let heals_too = Proxy::before(place.server.port()).await;
    for breakage in [Breakage::ResetAfter, Breakage::SlowDownAfter, Breakage::SlowDown] {
        heals_too.add(heals("PUT", "train-000001.tar", breakage));
        heals_too.add(heals("PUT", "train.json", breakage));
    }
    let (began, packed) = place.pack(heals_too.port());
    assert_eq!(packed.unwrap(), expected);
    assert_eq!(began, Some(FIRST_SHARD), "the first shard is not packed again");
    let report = verify_dataset(&place.open(), &mut |_| ()).unwrap();
    assert_eq!((report.samples, report.shards), (SAMPLES, 2));

    // What is there is not touched, and there is nothing else.
    let (began, again) = place.pack(place.server.port());
    let message = again.unwrap_err().to_string();
    assert!(message.contains("train.json already exists and is not overwritten"), "{message}");
    assert_eq!(began, None);
    let names = ["train-000000.idx", "train-000000.tar", "train-000001.idx", "train-000001.tar"];
    assert_eq!(place.objects().await, [&names[..], &["train.json"]].concat());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_packings_shard_is_not_taken_for_ones_own() {
    let place = Place::new().await;
    let cut = Proxy::before(place.server.port()).await;
    let never = Rule { method: "PUT", path: "000001.tar", breakage: Breakage::SlowDown, times: 99 };
    cut.add(never);
    place.pack(cut.port()).1.unwrap_err();

    // As if another had begun here since: a file of the same length under the same name.
    let whole = place.object("train-000000.tar").await;
    let mut other = whole.clone();
    other[700] ^= 1;
    place.put("train-000000.tar", other).await;
    let (began, packed) = place.pack(place.server.port());
    packed.unwrap();
    assert_eq!(began, Some(0));
    assert!(place.object("train-000000.tar").await == whole);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_bucket_refuses_is_said_before_anything_is_packed() {
    let place = Place::new().await;
    let right = place.variables(place.server.port());
    let refused = |location: &str, variables: &[(String, String)]| {
        let mut packed = 0;
        let error = pack_with(&place.source(), location, &train(), variables, &mut |_| packed += 1);
        assert_eq!(packed, 0, "{location}");
        chain(&error.unwrap_err())
    };
    let message = refused("s3://nowhere/sets", &right);
    assert!(message.starts_with("file s3://nowhere/sets/train.partial cannot be"), "{message}");
    let mut wrong = right.clone();
    wrong.retain(|(name, _)| name != "AWS_SECRET_ACCESS_KEY");
    wrong.push(("AWS_SECRET_ACCESS_KEY".to_owned(), "wrong".to_owned()));
    let message = refused(&place.location(), &wrong);
    assert!(message.starts_with(&format!("file {}/train.json cannot be", place.location())));
    let message = refused("s3:///sets", &right);
    assert_eq!(message, "location s3:///sets is not s3://BUCKET/PREFIX");
}
