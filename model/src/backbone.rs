//! The feature branch: a convolutional network cut into a stem and four stages.

mod blocks;
pub(crate) mod mobilenet;
pub(crate) mod regnet;
pub(crate) mod resnet;

use tch::Tensor;

use crate::cost::Tally;
use crate::layers::Mode;
use crate::params::Scope;
use blocks::ConvNorm;
use mobilenet::{MobileNet, MobileNetSpec};
use regnet::{RegNet, RegNetSpec};
use resnet::{ResNet, ResNetSpec};

/// Which backbone, in which sizes.
#[expect(clippy::enum_variant_names, reason = "the families are called so")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BackboneSpec {
    RegNet(RegNetSpec),
    ResNet(ResNetSpec),
    MobileNet(MobileNetSpec),
}

/// What the networks of one family have in common, beside their blocks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Family {
    /// As a person calls it.
    pub(crate) name: &'static str,
    /// The published depth factors.
    pub(crate) depth_factor: [usize; 4],
    /// Dropout before the last layer of the classifiers of the features; 0 where they have none.
    pub(crate) head_dropout: f64,
    /// Rate of the last residual block's drop-path; 0 where the blocks have none.
    pub(crate) drop_path: f64,
    /// Where the state dict has the classifier of the features.
    pub(crate) head_place: HeadPlace,
}

/// After which part of the state dict the classifier of the features comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HeadPlace {
    Backbone,
    LastWrite,
    Transfers,
}

const REGNET: Family = Family {
    name: "RegNetY",
    depth_factor: [1, 1, 1, 2],
    head_dropout: 0.0,
    drop_path: 0.0,
    head_place: HeadPlace::LastWrite,
};
const RESNET: Family = Family {
    name: "ResNet",
    depth_factor: [1, 1, 1, 1],
    head_dropout: 0.2,
    drop_path: 0.2,
    head_place: HeadPlace::Backbone,
};
const MOBILENET: Family = Family {
    name: "MobileNetV3",
    depth_factor: [1, 1, 1, 3],
    head_dropout: 0.2,
    drop_path: 0.0,
    head_place: HeadPlace::Transfers,
};

impl BackboneSpec {
    /// Input widths of the four stages and the output width of the last: C1 to C4, and Cout.
    pub(crate) fn widths(&self) -> [i64; 5] {
        match self {
            BackboneSpec::RegNet(spec) => spec.widths(),
            BackboneSpec::ResNet(spec) => spec.widths(),
            BackboneSpec::MobileNet(spec) => spec.widths(),
        }
    }

    pub(crate) fn family(&self) -> &'static Family {
        match self {
            BackboneSpec::RegNet(_) => &REGNET,
            BackboneSpec::ResNet(_) => &RESNET,
            BackboneSpec::MobileNet(_) => &MOBILENET,
        }
    }

    /// Hidden width of the classifiers of the features, where they have two layers.
    pub(crate) fn head_hidden(&self) -> Option<i64> {
        match self {
            BackboneSpec::RegNet(_) | BackboneSpec::ResNet(_) => None,
            BackboneSpec::MobileNet(spec) => Some(spec.head_hidden()),
        }
    }

    /// Counts the stem.
    pub(crate) fn tally_stem(&self, tally: &mut Tally) {
        match self {
            BackboneSpec::RegNet(spec) => spec.tally_stem(tally),
            BackboneSpec::ResNet(spec) => spec.tally_stem(tally),
            BackboneSpec::MobileNet(spec) => spec.tally_stem(tally),
        }
    }

    /// Counts one of the four stages, from 0.
    pub(crate) fn tally_stage(&self, stage: usize, tally: &mut Tally) {
        match self {
            BackboneSpec::RegNet(spec) => spec.tally_stage(stage, tally),
            BackboneSpec::ResNet(spec) => spec.tally_stage(stage, tally),
            BackboneSpec::MobileNet(spec) => spec.tally_stage(stage, tally),
        }
    }
}

/// A backbone.
#[expect(clippy::enum_variant_names, reason = "the families are called so")]
#[derive(Debug)]
pub(crate) enum Backbone {
    RegNet(RegNet),
    ResNet(ResNet),
    MobileNet(MobileNet),
}

impl Backbone {
    /// `drop_path`: rate of the last residual block, in the family that has it.
    pub(crate) fn new(root: &Scope<'_, '_>, spec: &BackboneSpec, drop_path: f64) -> Backbone {
        match spec {
            BackboneSpec::RegNet(spec) => Backbone::RegNet(RegNet::new(root, spec)),
            BackboneSpec::ResNet(spec) => Backbone::ResNet(ResNet::new(root, spec, drop_path)),
            BackboneSpec::MobileNet(spec) => Backbone::MobileNet(MobileNet::new(root, spec)),
        }
    }

    /// Folds BatchNorm into the convolutions, as all are now; the backbone is then for evaluation alone.
    pub(crate) fn fold(&mut self) {
        let convolutions = match self {
            Backbone::RegNet(net) => net.convolutions(),
            Backbone::ResNet(net) => net.convolutions(),
            Backbone::MobileNet(net) => net.convolutions(),
        };
        tch::no_grad(|| convolutions.into_iter().for_each(ConvNorm::fold));
    }

    /// Images `[B, 3, S, S]` to the features that enter stage 1, `[B, C1, H, W]`.
    pub(crate) fn stem(&self, images: &Tensor, mode: Mode) -> Tensor {
        match self {
            Backbone::RegNet(net) => net.stem(images, mode),
            Backbone::ResNet(net) => net.stem(images, mode),
            Backbone::MobileNet(net) => net.stem(images, mode),
        }
    }

    /// One of the four stages, counted from 0.
    pub(crate) fn stage(&self, stage: usize, x: &Tensor, mode: Mode) -> Tensor {
        match self {
            Backbone::RegNet(net) => net.stage(stage, x, mode),
            Backbone::ResNet(net) => net.stage(stage, x, mode),
            Backbone::MobileNet(net) => net.stage(stage, x, mode),
        }
    }
}
