//! Sources in a bucket: what is packed and indexed there is what a folder of the same files gives.
#![expect(clippy::unwrap_used, reason = "helpers of tests are tests too")]

use std::{
    collections::BTreeMap,
    error::Error,
    fs,
    path::{Path, PathBuf},
};

use object_store::{ObjectStoreExt as _, aws::AmazonS3Builder};
use shards::{
    PackError, PackOptions, index_tars_with,
    jpeg::{self, Pixels},
    pack_with, verify_dataset,
};
use tempfile::TempDir;
use testing::{Breakage, Proxy, Rule, S3Server};

/// More than are read at a time.
const PHOTOS: u8 = 150;

struct Place {
    folder: TempDir,
    server: S3Server,
}

fn photo(number: u8) -> Vec<u8> {
    jpeg::encode(&[number; 10 * 8 * 3], 10, 8, Pixels::Rgb, 90).unwrap()
}

fn train() -> PackOptions {
    PackOptions { split: "train".to_owned(), seed: 5, ..PackOptions::default() }
}

fn chain(error: &dyn Error) -> String {
    let causes = std::iter::successors(Some(error), |&error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// A folder's files by their path in it.
fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(folder).unwrap().to_owned();
                found.insert(name, fs::read(path).unwrap());
            }
        }
    }
    found
}

