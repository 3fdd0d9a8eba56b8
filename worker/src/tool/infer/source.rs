//! Where the images come from: shards, or files that nobody has packed.

use std::{ops::Range, path::Path, sync::Arc};

use anyhow::Result;
use cluster::Epoch;
use recipe::Recipe;
use shards::{Batch, Dataset, LooseImages, Transform};
use tch::Tensor;

use crate::{
    setup::images,
    tool::eval::sets::{Reader, tensor},
};

/// Images in an order.
pub(super) enum Source {
    Shards { dataset: Arc<Dataset>, reader: Box<Reader> },
    Loose(Box<Loose>),
}

/// Files, and what showing them needs.
pub(super) struct Loose {
    images: LooseImages,
    transform: Transform,
    pixels: Batch,
    planes: Vec<f32>,
}

impl Source {
    /// Opens what `source` names; images are shown as the recipe's evaluation shows them.
    pub(super) fn open(source: &str, split: Option<&str>, recipe: &Recipe) -> Result<Self> {
        let augment = images::augment(recipe)?;
        let transform = Transform::evaluation(&augment, recipe.model.input_size)?;
        let split = split.unwrap_or(&recipe.data.validation);
        let has_scheme = source.contains("://") || source.starts_with("builtin:");
        if has_scheme || Path::new(source).join(format!("{split}.json")).is_file() {
            let dataset = Arc::new(Dataset::open(source, split)?);
            let reader = Box::new(Reader::new(Arc::clone(&dataset), transform));
            return Ok(Self::Shards { dataset, reader });
        }
        let images = LooseImages::list(Path::new(source))?;
        let (pixels, planes) = (Batch::new(), Vec::new());
        Ok(Self::Loose(Box::new(Loose { images, transform, pixels, planes })))
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Self::Shards { dataset, .. } => {
                usize::try_from(dataset.len()).expect("ids are counted in memory")
            }
            Self::Loose(loose) => loose.images.len(),
        }
    }

    /// What an image is called: its path, or its key in the shards.
    pub(super) fn name(&self, index: usize) -> String {
        match self {
            Self::Shards { dataset, .. } => dataset.key_of(index as u64),
            Self::Loose(loose) => loose.images.name(index).to_owned(),
        }
    }

    /// A range of the images, `[B, 3, S, S]`.
    pub(super) fn read(&mut self, range: Range<usize>) -> Result<Tensor> {
        match self {
            Self::Shards { reader, .. } => {
                let ids: Vec<u64> = range.map(|index| index as u64).collect();
                reader.read(&ids, Epoch(0))
            }
            Self::Loose(loose) => {
                let Loose { images, transform, pixels, planes } = &mut **loose;
                images.load(range, transform, pixels)?;
                transform.normalize().nchw(pixels, planes);
                Ok(tensor(planes, pixels.size))
            }
        }
    }
}
