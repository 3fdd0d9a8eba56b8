//! Whether the fast way gives the pixels of the slow one: `check_crops DIR [CROPS]`.
//!
//! Takes random crops (10,000 unless told otherwise) of the JPEG files of a folder, each once as the
//! loader makes it, and once by having libjpeg-turbo decode the whole image and resizing by the scalar
//! definition.
//! Prints how many bytes differ, and fails if one does.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a check speaks to its caller")]

use std::{env, error::Error, fs, path::PathBuf, process::ExitCode};

use cluster::Epoch;
use shards::{Augment, Scratch, Transform, decode::Decoder, image::View, jpeg::Opened};

const SIZE: u32 = 224;

fn main() -> ExitCode {
    match run() {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("check_crops: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<usize, Box<dyn Error>> {
    let mut words = env::args().skip(1);
    let folder = words.next().ok_or("give the folder of the images")?;
    let crops: u64 = words.next().map_or(Ok(10_000), |count| count.parse())?;
    let mut paths: Vec<PathBuf> = fs::read_dir(folder)?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_, std::io::Error>>()?;
    paths.retain(|path| path.extension().is_some_and(|end| end == "jpg" || end == "JPEG"));
    paths.sort();
    if paths.is_empty() {
        return Err("the folder has no .jpg file".into());
    }

    let training = Transform::training(&Augment::default(), SIZE, 1)?;
    let evaluation = Transform::evaluation(&Augment::default(), SIZE)?;
    let bytes = (SIZE * SIZE * 3) as usize;
    let (mut fast, mut slow) = (vec![0; bytes], vec![0; bytes]);
    let (mut vectors, mut scalar) = (Scratch::new(), Scratch::scalar());
    let (mut decoder, mut whole_decoder) = (Decoder::new(), Decoder::library());
    let mut differing = 0;
    let images = paths.len() as u64;
    for (place, path) in (0..).zip(&paths) {
        let file = fs::read(path)?;
        let whole: View<'_> = whole_decoder.decode(&file)?;
        let size = (whole.width(), whole.height());
        for epoch in (0..crops.div_ceil(images)).filter(|epoch| epoch * images + place < crops) {
            // Every eighth is a validation image.
            let transform = if epoch % 8 == 7 { &evaluation } else { &training };
            let epoch = Epoch(epoch);
            let part = transform.part(size.0, size.1, epoch, place);
            let part = decoder.decode_part(Opened::new(&file)?, part)?;
            transform.apply_to_part(part, size, epoch, place, &mut vectors, &mut fast)?;
            transform.apply(whole, epoch, place, &mut scalar, &mut slow)?;
            differing += fast.iter().zip(&slow).filter(|(fast, slow)| fast != slow).count();
        }
    }
    println!(
        "{crops} crops of {images} images: {differing} of {} bytes differ",
        crops * bytes as u64
    );
    Ok(differing)
}
