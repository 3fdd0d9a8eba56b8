//! How fast one core prepares training images: `bench_data DIR [--recipe crop|full] [--passes N]`.
//!
//! With `--interactive on` it first says how many images there are, and then answers each line, the
//! number of a pass, with the CPU seconds of that pass: `cargo xtask bench data` alternates so between
//! programs.
//!
//! Takes the JPEG files of a folder through decoding, random resized crop to 224 × 224, flip, with
//! `full` also RandAugment and random erasing, and normalisation to f32. Prints one JSON object: the
//! CPU seconds of each pass over all files, those of the stages, and what they come to.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a benchmark speaks to its caller")]

use std::{env, error::Error, fs, io, path::PathBuf, process::ExitCode};

use nix::time::{ClockId, clock_gettime};
use shards::measure::{Pipeline, Work};

struct Arguments {
    folder: PathBuf,
    full: bool,
    passes: u64,
    interactive: bool,
}

fn main() -> ExitCode {
    let outcome = arguments().and_then(|arguments| run(&arguments));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench_data: {error}");
            ExitCode::FAILURE
        }
    }
}

fn arguments() -> Result<Arguments, Box<dyn Error>> {
    let mut words = env::args().skip(1);
    let folder = words.next().ok_or("give the folder of the images")?.into();
    let mut arguments = Arguments { folder, full: false, passes: 1, interactive: false };
    while let Some(option) = words.next() {
        let value = words.next().ok_or_else(|| format!("{option} wants a value"))?;
        match (option.as_str(), value.as_str()) {
            ("--recipe", "crop") => arguments.full = false,
            ("--recipe", "full") => arguments.full = true,
            ("--interactive", "on") => arguments.interactive = true,
            ("--passes", passes) => arguments.passes = passes.parse()?,
            _ => return Err(format!("{option} {value} is not understood").into()),
        }
    }
    Ok(arguments)
}

fn run(arguments: &Arguments) -> Result<(), Box<dyn Error>> {
    let mut paths: Vec<PathBuf> = fs::read_dir(&arguments.folder)?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_, io::Error>>()?;
    paths.retain(|path| path.extension().is_some_and(|end| end == "jpg" || end == "JPEG"));
    paths.sort();
    let files: Vec<Vec<u8>> = paths.iter().map(fs::read).collect::<Result<_, _>>()?;
    if files.is_empty() {
        return Err("the folder has no .jpg file".into());
    }
    let mut worker = Pipeline::new(if arguments.full { Work::Full } else { Work::Crop });
    if arguments.interactive {
        return answer(&mut worker, &files);
    }
    worker.pass(&files, 0, &mut cpu_seconds)?; // Grows the buffers.
    let mut seconds = Vec::new();
    worker.stages = [0.0; 4];
    for pass in 0..arguments.passes {
        let start = cpu_seconds();
        worker.pass(&files, pass, &mut cpu_seconds)?;
        seconds.push(cpu_seconds() - start);
    }
    let images = files.len() as f64;
    let bytes: usize = files.iter().map(Vec::len).sum();
    let mut sorted = seconds.clone();
    sorted.sort_by(f64::total_cmp);
    let median = sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN);
    let share = |stage: f64| stage * 1e3 / images / arguments.passes as f64;
    let [decode, resize, augment, normalize] = worker.stages.map(share);
    println!(
        "{{\"images\": {images}, \"cpu_seconds\": {seconds:?}, \"img_per_core_s\": {:.1}, \
         \"mb_per_core_s\": {:.1}, \"decode_ms\": {decode:.4}, \"resize_ms\": {resize:.4}, \
         \"augment_ms\": {augment:.4}, \"normalize_ms\": {normalize:.4}}}",
        images / median,
        bytes as f64 / median / 1e6,
    );
    Ok(())
}

fn answer(worker: &mut Pipeline, files: &[Vec<u8>]) -> Result<(), Box<dyn Error>> {
    println!("{}", files.len());
    for line in io::stdin().lines() {
        let pass = line?.trim().parse()?;
        let start = cpu_seconds();
        worker.pass(files, pass, &mut cpu_seconds)?;
        println!("{}", cpu_seconds() - start);
    }
    Ok(())
}

/// CPU time of this thread so far.
fn cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("Linux has this clock");
    time.tv_sec() as f64 + time.tv_nsec() as f64 * 1e-9
}
