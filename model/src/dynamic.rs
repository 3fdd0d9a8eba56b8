//! Dynamic inference: each sample leaves at the first exit that is sure enough (arXiv:2306.11248, §3.4; after
//! MSDNet, arXiv:1703.09844). Thresholds are solved for a budget on one set and measured on another (SPEC §12).
//!
//! Pure functions of what each exit said: K below counts exits, in their order everywhere.

/// How sure an exit was of each sample: the largest softmax probability. One list an exit, samples in order.
pub type Confidences = [Vec<f32>; 4];

/// Above every confidence: nobody leaves here.
pub const NEVER: f32 = 1e8;

/// The shares of samples that should leave at each exit, for 33 budgets from cheap to expensive.
///
/// Powers of a ratio P, which makes a geometric series of exits; then exit 0 keeps 0.85 and exit 2 half of its
/// share, and the later exits take what is freed. Two budgets, 16 and 17, are the same, as in the reference
/// (SPEC §17, Q17).
pub fn budgets() -> [[f32; 4]; 33] {
    std::array::from_fn(|budget| {
        let ratio = match budget {
            0..=16 => (budget as f32 + 4.0) / 20.0,
            _ => 20.0 / (33.0 - budget as f32 + 4.0),
        };
        shares(ratio)
    })
}

fn shares(ratio: f32) -> [f32; 4] {
    const KEPT: [f32; 3] = [0.85, 1.0, 0.5];
    let powers = [1, 2, 3, 4].map(|power| ratio.powi(power));
    let total: f32 = powers.iter().sum();
    let mut shares = powers.map(|power| power / total);
    for (exit, kept) in KEPT.into_iter().enumerate() {
        shares[exit] *= kept;
        let (taken, later) = shares.split_at_mut(exit + 1);
        let left = 1.0 - taken.iter().sum::<f32>();
        let scale = left / later.iter().sum::<f32>();
        later.iter_mut().for_each(|share| *share *= scale);
    }
    shares
}

/// The thresholds at which about the given shares of the samples leave at each exit.
///
/// At each exit but the last, the threshold is the confidence of the sample that fills the exit's quota, counted
/// from the surest and without those who left before; all who are as sure leave too. A quota of 0, and one that
/// the remaining samples do not fill, lets nobody leave.
///
/// # Panics
/// If the lists have different lengths.
pub fn thresholds(confidences: &Confidences, shares: [f32; 4]) -> [f32; 4] {
    let samples = confidences[0].len();
    assert!(confidences.iter().all(|list| list.len() == samples), "every exit sees every sample");
    let mut left = vec![false; samples];
    let mut thresholds = [NEVER, NEVER, NEVER, -NEVER];
    for (exit, list) in confidences.iter().enumerate().take(3) {
        let mut waiting: Vec<f32> =
            list.iter().zip(&left).filter(|(_, left)| !**left).map(|(sure, _)| *sure).collect();
        waiting.sort_by(|a, b| b.total_cmp(a));
        let quota = quota(samples, shares[exit]);
        if let Some(last) = quota.checked_sub(1).and_then(|place| waiting.get(place)) {
            thresholds[exit] = *last;
        }
        for (left, sure) in left.iter_mut().zip(list) {
            *left |= *sure >= thresholds[exit];
        }
    }
    thresholds
}

/// `⌊samples · share⌋`, the product in f32.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "shares are from 0 to 1, so the product is a number of samples"
)]
fn quota(samples: usize, share: f32) -> usize {
    (samples as f32 * share).floor() as usize
}

/// What dynamic inference gives on a set.
#[derive(Debug, Clone, PartialEq)]
pub struct Measured {
    /// Share of samples whose exit was right.
    pub accuracy: f64,
    /// Mean cost of a sample, in the unit of the exits' costs.
    pub mean_cost: f64,
    /// Samples that left at each exit.
    pub counts: [usize; 4],
    /// Share of those whose exit was right; `None` where nobody left.
    pub accuracy_of_exit: [Option<f64>; 4],
    /// How many those are.
    pub hits: [usize; 4],
}

