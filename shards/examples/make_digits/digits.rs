//! From the table of digits to the packed dataset.

use std::{error::Error, fs, io::Read, path::Path};

use cluster::Epoch;
use flate2::read::GzDecoder;
use shards::{
    Order, PackOptions,
    image::View,
    jpeg::{self, Pixels},
    pack,
    resize::Resizer,
};

/// Side of an image in the table, in pixels. Their values are 0 to 16.
const TABLE_SIDE: usize = 8;
/// Side of an image in the dataset.
const SIDE: usize = 32;
const QUALITY: u8 = 95;
const TRAIN_SAMPLES: usize = 1437;
/// Chooses which rows are for validation, and the order within each split.
const SEED: u64 = 1797;

const SOURCE: &str = "digits.csv.gz of scikit-learn 1.9.1, sha256 \
    09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22; 8x8 enlarged to 32x32 (bicubic), \
    grey JPEG of quality 95, by examples/make_digits";
const ATTRIBUTION: &str = "E. Alpaydin and C. Kaynak (1998). Optical Recognition of Handwritten Digits. \
    UCI Machine Learning Repository. https://doi.org/10.24432/C50P49";
const LICENCE: &str = "CC BY 4.0, https://creativecommons.org/licenses/by/4.0/";

/// Packs the gzipped table into the splits `train` and `val` of a dataset at `out`.
pub(crate) fn make(table: &[u8], out: &Path) -> Result<(), Box<dyn Error>> {
    let mut text = String::new();
    GzDecoder::new(table).read_to_string(&mut text)?;
    let rows: Vec<&str> = text.lines().collect();
    let order = Order::new(rows.len() as u64, SEED, Epoch(0));
    let shuffled = (0..rows.len() as u64)
        .map(|at| usize::try_from(order.sample(at)))
        .collect::<Result<Vec<_>, _>>()?;
    let (train, val) = shuffled.split_at(TRAIN_SAMPLES);
    for (split, chosen) in [("train", train), ("val", val)] {
        let folder = tempfile::tempdir()?;
        for &row in chosen {
            write_image(folder.path(), row, rows[row])?;
        }
        let options = PackOptions {
            split: split.to_owned(),
            seed: SEED,
            source: Some(SOURCE.to_owned()),
            attribution: Some(ATTRIBUTION.to_owned()),
            licence: Some(LICENCE.to_owned()),
            ..PackOptions::default()
        };
        let out = out.to_str().ok_or("the output folder's name is not UTF-8")?;
        pack(folder.path(), out, &options, &mut |_| ())?;
    }
    Ok(())
}

/// A row is 64 values and the digit that they show.
fn write_image(folder: &Path, row: usize, text: &str) -> Result<(), Box<dyn Error>> {
    let mut values = text.split(',').map(str::parse::<u8>).collect::<Result<Vec<_>, _>>()?;
    let digit = values.pop().ok_or("an empty row")?;
    let pixels: Vec<u8> = values.iter().flat_map(|&value| [brightness(value); 3]).collect();
    let mut enlarged = vec![0; SIDE * SIDE * 3];
    Resizer::new().resize(View::new(&pixels, TABLE_SIDE, TABLE_SIDE), SIDE, SIDE, &mut enlarged);
    let grey: Vec<u8> = enlarged.chunks_exact(3).map(|pixel| pixel[0]).collect();
    let class = folder.join(digit.to_string());
    fs::create_dir_all(&class)?;
    let jpeg = jpeg::encode(&grey, SIDE, SIDE, Pixels::Grey, QUALITY)?;
    Ok(fs::write(class.join(format!("row-{row:04}.jpg")), jpeg)?)
}

/// 0 to 16 on the scale 0 to 255, rounded.
fn brightness(value: u8) -> u8 {
    u8::try_from((u32::from(value) * 255 + 8) / 16).unwrap_or(u8::MAX)
}
