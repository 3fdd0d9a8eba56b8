//! Indexing somebody's WebDataset tars where they lie, without copying them.
//!
//! Each `NAME.tar` of a folder gets a `NAME.idx` beside it, and the folder a manifest. The tars stay as
//! they are, so their order is that of whoever wrote them: for tars sorted by class, pack them instead.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use crate::{
    dataset::check_split_name,
    digest::Sha256,
    index::{Flags, Index, Record},
    manifest::{Manifest, Policy, Provenance, Shard, VERSION, is_plain_name},
    pack::{
        Checker, PackError, PackOptions, PackProgress, READ_AHEAD, folder_name, manifest_for,
        scan::{self, Listing, SourceFile},
        tree::Tree,
    },
    source::{SourceError, Store},
};

/// Writes the indexes and the manifest of the WebDataset tars in `folder`, as a split of a dataset that
/// is this folder, and returns the manifest. Every image is decoded once as a check.
///
/// Of `options` the seed and what to do with corrupt files are not used: nothing is shuffled, and
/// nothing can be left out of a tar that stays as it is.
///
/// # Errors
/// [`PackError`]; [`PackError::NotJpeg`] if there are images that would have to be converted.
pub fn index_tars(
    folder: &Path,
    options: &PackOptions,
    progress: &mut dyn FnMut(PackProgress),
) -> Result<Manifest, PackError> {
    let variables: Vec<_> = bucket::environment().collect();
    index_tars_with(folder, options, &variables, progress)
}

/// [`index_tars`] with the variables of another environment than the process's.
///
/// # Errors
/// As [`index_tars`].
pub fn index_tars_with(
    folder: &Path,
    options: &PackOptions,
    variables: &[(String, String)],
    progress: &mut dyn FnMut(PackProgress),
) -> Result<Manifest, PackError> {
    check_split_name(&options.split)?;
    let tree = Tree::open(folder, variables)?;
    let Listing { classes, files } = scan::scan_webdataset(&tree)?;
    let store = Store::create(&tree.root().display().to_string(), variables)?;
    let manifest_name = manifest_for(&store, &options.split)?;
    let files_total = files.len() as u64;
    let mut checker = Checker::default();
    let mut done = PackProgress { files: 0, files_total, bytes: 0 };
    let (mut shards, mut cmyk) = (Vec::new(), 0);
    for files in files.chunk_by(|one, next| one.file() == next.file()) {
        let mut records = Vec::with_capacity(files.len());
        for (file, bytes) in files.iter().zip(read_ahead(&tree, files)) {
            let record = check(&mut checker, tree.root(), file, bytes?)?;
            cmyk += u64::from(record.flags.has(Flags::CMYK));
            records.push(record);
            done = PackProgress {
                files: done.files + 1,
                bytes: done.bytes + u64::from(record.length),
                ..done
            };
            progress(done);
        }
        shards.push(write_index(&store, &tree, files[0].file(), records, done.files)?);
    }
    let names: BTreeSet<&String> = shards.iter().map(|shard| &shard.name).collect();
    assert_eq!(names.len(), shards.len(), "the files of a tar are listed together");
    let manifest = Manifest {
        version: VERSION,
        split: options.split.clone(),
        samples: files_total,
        classes,
        provenance: Provenance {
            source: options.source.clone().unwrap_or_else(|| folder_name(tree.root())),
            seed: 0,
            policy: Policy::KeepTars,
            converted: 0,
            cmyk,
            deep: 0,
            skipped: Vec::new(),
            attribution: options.attribution.clone(),
            licence: options.licence.clone(),
        },
        shards,
    };
    match store.write_new(&manifest_name, manifest.encode()) {
        Err(SourceError::Exists { file }) => Err(PackError::AlreadyPacked { manifest: file }),
        written => Ok(written.map(|()| manifest)?),
    }
}

/// The bytes of images, some at a time.
fn read_ahead(
    tree: &Tree,
    files: &[SourceFile],
) -> impl Iterator<Item = Result<Vec<u8>, PackError>> {
    files
        .chunks(READ_AHEAD)
        .flat_map(|files| scan::read_many(tree, &files.iter().collect::<Vec<_>>()))
}

fn check(
    checker: &mut Checker,
    folder: &Path,
    file: &SourceFile,
    bytes: Vec<u8>,
) -> Result<Record, PackError> {
    let path = || file.path(folder);
    let image =
        checker.check(bytes, None).map_err(|source| PackError::Corrupt { path: path(), source })?;
    if image.flags.has(Flags::RE_ENCODED) {
        return Err(PackError::NotJpeg { path: path() });
    }
    Ok(image.record(file.offset(), file.label))
}

/// Writes the index beside its tar. `after` is the number of samples up to and with this tar's.
fn write_index(
    store: &Store,
    tree: &Tree,
    tar: &Path,
    records: Vec<Record>,
    after: u64,
) -> Result<Shard, PackError> {
    let unread = |error| PackError::unread(tar, error);
    let name = tar.file_stem().and_then(|name| name.to_str()).filter(|name| is_plain_name(name));
    let name = name.ok_or_else(|| PackError::TarName(PathBuf::from(tar)))?.to_owned();
    let tar_length = tree.length(tar).map_err(unread)?;
    let tar_sha256 = tree.sha256(tar).map_err(unread)?;
    let samples = records.len() as u64;
    let index = Index { tar_length, tar_sha256, records }.encode();
    let idx_sha256 = Sha256::of(&index);
    let shard = Shard { name, first: after - samples, samples, tar_sha256, idx_sha256 };
    store.write(&shard.idx(), index)?;
    Ok(shard)
}
