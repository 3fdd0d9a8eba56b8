//! Loops compiled for wider vectors where the processor has them.
//!
//! Rust never fuses a product with a sum and never reorders floating-point sums, so a loop gives the same bits
//! whichever instructions it was compiled to: the choice made here is about time alone.
#![expect(
    unsafe_code,
    reason = "calls a function that needs instructions the processor was seen to have"
)]

/// Work whose loops gain from wide vectors.
pub trait Kernel {
    /// What it gives.
    type Output;

    /// Does the work. Mark implementations, and what they call in loops, `#[inline(always)]`: only what is
    /// inlined is compiled for the wider vectors.
    fn run(self) -> Self::Output;
}

/// Runs `kernel` with AVX2 where there is AVX2, else as it is. The bits are the same.
pub fn vectorized<K: Kernel>(kernel: K) -> K::Output {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has just been seen to have AVX2.
        return unsafe { with_avx2(kernel) };
    }
    kernel.run()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn with_avx2<K: Kernel>(kernel: K) -> K::Output {
    kernel.run()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Sums<'a>(&'a [f32]);

    impl Kernel for Sums<'_> {
        type Output = [f32; 8];

        #[inline(always)]
        fn run(self) -> [f32; 8] {
            let mut sums = [0.0; 8];
            for row in self.0.chunks_exact(8) {
                for (sum, value) in sums.iter_mut().zip(row) {
                    *sum = *sum * 0.9 + value * value;
                }
            }
            sums
        }
    }

    #[test]
    fn the_bits_do_not_depend_on_the_instructions() {
        let values: Vec<f32> = (0_u16..8_000).map(|i| (f32::from(i) * 0.37).sin()).collect();
        let bits = |sums: [f32; 8]| sums.map(f32::to_bits);
        assert_eq!(bits(vectorized(Sums(&values))), bits(Sums(&values).run()));
    }
}
