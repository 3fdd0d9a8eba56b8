//! What a split holds, by its indexes alone: sizes, classes, kinds of images.

use serde::Serialize;

use crate::{
    dataset::{Dataset, OpenError},
    index::{Flags, Record},
};

/// Sizes of sides are counted in steps of so many pixels.
pub const SIDE_STEP: usize = 64;

/// Steps of the count of sides; the last has everything larger.
pub const SIDE_STEPS: usize = 33;

/// What a split holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Stats {
    /// Samples.
    pub samples: u64,
    /// Shards.
    pub shards: u64,
    /// Bytes of all encoded images.
    pub bytes: u64,
    /// Bytes of the archives.
    pub tar_bytes: u64,
    /// Bytes of an encoded image.
    pub image_bytes: Spread,
    /// Columns of an image.
    pub width: Spread,
    /// Rows of an image.
    pub height: Spread,
    /// How many images have a short side of `i * SIDE_STEP` to `(i + 1) * SIDE_STEP - 1` pixels.
    pub short_sides: Vec<u64>,
    /// Samples of each class, in the order of the labels.
    pub classes: Vec<ClassCount>,
    /// Kinds of images.
    pub kinds: Kinds,
}

/// The smallest, the middle and the largest of some numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Spread {
    /// The smallest.
    pub min: u64,
    /// Half are below or equal, half above or equal.
    pub median: u64,
    /// The largest.
    pub max: u64,
}

/// How many samples a class has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ClassCount {
    /// Its name.
    pub name: String,
    /// Its samples.
    pub samples: u64,
}

/// How many images are of which kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Kinds {
    /// Colour, chroma at full resolution.
    pub chroma_444: u64,
    /// Chroma halved in width.
    pub chroma_422: u64,
    /// Chroma halved both ways.
    pub chroma_420: u64,
    /// Any other sampling.
    pub chroma_other: u64,
    /// One grey channel.
    pub grey: u64,
    /// CMYK or YCCK; counted by their sampling too.
    pub cmyk: u64,
    /// Encoded anew when they were packed; counted by their sampling too.
    pub re_encoded: u64,
}

impl Kinds {
    fn count(&mut self, flags: Flags) {
        let sampling = if flags.has(Flags::GREY) {
            &mut self.grey
        } else {
            match flags.chroma() {
                Flags::CHROMA_444 => &mut self.chroma_444,
                Flags::CHROMA_422 => &mut self.chroma_422,
                Flags::CHROMA_420 => &mut self.chroma_420,
                _ => &mut self.chroma_other,
            }
        };
        *sampling += 1;
        self.cmyk += u64::from(flags.has(Flags::CMYK));
        self.re_encoded += u64::from(flags.has(Flags::RE_ENCODED));
    }
}

/// What the split `split` at `location` holds. Reads the manifest and the indexes, no image.
///
/// # Errors
/// [`OpenError`] if the split cannot be opened.
pub fn stats(location: &str, split: &str) -> Result<Stats, OpenError> {
    let dataset = Dataset::open(location, split)?;
    let records = || dataset.indexes().iter().flat_map(|index| &index.records);
    let mut stats = Stats {
        samples: dataset.len(),
        shards: dataset.indexes().len() as u64,
        bytes: records().map(|record| u64::from(record.length)).sum(),
        tar_bytes: dataset.indexes().iter().map(|index| index.tar_length).sum(),
        image_bytes: spread(records().map(|record| record.length.into())),
        width: spread(records().map(|record| record.width.into())),
        height: spread(records().map(|record| record.height.into())),
        short_sides: vec![0; SIDE_STEPS],
        classes: dataset
            .classes()
            .iter()
            .map(|name| ClassCount { name: name.clone(), samples: 0 })
            .collect(),
        kinds: Kinds::default(),
    };
    for record in records() {
        stats.short_sides[side_step(record)] += 1;
        stats.classes[record.label as usize].samples += 1;
        stats.kinds.count(record.flags);
    }
    Ok(stats)
}

fn side_step(record: &Record) -> usize {
    (usize::from(record.width.min(record.height)) / SIDE_STEP).min(SIDE_STEPS - 1)
}

fn spread(numbers: impl Iterator<Item = u64>) -> Spread {
    let mut numbers: Vec<u64> = numbers.collect();
    numbers.sort_unstable();
    match (numbers.first(), numbers.last()) {
        (Some(&min), Some(&max)) => Spread { min, median: numbers[(numbers.len() - 1) / 2], max },
        (None, _) | (_, None) => Spread::default(),
    }
}
