//! What one place of an epoch's order costs: `bench_order [COUNT]`, in nanoseconds of CPU time.
#![expect(clippy::print_stdout, reason = "a benchmark speaks to its caller")]

use std::{env, error::Error, hint::black_box, num::NonZeroU32};

use cluster::Epoch;
use nix::time::{ClockId, clock_gettime};
use shards::{Order, Shuffle};

fn main() -> Result<(), Box<dyn Error>> {
    let count: u64 = env::args().nth(1).map_or(Ok(2_000_000), |count| count.parse())?;
    let (block, window) = (NonZeroU32::new(64), NonZeroU32::new(2048));
    let blocks = block.zip(window).map(|(block, window)| Shuffle::Blocks { block, window });
    for shuffle in [Some(Shuffle::Full), blocks].into_iter().flatten() {
        for samples in [1_281_167, 2_000_000_000, 1 << 40] {
            let order = Order::shuffled(shuffle, samples, 7, Epoch(3));
            let start = cpu_seconds();
            for position in 0..count {
                black_box(order.sample(position % samples));
            }
            let nanoseconds = (cpu_seconds() - start) * 1e9 / count as f64;
            println!("{shuffle:?} of {samples}: {nanoseconds:.1} ns");
        }
    }
    Ok(())
}

/// CPU time of this thread so far.
fn cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("Linux has this clock");
    time.tv_sec() as f64 + time.tv_nsec() as f64 * 1e-9
}