impl Measured {
    /// The line that the reference writes to `dynamic.txt` for a budget: accuracy in percent, a tab, the mean
    /// cost, which it computes in f32; both as Python prints them, to the byte. `costs` are those up to each
    /// exit, in the unit that the file is to have (the reference: 10⁹).
    #[expect(clippy::cast_possible_truncation, reason = "the reference computes in f32")]
    pub fn reference_line(&self, costs: [f64; 4]) -> String {
        let samples = self.counts.iter().sum::<usize>();
        let accuracy = self.hits.iter().sum::<usize>() as f64 * 100.0 / samples as f64;
        let cost = |(count, cost): (&usize, f64)| *count as f32 / samples as f32 * cost as f32;
        let mean_cost =
            self.counts.iter().zip(costs).map(cost).fold(0.0_f32, |sum, cost| sum + cost);
        format!("{accuracy:?}\t{:?}", f64::from(mean_cost))
    }
}

/// Lets each sample leave at the first exit whose confidence reaches its threshold.
///
/// `correct` says of each exit whether its answer to each sample is right; `costs` are those up to each exit.
///
/// # Panics
/// If the lists have different lengths, or are empty.
pub fn measure(
    confidences: &Confidences,
    correct: &[Vec<bool>; 4],
    thresholds: [f32; 4],
    costs: [f64; 4],
) -> Measured {
    let samples = confidences[0].len();
    assert!(samples > 0, "there are samples");
    assert!(confidences.iter().all(|list| list.len() == samples), "every exit sees every sample");
    assert!(correct.iter().all(|list| list.len() == samples), "every exit answers every sample");
    let (mut counts, mut hits) = ([0_usize; 4], [0_usize; 4]);
    for sample in 0..samples {
        let leaves = |exit: &usize| confidences[*exit][sample] >= thresholds[*exit];
        let exit = (0..3).find(leaves).unwrap_or(3);
        counts[exit] += 1;
        hits[exit] += usize::from(correct[exit][sample]);
    }
    let share = |part: usize, whole: usize| part as f64 / whole as f64;
    let cost = |(count, cost): (&usize, f64)| share(*count, samples) * cost;
    Measured {
        accuracy: share(hits.iter().sum(), samples),
        mean_cost: counts.iter().zip(costs).map(cost).sum(),
        counts,
        accuracy_of_exit: std::array::from_fn(|exit| {
            (counts[exit] > 0).then(|| share(hits[exit], counts[exit]))
        }),
        hits,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ten samples, of which the first is the surest at every exit.
    fn falling() -> Confidences {
        std::array::from_fn(|_| (0_u8..10).map(|i| 0.99 - 0.05 * f32::from(i)).collect())
    }

    #[test]
    fn every_budget_gives_each_sample_one_exit() {
        for shares in budgets() {
            assert!((shares.iter().sum::<f32>() - 1.0).abs() < 1e-5, "{shares:?}");
            assert!(shares.iter().all(|share| *share > 0.0), "{shares:?}");
        }
        assert_eq!(budgets()[16], budgets()[17]);
        assert!(budgets()[0][0] > budgets()[32][0]);
    }

    #[test]
    fn quotas_are_filled_from_the_surest_and_an_unfilled_one_lets_nobody_leave() {
        let confidences = falling();
        let quarters = thresholds(&confidences, [0.25; 4]);
        assert_eq!(quarters[..3], [confidences[0][1], confidences[0][3], confidences[0][5]]);
        let greedy = thresholds(&confidences, [0.8, 0.5, 0.2, 0.1]);
        assert_eq!(greedy[..3], [confidences[0][7], NEVER, confidences[0][9]]);
        assert_eq!(thresholds(&confidences, [0.05, 0.0, 0.0, 0.95]), [NEVER, NEVER, NEVER, -NEVER]);
    }

    #[test]
    fn costs_and_accuracies_are_those_of_the_exits_taken() {
        let confidences = falling();
        let correct = std::array::from_fn(|exit| vec![exit == 3; 10]);
        let thresholds = thresholds(&confidences, [0.5, 0.0, 0.0, 0.5]);
        let measured = measure(&confidences, &correct, thresholds, [1.0, 2.0, 3.0, 4.0]);
        assert_eq!(measured.counts, [5, 0, 0, 5]);
        assert_eq!((measured.accuracy, measured.mean_cost), (0.5, 2.5));
        assert_eq!(measured.accuracy_of_exit, [Some(0.0), None, None, Some(1.0)]);
    }
}
