//! Images that are in no shard, and of which nobody says the class: to be shown to a network as in evaluation.
//!
//! A source is an image file, a folder with images in it or in folders below it, or a tar of images. Each image is
//! shown as if it had been packed.

use std::{ops::Range, path::Path};

use cluster::Epoch;

use crate::{
    batch::Batch,
    decode::Decoder,
    image::CHANNELS,
    jpeg::{Header, JpegError, Opened, PIXELS_MAX},
    pack::{
        CorruptImage, PackError, as_jpeg,
        scan::{SourceFile, read_many, scan_unlabelled},
        tree::Tree,
        within,
    },
    transform::{Scratch, Transform, TransformError},
};

/// A list of images, and what reading them needs. It keeps its buffers between batches.
#[derive(Debug)]
pub struct LooseImages {
    tree: Tree,
    files: Vec<SourceFile>,
    viewer: Viewer,
}

/// Shows encoded images that lie in memory. It keeps its buffers between images.
#[derive(Debug)]
pub struct Viewer {
    decoder: Decoder,
    scratch: Scratch,
    pixels_max: usize,
}

/// An encoded image that cannot be shown.
#[derive(Debug, thiserror::Error)]
pub enum ShowError {
    /// It is not a whole image, or shows nothing.
    #[error(transparent)]
    Corrupt(#[from] CorruptImage),
    /// It does not suit the transform.
    #[error(transparent)]
    Transform(#[from] TransformError),
}

impl Viewer {
    /// Shows images of at most `pixels_max` pixels.
    #[must_use]
    pub fn new(pixels_max: usize) -> Self {
        Self { decoder: Decoder::new(), scratch: Scratch::new(), pixels_max }
    }

    /// Writes an encoded image, JPEG or PNG, into `pixels` `[size, size, 3]`, as `transform` shows it.
    ///
    /// # Errors
    /// [`ShowError`]; `pixels` then holds nothing of meaning.
    pub fn show(
        &mut self,
        encoded: Vec<u8>,
        transform: &Transform,
        pixels: &mut [u8],
    ) -> Result<(), ShowError> {
        let jpeg = as_jpeg(encoded, self.pixels_max)?;
        let damaged = |error: JpegError| CorruptImage::from(error);
        let image = Opened::new(&jpeg).map_err(damaged)?;
        let Header { width, height, .. } = image.header();
        within(self.pixels_max, width, height)?;
        if (width, height) == (1, 1) {
            return Err(CorruptImage::SinglePixel.into());
        }
        let part = transform.part(width, height, Epoch(0), 0);
        let part = self.decoder.decode_part(image, part).map_err(damaged)?;
        let scratch = &mut self.scratch;
        transform.apply_to_part(part, (width, height), Epoch(0), 0, scratch, pixels)?;
        Ok(())
    }
}

/// Images that cannot be listed or shown.
#[derive(Debug, thiserror::Error)]
pub enum LooseError {
    /// The source cannot be read, or has no images.
    #[error(transparent)]
    Source(#[from] PackError),
    /// A file is not a whole image.
    #[error("{image} cannot be used: repair it or leave it out")]
    Corrupt {
        /// Its path inside the source.
        image: String,
        /// What is wrong with it.
        #[source]
        source: CorruptImage,
    },
    /// The image does not suit the transform.
    #[error("{image} cannot be transformed")]
    Transform {
        /// Its path inside the source.
        image: String,
        /// What is wrong.
        #[source]
        source: TransformError,
    },
}

impl LooseImages {
    /// Lists the images of a source, in the order of their paths; of a tar, in its own order.
    ///
    /// # Errors
    /// [`LooseError`] if the source cannot be read or has no .jpg, .jpeg or .png file.
    pub fn list(source: &Path) -> Result<Self, LooseError> {
        let variables: Vec<_> = bucket::environment().collect();
        let tree = Tree::open(source, &variables)?;
        let files = scan_unlabelled(&tree)?;
        Ok(Self { tree, files, viewer: Viewer::new(PIXELS_MAX) })
    }

    /// How many images there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.files.len()
    }

    /// Whether there is none. There always is one.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// The path of an image inside the source.
    ///
    /// # Panics
    /// If there are not so many.
    #[must_use]
    pub fn name(&self, index: usize) -> &str {
        &self.files[index].name
    }

    /// Fills `batch` with a range of the images. All labels are 0, because nobody knows them.
    ///
    /// # Errors
    /// [`LooseError`] names the first image that cannot be shown. `batch` then holds nothing of meaning.
    ///
    /// # Panics
    /// If there are not so many.
    pub fn load(
        &mut self,
        range: Range<usize>,
        transform: &Transform,
        batch: &mut Batch,
    ) -> Result<(), LooseError> {
        let size = transform.size();
        batch.prepare(range.len(), size, 0);
        batch.labels.fill(0);
        let slots = batch.images.chunks_exact_mut(size * size * CHANNELS);
        let files: Vec<_> = self.files[range].iter().collect();
        let read = read_many(&self.tree, &files);
        for ((file, bytes), pixels) in files.iter().zip(read).zip(slots) {
            let image = || file.name.clone();
            self.viewer.show(bytes?, transform, pixels).map_err(|error| match error {
                ShowError::Corrupt(source) => LooseError::Corrupt { image: image(), source },
                ShowError::Transform(source) => LooseError::Transform { image: image(), source },
            })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::{
        augment::Augment,
        jpeg::{self, Pixels},
    };

    fn picture(level: u8) -> Vec<u8> {
        jpeg::encode(&vec![level; 40 * 40 * 3], 40, 40, Pixels::Rgb, 95).unwrap()
    }

    #[test]
    fn a_folder_a_file_and_a_tar_are_listed_and_shown_alike() {
        let folder = tempfile::tempdir().unwrap();
        let images = folder.path().join("images");
        fs::create_dir_all(images.join("deep")).unwrap();
        let mut archive = Vec::new();
        for (name, level) in [("b.jpg", 200), ("deep/a.JPEG", 40)] {
            fs::write(images.join(name), picture(level)).unwrap();
            crate::format::append_member(&mut archive, name, &picture(level));
        }
        fs::write(images.join("notes.txt"), "no image").unwrap();
        crate::format::append_trailer(&mut archive);
        let tar = folder.path().join("images.tar");
        fs::write(&tar, archive).unwrap();

        let transform = Transform::evaluation(&Augment::default(), 32).unwrap();
        let shown = |source: &Path| {
            let mut images = LooseImages::list(source).unwrap();
            let mut batch = Batch::new();
            images.load(0..images.len(), &transform, &mut batch).unwrap();
            let names: Vec<_> = (0..images.len()).map(|i| images.name(i).to_owned()).collect();
            (names, batch.images)
        };
        let (names, pixels) = shown(&images);
        assert_eq!(names, ["b.jpg", "deep/a.JPEG"]);
        assert!(pixels[..3072].iter().all(|&p| p > 190) && pixels[3072..].iter().all(|&p| p < 50));
        assert_eq!(shown(&tar), (names, pixels.clone()));
        assert_eq!(
            shown(&images.join("b.jpg")),
            (vec!["b.jpg".to_owned()], pixels[..3072].to_vec())
        );
    }

    #[test]
    fn what_is_no_image_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let nothing = LooseImages::list(folder.path()).unwrap_err().to_string();
        assert!(nothing.contains("has no .jpg, .jpeg or .png file"), "{nothing}");
        fs::write(folder.path().join("a.png"), "text").unwrap();
        let mut images = LooseImages::list(folder.path()).unwrap();
        let transform = Transform::evaluation(&Augment::default(), 32).unwrap();
        let error = images.load(0..1, &transform, &mut Batch::new()).unwrap_err();
        assert_eq!(error.to_string(), "a.png cannot be used: repair it or leave it out");
        assert!(LooseImages::list(&folder.path().join("nowhere")).is_err());
    }

    #[test]
    fn more_pixels_than_are_wanted_are_not_decoded() {
        let transform = Transform::evaluation(&Augment::default(), 32).unwrap();
        let mut png = Vec::new();
        let mut encoder = png::Encoder::new(&mut png, 40, 41);
        encoder.set_color(png::ColorType::Grayscale);
        let pixels = vec![9; 40 * 41];
        encoder.write_header().unwrap().write_image_data(&pixels).unwrap();
        let jpeg = jpeg::encode(&pixels, 40, 41, Pixels::Grey, 95).unwrap();
        for encoded in [png, jpeg] {
            let mut shown = vec![0; 32 * 32 * 3];
            let mut show =
                |most: usize| Viewer::new(most).show(encoded.clone(), &transform, &mut shown);
            show(40 * 41).unwrap();
            let error = show(40 * 41 - 1).unwrap_err().to_string();
            assert_eq!(error, "40x41 pixels, and at most 1639 are decoded here");
        }
    }
}
