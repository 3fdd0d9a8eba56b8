//! The four classifiers and the knowledge that an exit hands to the next (arXiv:2306.11248, §3.3).
//!
//! Axes: B batch, C channels, K classes.

use tch::{Kind, Tensor};

use crate::init::Init;
use crate::layers::{BatchNorm, Dropout, Linear, Mode};
use crate::params::Scope;

/// Names of the exits, in their order everywhere: outputs, losses, accuracies, costs.
pub const EXIT_NAMES: [&str; 4] = ["early3", "att", "cnn", "merge"];

/// Logits `[B, K]` of the four exits.
#[derive(Debug)]
pub struct Exits {
    /// From the latents after stage 3.
    pub early3: Tensor,
    /// From the latents after stage 4.
    pub att: Tensor,
    /// From the image features after stage 4.
    pub cnn: Tensor,
    /// From both branches.
    pub merge: Tensor,
}

impl Exits {
    /// The logits in the order of [`EXIT_NAMES`].
    pub fn in_order(&self) -> [&Tensor; 4] {
        [&self.early3, &self.att, &self.cnn, &self.merge]
    }

    /// All logits as one tensor `[4, B, K]`.
    pub fn stacked(&self) -> Tensor {
        Tensor::stack(&self.in_order(), 0)
    }

    /// The same logits in another kind, within the graph: losses of short logits are taken in f32.
    #[must_use]
    pub fn to_kind(&self, kind: Kind) -> Exits {
        let [early3, att, cnn, merge] = self.in_order().map(|logits| logits.to_kind(kind));
        Exits { early3, att, cnn, merge }
    }

    /// Samples whose largest logit is at their label, for each exit. `labels` is `[B]`, i64.
    ///
    /// # Panics
    /// If the sizes differ.
    pub fn correct(&self, labels: &Tensor) -> [i64; 4] {
        let hits = tch::no_grad(|| {
            let hits = self.stacked().argmax(-1, false).eq_tensor(labels); // [4, B]
            hits.sum_dim_intlist(1, false, Kind::Int64).to_device(tch::Device::Cpu) // [4]
        });
        std::array::from_fn(|exit| hits.int64_value(&[crate::params::to_i64(exit)]))
    }
}

/// Hands an exit's raw logits to a later classifier: the paper's forward knowledge transfer, the code's ISC.
#[derive(Debug)]
pub(crate) struct KnowledgeTransfer {
    project: Linear,
    norm: BatchNorm,
}

impl KnowledgeTransfer {
    pub(crate) fn new(scope: &Scope<'_, '_>, classes: i64, width: i64) -> KnowledgeTransfer {
        KnowledgeTransfer {
            project: Linear::new(&(scope / "0"), classes, width),
            norm: BatchNorm::new(&(scope / "1"), width),
        }
    }

    /// `[B, K]` to `[B, C]`. Gradients flow back into the earlier exit.
    pub(crate) fn forward(&self, logits: &Tensor, mode: Mode) -> Tensor {
        self.norm.forward(&self.project.forward(logits), mode).relu()
    }
}

/// A classifier of features: one layer, or two with a hard swish and dropout between them.
#[derive(Debug)]
pub(crate) struct FeatureClassifier {
    hidden: Option<(Linear, Dropout)>,
    classify: Linear,
}

/// Sizes of a [`FeatureClassifier`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct ClassifierSize {
    pub(crate) inputs: i64,
    /// Width and dropout of the hidden layer, if there is one.
    pub(crate) hidden: Option<(i64, f64)>,
    pub(crate) classes: i64,
}

impl FeatureClassifier {
    /// Two layers are `first` and `first + 3` of a sequence; one layer has the name `single`.
    fn new(
        scope: &Scope<'_, '_>,
        size: ClassifierSize,
        first: usize,
        single: impl FnOnce() -> Linear,
    ) -> FeatureClassifier {
        let Some((width, rate)) = size.hidden else {
            return FeatureClassifier { hidden: None, classify: single() };
        };
        let widen = Linear::new(&(scope / &first.to_string()), size.inputs, width);
        let dropout = Dropout::new(scope, "dropout", rate);
        let classify = Linear::new(&(scope / &(first + 3).to_string()), width, size.classes);
        FeatureClassifier { hidden: Some((widen, dropout)), classify }
    }

    /// The CNN's own classifier. In RegNetY it starts closer to zero than the others.
    pub(crate) fn of_cnn(
        scope: &Scope<'_, '_>,
        size: ClassifierSize,
        near_zero: bool,
    ) -> FeatureClassifier {
        let ClassifierSize { inputs, classes, .. } = size;
        FeatureClassifier::new(scope, size, 0, || {
            if near_zero {
                Linear::with_init(scope, inputs, classes, Init::normal(0.01), Init::Zeros)
            } else {
                Linear::new(scope, inputs, classes)
            }
        })
    }

    /// `[B, C]` to `[B, K]`.
    pub(crate) fn forward(&self, x: &Tensor, mode: Mode) -> Tensor {
        match &self.hidden {
            Some((widen, dropout)) => {
                let hidden = dropout.forward(widen.forward(x).hardswish(), mode);
                self.classify.forward(&hidden)
            }
            None => self.classify.forward(x),
        }
    }
}

/// The classifier that sees both branches.
#[derive(Debug)]
pub(crate) struct MergeClassifier {
    norm: BatchNorm,
    classify: FeatureClassifier,
}

impl MergeClassifier {
    pub(crate) fn new(scope: &Scope<'_, '_>, size: ClassifierSize) -> MergeClassifier {
        let norm = BatchNorm::new(&(scope / "0"), size.inputs);
        let single = || Linear::new(&(scope / "1"), size.inputs, size.classes);
        MergeClassifier { norm, classify: FeatureClassifier::new(scope, size, 1, single) }
    }

    /// `[B, C]` to `[B, K]`.
    pub(crate) fn forward(&self, joint: &Tensor, mode: Mode) -> Tensor {
        self.classify.forward(&self.norm.forward(joint, mode), mode)
    }
}