impl Place {
    async fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), server: S3Server::start().await }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Class folders, one with a folder in it and hard names.
    fn write_folder(&self) -> PathBuf {
        for number in 0..PHOTOS {
            let class = ["ash", "oak/old", "white fir+%20"][usize::from(number) % 3];
            let folder = self.path("photos").join(class);
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join(format!("{number}.jpg")), photo(number)).unwrap();
        }
        fs::write(self.path("photos/oak/.hidden.jpg"), "none").unwrap();
        fs::write(self.path("photos/README.txt"), "none").unwrap();
        self.path("photos")
    }

    fn write_tars(&self) -> PathBuf {
        let folder = self.path("tars");
        fs::create_dir_all(&folder).unwrap();
        for shard in 0..2 {
            let file = fs::File::create(folder.join(format!("part-{shard}.tar"))).unwrap();
            let mut tar = tar::Builder::new(file);
            let mut add = |name: String, bytes: &[u8]| {
                let mut header = tar::Header::new_ustar();
                header.set_size(bytes.len() as u64);
                tar.append_data(&mut header, name, bytes).unwrap();
            };
            for number in shard * 75..(shard + 1) * 75 {
                add(format!("{number}.jpg"), &photo(number));
                add(format!("{number}.cls"), (number % 3).to_string().as_bytes());
            }
            tar.finish().unwrap();
        }
        fs::write(folder.join("classes.txt"), "ash\noak\nfir\n").unwrap();
        folder
    }

    /// Copies a folder to the bucket, and says where to.
    async fn upload(&self, folder: &Path) -> PathBuf {
        let mut builder = AmazonS3Builder::new().with_bucket_name("test").with_allow_http(true);
        for (name, value) in self.server.variables() {
            builder = builder.with_config(name.to_lowercase().parse().unwrap(), value);
        }
        let bucket = builder.build().unwrap();
        let name = folder.file_name().unwrap().to_str().unwrap();
        for (path, bytes) in files(folder) {
            let key = format!("far/{name}/{}", path.display());
            bucket.put(&object_store::path::Path::parse(key).unwrap(), bytes.into()).await.unwrap();
        }
        PathBuf::from(self.server.location(&format!("far/{name}")))
    }

    fn variables(&self, port: u16) -> Vec<(String, String)> {
        let mut variables = self.server.variables();
        variables.retain(|(name, _)| name != "AWS_ENDPOINT_URL");
        variables.push(("AWS_ENDPOINT_URL".to_owned(), format!("http://127.0.0.1:{port}")));
        let cache = self.path("cache").display().to_string();
        variables.push(("PERCHERON_DATA_CACHE".to_owned(), cache));
        variables
    }

    /// Packs to a folder of this name, and gives its files.
    fn pack(
        &self,
        source: &Path,
        out: &str,
        port: u16,
    ) -> Result<BTreeMap<PathBuf, Vec<u8>>, PackError> {
        let out = self.path(out);
        let variables = self.variables(port);
        let location = out.to_str().unwrap();
        pack_with(source, location, &train(), &variables, &mut |_| ()).map(|_| files(&out))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_folder_in_a_bucket_packs_to_the_bytes_that_a_local_one_does() {
    let place = Place::new().await;
    let near = place.write_folder();
    let far = place.upload(&near).await;
    let breaking = Proxy::before(place.server.port()).await;
    for (path, breakage) in [
        ("list-type=2", Breakage::SlowDown),
        ("ash/3.jpg", Breakage::ResetAfter),
        ("old/4.jpg", Breakage::ResetBefore),
        ("old/7.jpg", Breakage::SlowDown),
    ] {
        breaking.add(Rule { method: "GET", path, breakage, times: 2 });
    }
    let expected = place.pack(&near, "near", 0).unwrap();
    assert_eq!(place.pack(&far, "far", breaking.port()).unwrap(), expected);
    assert_eq!(breaking.left(), 0, "all have broken");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tars_in_a_bucket_are_packed_together_or_alone() {
    let place = Place::new().await;
    let near = place.write_tars();
    let far = place.upload(&near).await;
    let port = place.server.port();
    let expected = place.pack(&near, "near", port).unwrap();
    assert_eq!(place.pack(&far, "far", port).unwrap(), expected);
    let one = "part-1.tar";
    let expected = place.pack(&near.join(one), "near-one", port).unwrap();
    assert_eq!(place.pack(&far.join(one), "far-one", port).unwrap(), expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tars_are_indexed_where_they_lie_in_a_bucket() {
    let place = Place::new().await;
    let near = place.write_tars();
    let far = place.upload(&near).await;
    let variables = place.variables(place.server.port());
    let mut seen = 0;
    let manifest = index_tars_with(&far, &train(), &variables, &mut |at| seen = at.files).unwrap();
    assert_eq!(seen, u64::from(PHOTOS));
    assert_eq!(manifest, index_tars_with(&near, &train(), &[], &mut |_| ()).unwrap());
    let dataset = shards::Dataset::open_with(far.to_str().unwrap(), "train", &variables).unwrap();
    assert_eq!(verify_dataset(&dataset, &mut |_| ()).unwrap().samples, u64::from(PHOTOS));
    let again = index_tars_with(&far, &train(), &variables, &mut |_| ()).unwrap_err();
    assert!(again.to_string().contains("train.json already exists"), "{again}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_there_is_said() {
    let place = Place::new().await;
    let port = place.server.port();
    let refused = |source: &str| chain(&place.pack(Path::new(source), "none", port).unwrap_err());
    let message = refused("s3://test/nothing/here");
    assert_eq!(
        message,
        "source s3://test/nothing/here has no objects: give the prefix of class folders or of tars, \
         or one tar"
    );
    let message = refused("s3://nowhere/at/all");
    assert!(message.starts_with("file s3://nowhere/at/all"), "{message}");
    let message = refused("gs://bucket/images");
    assert!(message.contains("gs://bucket/images is of an unknown kind"), "{message}");
    assert!(refused("builtin:digits").contains("builtin:digits is packed already"));

    // One that vanishes between being listed and being read.
    let far = place.upload(&place.write_folder()).await;
    let gone = Proxy::before(port).await;
    gone.add(Rule { method: "GET", path: "old/4.jpg", breakage: Breakage::SlowDown, times: 99 });
    let message = chain(&place.pack(&far, "none", gone.port()).unwrap_err());
    assert!(
        message.starts_with("file s3://test/far/photos/oak/old/4.jpg cannot be read"),
        "{message}"
    );
    assert!(!place.path("none/train.json").exists());
}
