//! What a network costs: multiply–accumulates per image up to each exit, and its stages' sizes. Arithmetic on
//! the architecture alone.
//!
//! Counted are all convolutions, linear layers and attention products that run, heads passed on the way
//! included: the cost of dynamic inference that stops at an exit (SPEC §15, `macs_exact`). Norms,
//! non-linearities, pooling and sums are not.

use crate::config::Architecture;
use crate::exchange::{GRID_TOKENS, depthwise_size, write_width};
use crate::layers::ConvSize;

/// What a network costs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cost {
    /// Multiply–accumulates of one image up to each exit, in the order of [`EXIT_NAMES`](crate::EXIT_NAMES).
    pub macs: [u64; 4],
    /// The four stages.
    pub stages: [StageSize; 4],
}

/// The sizes of one stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StageSize {
    /// Latent tokens.
    pub tokens: u64,
    /// Channels of the latents and of the features that they meet.
    pub channels: u64,
    /// Height and width of those features.
    pub side: u64,
    /// Self-attention layers.
    pub layers: u64,
    /// Heads of each.
    pub heads: u64,
    /// Multiply–accumulates of both branches, heads not included.
    pub macs: u64,
}

impl Cost {
    /// The cost of an architecture at its input size.
    pub fn of(architecture: &Architecture) -> Cost {
        let a = architecture;
        let mut tally = Tally { side: a.input_size, macs: 0 };
        let mut exits = [0; 4];
        let [_, _, c3, c4, cout] = a.backbone.widths();
        let stages = std::array::from_fn(|stage| {
            let start = tally.macs;
            if stage == 0 {
                a.backbone.tally_stem(&mut tally);
            }
            tally.latent_stage(a, stage);
            let (side, before_head) = (tally.side, tally.macs);
            match stage {
                2 => {
                    tally.linear(1, c3, a.classes);
                    exits[0] = tally.macs;
                }
                3 => {
                    tally.linear(1, a.classes, transferred(a));
                    tally.linear(1, c4 + transferred(a), a.classes);
                    exits[1] = tally.macs;
                }
                _ => {}
            }
            let head = tally.macs - before_head;
            a.backbone.tally_stage(stage, &mut tally);
            StageSize::new(a, stage, side, tally.macs - start - head)
        });
        tally.head(a, cout);
        exits[2] = tally.macs;
        if a.with_last_ca {
            tally.write(cout, c4, a.tokens[3]);
        }
        tally.linear(1, a.classes, transferred(a));
        tally.head(a, cout + c4 + transferred(a));
        exits[3] = tally.macs;
        Cost { macs: exits.map(unsigned), stages }
    }
}

impl StageSize {
    fn new(a: &Architecture, stage: usize, side: i64, macs: i64) -> StageSize {
        StageSize {
            tokens: unsigned(a.tokens[stage]),
            channels: unsigned(a.backbone.widths()[stage]),
            side: unsigned(side),
            layers: a.layers[stage] as u64,
            heads: unsigned(a.heads[stage]),
            macs: unsigned(macs),
        }
    }
}

fn unsigned(count: i64) -> u64 {
    u64::try_from(count).expect("counts are not negative")
}

/// Channels that an earlier exit's logits become.
fn transferred(a: &Architecture) -> i64 {
    if a.with_isc { a.backbone.widths()[3] } else { 0 }
}

/// Counts multiply–accumulates of one image, following the side of the feature map.
#[derive(Debug)]
pub(crate) struct Tally {
    side: i64,
    macs: i64,
}

impl Tally {
    /// A convolution that the map goes through.
    pub(crate) fn convolution(&mut self, size: ConvSize) {
        self.shortcut(size);
        self.side = size.side_after(self.side);
    }

    /// A convolution beside the ones that the map goes through; counted before they change its side.
    pub(crate) fn shortcut(&mut self, size: ConvSize) {
        self.macs += size.macs(self.side);
    }

    /// A pooling with stride 2 and padding that keeps the size at stride 1.
    pub(crate) fn halve(&mut self) {
        self.side = (self.side + 1) / 2;
    }

