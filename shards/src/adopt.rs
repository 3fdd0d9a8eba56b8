//! Indexing somebody's WebDataset tars where they lie, without copying them.
//!
//! Each `NAME.tar` of a folder gets a `NAME.idx` beside it, and the folder a manifest. The tars stay as
//! they are, so their order is that of whoever wrote them: for tars sorted by class, pack them instead.

use std::{
    collections::BTreeSet,
    fs::File,
    path::{Path, PathBuf},
};

use crate::{
    dataset::check_split_name,
    digest::Sha256,
    index::{Flags, Index, Record},
    manifest::{Manifest, Policy, Provenance, Shard, VERSION, is_plain_name},
    pack::{
        Checker, PackError, PackOptions, PackProgress, folder_name, manifest_for,
        scan::{self, Listing, SourceFile},
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
    check_split_name(&options.split)?;
    let Listing { classes, files } = scan::scan_webdataset(folder)?;
    let store = Store::create(&folder.display().to_string(), &[])?;
    let manifest_name = manifest_for(&store, &options.split)?;
    let files_total = files.len() as u64;
    let mut checker = Checker::default();
    let mut done = PackProgress { files: 0, files_total, bytes: 0 };
    let (mut shards, mut cmyk) = (Vec::new(), 0);
    for files in files.chunk_by(|one, next| one.file() == next.file()) {
        let mut records = Vec::with_capacity(files.len());
        for file in files {
            let record = check(&mut checker, folder, file)?;
            cmyk += u64::from(record.flags.has(Flags::CMYK));
            records.push(record);
            done = PackProgress {
                files: done.files + 1,
                bytes: done.bytes + u64::from(record.length),
                ..done
            };
            progress(done);
        }
        shards.push(write_index(&store, files[0].file(), records, done.files)?);
    }
    let names: BTreeSet<&String> = shards.iter().map(|shard| &shard.name).collect();
    assert_eq!(names.len(), shards.len(), "the files of a tar are listed together");
    let manifest = Manifest {
        version: VERSION,
        split: options.split.clone(),
        samples: files_total,
        classes,
        provenance: Provenance {
            source: options.source.clone().unwrap_or_else(|| folder_name(folder)),
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

fn check(checker: &mut Checker, folder: &Path, file: &SourceFile) -> Result<Record, PackError> {
    let path = || file.path(folder);
    let image = checker
        .check(file.read()?, None)
        .map_err(|source| PackError::Corrupt { path: path(), source })?;
    if image.flags.has(Flags::RE_ENCODED) {
        return Err(PackError::NotJpeg { path: path() });
    }
    Ok(image.record(file.offset(), file.label))
}

/// Writes the index beside its tar. `after` is the number of samples up to and with this tar's.
fn write_index(
    store: &Store,
    tar: &Path,
    records: Vec<Record>,
    after: u64,
) -> Result<Shard, PackError> {
    let unread = |source| PackError::Read { path: tar.to_owned(), source };
    let name = tar.file_stem().and_then(|name| name.to_str()).filter(|name| is_plain_name(name));
    let name = name.ok_or_else(|| PackError::TarName(PathBuf::from(tar)))?.to_owned();
    let file = File::open(tar).map_err(unread)?;
    let tar_length = file.metadata().map_err(unread)?.len();
    let tar_sha256 = Sha256::of_file(file).map_err(unread)?;
    let samples = records.len() as u64;
    let index = Index { tar_length, tar_sha256, records }.encode();
    let idx_sha256 = Sha256::of(&index);
    let shard = Shard { name, first: after - samples, samples, tar_sha256, idx_sha256 };
    store.write(&shard.idx(), index)?;
    Ok(shard)
}
