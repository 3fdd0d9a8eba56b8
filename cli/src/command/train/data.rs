//! `--data_path`: a dataset of shards, or image folders that become one on first use.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};
use shards::{Dataset, PackOptions, pack};

use super::flags::Line;
use crate::{command::shards::odd_images, print};

/// Where packed images lie, in the folder that they were packed from.
const PACKED: &str = ".percheron-shards";

/// A dataset, and how it is used.
#[derive(Debug, PartialEq)]
pub(super) struct Data {
    pub(super) location: String,
    pub(super) classes: usize,
}

/// The dataset of a command line, packed if it is not; only the split that is named, or both.
///
/// # Errors
/// What is missing, by the name of its flag, or the first image that cannot be used.
pub(super) fn prepare(line: &Line, only: Option<&str>) -> Result<Data> {
    let Some(path) = line.word("data_path") else {
        bail!("--data_path is not given: a dataset of shards, or a folder with the images");
    };
    let location = match sources(line, path)? {
        None => path.to_owned(),
        Some(sources) => packed("--data_path", path, &sources, only)?,
    };
    let split = only.unwrap_or("train");
    let dataset = Dataset::open(&location, split).context("--data_path")?;
    Ok(Data { location, classes: dataset.classes().len() })
}

/// The image folders of the two splits; nothing if the path is a dataset already.
fn sources(line: &Line, path: &str) -> Result<Option<[(&'static str, PathBuf); 2]>> {
    if path.contains("://") || path.starts_with("builtin:") {
        return Ok(None);
    }
    let folder = Path::new(path);
    if folder.join("train.json").is_file() || folder.join("val.json").is_file() {
        return Ok(None);
    }
    let both = |train: PathBuf, val: PathBuf| Some([("train", train), ("val", val)]);
    let sources = match line.word_or_default("data_set") {
        Some("IMNET") => both(folder.join("train"), folder.join("val")),
        Some("image_folder") => {
            let Some(val) = line.word("eval_data_path") else {
                bail!(
                    "--data_set image_folder needs --eval_data_path, the folder with the images to evaluate on"
                );
            };
            both(folder.to_owned(), PathBuf::from(val))
        }
        Some("CIFAR") => both(folder.join("train.bin"), folder.join("test.bin")),
        other => bail!(
            "--data_set {:?}: it must be IMNET, image_folder or CIFAR",
            other.unwrap_or_default()
        ),
    };
    Ok(sources)
}

/// Puts shards in the place of an image folder in the words of `percheron eval`: of `--data DIR` with `DIR/train`
/// or `DIR/val`, those that are there are packed on first use.
///
/// # Errors
/// The first image that cannot be used.
pub(in crate::command) fn for_evaluation(mut words: Vec<OsString>) -> Result<Vec<OsString>> {
    let Some(place) = words.iter().position(|word| word == "--data").map(|flag| flag + 1) else {
        return Ok(words);
    };
    let Some(data) = words.get(place).and_then(|word| word.to_str()).map(str::to_owned) else {
        return Ok(words);
    };
    let folder = Path::new(&data);
    let is_packed = ["train.json", "val.json"].iter().any(|name| folder.join(name).is_file());
    let splits = ["train", "val"].map(|split| (split, folder.join(split)));
    let there: Vec<(&str, PathBuf)> =
        splits.into_iter().filter(|(_, images)| images.is_dir()).collect();
    if !is_packed && !there.is_empty() {
        words[place] = packed("--data", &data, &there, None)?.into();
    }
    Ok(words)
}

/// Packs what is not packed yet; returns where the dataset lies.
fn packed(
    flag: &str,
    path: &str,
    sources: &[(&str, PathBuf)],
    only: Option<&str>,
) -> Result<String> {
    let out = std::path::absolute(Path::new(path).join(PACKED)).context(flag.to_owned())?;
    let location = out.to_str().with_context(|| format!("{flag}: the path is not UTF-8"))?;
    let location = location.to_owned();
    for (split, source) in sources {
        let wanted = only.is_none_or(|only| only == *split);
        if !wanted || out.join(format!("{split}.json")).is_file() {
            continue;
        }
        ensure!(
            source.exists(),
            "{flag}: there is no {}: it must hold the images of split {split}, one folder a class",
            source.display()
        );
        print::err(&format!(
            "packing {} into {location}; the next run finds it there",
            source.display()
        ));
        let options = PackOptions { split: (*split).to_owned(), ..PackOptions::default() };
        let manifest = pack(source, &location, &options, &mut |_| {}).with_context(|| {
            format!(
                "{flag}: {} cannot be packed (`percheron shards pack` has more choices)",
                source.display()
            )
        })?;
        let (samples, classes) = (print::grouped(manifest.samples), manifest.classes.len());
        print::err(&format!("packed split {split}: {samples} images of {classes} classes"));
        odd_images(&manifest).iter().for_each(|note| print::err(note));
    }
    Ok(location)
}