    /// A linear layer on `rows` rows; with 0 inputs or outputs it is not there.
    pub(crate) fn linear(&mut self, rows: i64, inputs: i64, outputs: i64) {
        self.macs += rows * inputs * outputs;
    }

    /// One attention: projections of `query` tokens of `width` and `source` tokens of `source_width` channels
    /// to `inner` channels, both products, and the projection back.
    fn attention(&mut self, query: [i64; 2], source: [i64; 2], inner: i64) {
        let ([tokens, width], [source_tokens, source_width]) = (query, source);
        self.linear(tokens, width, inner);
        self.linear(source_tokens, source_width, 2 * inner);
        self.macs += 2 * tokens * source_tokens * inner;
        self.linear(tokens, inner, width);
    }

    /// What [`FeatureWrite`](crate::exchange::FeatureWrite) does at this side.
    fn write(&mut self, features: i64, latents: i64, tokens: i64) {
        let places = self.side * self.side;
        self.attention([places, features], [tokens, latents], write_width(features));
        self.linear(places, features, 2 * features);
    }

    /// What [`LatentRead`](crate::exchange::LatentRead) does at this side.
    fn read(&mut self, width: i64, tokens: i64, with_dwc: bool) {
        if with_dwc {
            self.shortcut(depthwise_size(width));
        }
        self.attention([tokens, width], [GRID_TOKENS, width], width);
        self.linear(tokens, width, 2 * width);
    }

    /// What happens to the latents in a stage, the transition to it included.
    fn latent_stage(&mut self, a: &Architecture, stage: usize) {
        let (width, tokens) = (a.backbone.widths()[stage], a.tokens[stage]);
        if stage > 0 {
            let (width_before, tokens_before) =
                (a.backbone.widths()[stage - 1], a.tokens[stage - 1]);
            self.linear(width_before, tokens_before, tokens);
            self.linear(tokens, width_before, width);
            if a.with_z2x {
                self.write(width, width, tokens);
            }
        }
        if stage == 0 || a.with_x2z {
            self.read(width, tokens, a.with_dwc);
        }
        for _ in 0..a.layers[stage] {
            self.attention([tokens, width], [tokens, width], width);
            self.linear(tokens, width, 2 * a.sa_widening_factor * width);
        }
    }

    /// A classifier of `inputs` channels with as many layers as the family's have.
    fn head(&mut self, a: &Architecture, inputs: i64) {
        match a.backbone.head_hidden() {
            Some(hidden) => {
                self.linear(1, inputs, hidden);
                self.linear(1, hidden, a.classes);
            }
            None => self.linear(1, inputs, a.classes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ModelConfig;

    fn cost(change: impl FnOnce(&mut ModelConfig)) -> Cost {
        let mut config = ModelConfig::published("reg800m_perceiver_t128");
        change(&mut config);
        Cost::of(&Architecture::try_from(&config).unwrap())
    }

    #[test]
    fn a_published_model_costs_what_the_specification_says() {
        let cost = cost(|_| {});
        assert_eq!(cost.macs, [457_938_048, 1_063_488_896, 1_227_589_504, 1_298_256_512]);
        assert_eq!(cost.stages.map(|stage| stage.side), [112, 56, 28, 14]);
        assert_eq!(cost.stages.map(|stage| stage.tokens), [128, 64, 32, 16]);
    }

    #[test]
    fn stages_add_up_to_the_cnn_exit_without_its_heads() {
        let cost = cost(|config| config.with_isc = false);
        let heads = (144 + 320 + 784) * 1000; // Without transfer they read C3, C4 and Cout.
        let stages: u64 = cost.stages.iter().map(|stage| stage.macs).sum();
        assert_eq!(stages + heads, cost.macs[2]);
    }

    #[test]
    fn twice_the_side_is_four_times_the_convolutions_but_the_same_latents() {
        let (small, large) = (cost(|c| c.input_size = 224), cost(|c| c.input_size = 448));
        let ratio = large.macs[2] as f64 / small.macs[2] as f64;
        assert!((2.0..4.0).contains(&ratio), "{ratio}");
        assert_eq!(large.stages.map(|stage| stage.side), [224, 112, 56, 28]);
    }
}
