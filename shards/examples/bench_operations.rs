//! What the operations of RandAugment cost: `bench_operations [PASSES]`, in milliseconds of CPU time
//! for an image of 224 × 224 at level 9, and what the recipe `rand-m9-mstd0.5-inc1` then costs an image.
#![expect(clippy::print_stdout, reason = "a benchmark speaks to its caller")]

use std::{env, error::Error};

use nix::time::{ClockId, clock_gettime};
use shards::rand_augment::KINDS;

const SIDE: usize = 224;
const FILL: [u8; 3] = [124, 116, 104];

fn main() -> Result<(), Box<dyn Error>> {
    let passes: usize = env::args().nth(1).map_or(Ok(40), |count| count.parse())?;
    // A gradient with texture: what matters is that branches on values are not predictable.
    let image: Vec<u8> = (0..SIDE * SIDE * 3)
        .map(|at| (at / 3 % SIDE + at / (3 * SIDE) / 2 + at * at % 61).to_le_bytes()[0])
        .collect();
    let (mut pixels, mut scratch) = (image.clone(), Vec::new());
    let mut total = 0.0;
    for kind in KINDS {
        let mut times = Vec::new();
        for pass in 0..passes {
            pixels.copy_from_slice(&image);
            let start = cpu_seconds();
            kind.at_level(9.0, pass % 2 == 1).apply(&mut pixels, SIDE, FILL, &mut scratch);
            times.push(cpu_seconds() - start);
            std::hint::black_box(&pixels);
        }
        times.sort_by(f64::total_cmp);
        let median = times[times.len() / 2] * 1e3;
        total += median;
        println!("{:14} {median:.4}", format!("{kind:?}"));
    }
    // Two operations an image, each applied with probability 0.5.
    println!("{:14} {:.4}", "an image", total / KINDS.len() as f64);
    Ok(())
}

/// CPU time of this thread so far.
fn cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("Linux has this clock");
    time.tv_sec() as f64 + time.tv_nsec() as f64 * 1e-9
}
