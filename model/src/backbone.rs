//! The feature branch: a convolutional network cut into a stem and four stages.

pub(crate) mod regnet;

use tch::Tensor;

use crate::layers::Mode;
use crate::params::Scope;
use regnet::{RegNet, RegNetSpec};

/// Which backbone, in which sizes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum BackboneSpec {
    RegNet(RegNetSpec),
}

impl BackboneSpec {
    /// Input widths of the four stages and the output width of the last: C1 to C4, and Cout.
    pub(crate) fn widths(&self) -> [i64; 5] {
        match self {
            BackboneSpec::RegNet(spec) => {
                let [first, second, third, last] = spec.widths;
                [regnet::STEM_WIDTH, first, second, third, last]
            }
        }
    }
}

/// A backbone.
#[derive(Debug)]
pub(crate) enum Backbone {
    RegNet(RegNet),
}

impl Backbone {
    pub(crate) fn new(root: &Scope<'_, '_>, spec: &BackboneSpec) -> Backbone {
        match spec {
            BackboneSpec::RegNet(spec) => Backbone::RegNet(RegNet::new(root, spec)),
        }
    }

    /// Images `[B, 3, S, S]` to the features that enter stage 1, `[B, C1, H, W]`.
    pub(crate) fn stem(&self, images: &Tensor, mode: Mode) -> Tensor {
        match self {
            Backbone::RegNet(net) => net.stem(images, mode),
        }
    }

    /// One of the four stages, counted from 0.
    pub(crate) fn stage(&self, stage: usize, x: &Tensor, mode: Mode) -> Tensor {
        match self {
            Backbone::RegNet(net) => net.stage(stage, x, mode),
        }
    }
}
