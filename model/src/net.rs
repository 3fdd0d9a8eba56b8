//! The whole network: Dynamic Perceiver (Han et al., ICCV 2023, arXiv:2306.11248, Fig. 2).
//!
//! A CNN (image features x) and a small transformer on learned latent tokens (z) run side by side in four
//! stages, exchange what they know by cross-attention, and are read by four classifiers.
//!
//! Axes: B batch, N latent tokens of stage 1, C1..C4 input channels of the stages, Cout channels after the
//! last, K classes.

use std::cell::RefCell;

use tch::{Device, Kind, Tensor};

use crate::backbone::{Backbone, BackboneSpec, HeadPlace};
use crate::config::Architecture;
use crate::draws::Draws;
use crate::exchange::{FeatureWrite, LatentRead};
use crate::exit::{ClassifierSize, Exits, FeatureClassifier, KnowledgeTransfer, MergeClassifier};
use crate::fused;
use crate::init::Init;
use crate::latent::{LatentSize, LatentStage, LatentTransition};
use crate::layers::{Dropout, Linear, Mode};
use crate::params::{Registry, Scope, Weights};

pub use libtorch::ShimError as GradientError;

/// A Dynamic Perceiver over some [`Weights`].
///
/// Its tensors are views of the weights' flat tensors: what an optimizer writes there, the next forward sees.
#[derive(Debug)]
pub struct Network {
    pub(crate) parts: Parts,
    leaves: Vec<Tensor>,
}

/// The blocks of a network.
#[derive(Debug)]
pub(crate) struct Parts {
    latent: Tensor,
    backbone: Backbone,
    stages: [Stage; 4],
    transitions: Vec<LatentTransition>,
    last_write: Option<FeatureWrite>,
    classify_early: Linear,
    classify_att: Linear,
    /// Of the pooled features, before `classify_cnn`; in ResNet only.
    dropout_pooled: Dropout,
    classify_cnn: FeatureClassifier,
    classify_merge: MergeClassifier,
    /// From exit `early3` to `att`, and from `att` to `merge`.
    transfer: Option<[KnowledgeTransfer; 2]>,
}

/// What happens to the latents in one stage. Stage 1 has no write; stages without a read are an option.
#[derive(Debug)]
struct Stage {
    read: Option<LatentRead>,
    write: Option<FeatureWrite>,
    attention: LatentStage,
}

impl Network {
    /// The network of an architecture over weights of its layout.
    ///
    /// # Panics
    /// If the weights' layout is of another network.
    pub fn new(architecture: &Architecture, weights: &Weights) -> Network {
        let registry = RefCell::new(Registry::over(weights));
        let parts = Network::assemble(architecture, &Scope::root(&registry));
        Network { parts, leaves: registry.into_inner().into_leaves() }
    }

    /// The same network for evaluation alone, faster: BatchNorm's running statistics, as they are now, are folded
    /// into the backbone's convolutions. Logits are those of [`Network::new`] up to rounding.
    ///
    /// What is written to the backbone's weights later, it does not see; and [`Network::forward_train`] panics.
    ///
    /// # Panics
    /// If the weights' layout is of another network.
    pub fn for_inference(architecture: &Architecture, weights: &Weights) -> Network {
        let mut network = Network::new(architecture, weights);
        network.parts.backbone.fold();
        network
    }

    /// Takes all tensors, in the order of the reference's state dict.
    pub(crate) fn assemble(architecture: &Architecture, root: &Scope<'_, '_>) -> Parts {
        let a = architecture;
        let [c1, c2, c3, c4, cout] = a.backbone.widths();
        let latent =
            root.param("latent", &[a.tokens[0], c1], Init::Normal { std: 0.02, limit: 2.0 });
        let backbone = Backbone::new(root, &a.backbone, a.drop_path);
        let hidden = a.backbone.head_hidden().map(|width| (width, a.head_dropout));
        let head = |inputs: i64| ClassifierSize { inputs, hidden, classes: a.classes };
        let near_zero = matches!(a.backbone, BackboneSpec::RegNet(_));
        // Each family has the classifier of the features at another place of its state dict.
        let cnn_if_at = |place: HeadPlace| {
            (a.backbone.family().head_place == place).then(|| {
                FeatureClassifier::of_cnn(&(root / "classifier_cnn"), head(cout), near_zero)
            })
        };
        let cnn_first = cnn_if_at(HeadPlace::Backbone);
        let stages = std::array::from_fn(|stage| Stage::new(root, a, stage));
        let last_write = a
            .with_last_ca
            .then(|| FeatureWrite::new(&(root / "last_cross_att_z2x"), cout, c4, a.dropout));
        let cnn_second = cnn_if_at(HeadPlace::LastWrite);
        let classify_early = Linear::new(&(root / "early_classifier3"), c3, a.classes);
        let transferred = if a.with_isc { c4 } else { 0 };
        let transfer =
            |name: &str| a.with_isc.then(|| KnowledgeTransfer::new(&(root / name), a.classes, c4));
        let to_att = transfer("isc3");
        let classify_att = Linear::new(&(root / "classifier_att"), c4 + transferred, a.classes);
        let to_merge = transfer("isc4");
        let cnn_third = cnn_if_at(HeadPlace::Transfers);
        let classify_cnn = cnn_first.or(cnn_second).or(cnn_third).expect("it has one place");
        let classify_merge =
            MergeClassifier::new(&(root / "classifier_merge"), head(cout + c4 + transferred));
        let transitions = LatentTransition::all(root, a.tokens, [c1, c2, c3, c4]);
        let rate_pooled = if hidden.is_none() { a.head_dropout } else { 0.0 };
        let dropout_pooled = Dropout::new(&(root / "classifier_cnn"), "dropout", rate_pooled);
        Parts {
            latent,
            backbone,
            stages,
            transitions,
            last_write,
            classify_early,
            classify_att,
            dropout_pooled,
            classify_cnn,
            classify_merge,
            transfer: to_att.zip(to_merge).map(<[_; 2]>::from),
        }
    }

    /// Logits of all exits in training: batch statistics, which also move the running ones, and dropout from
    /// `draws`. `images` is `[B, 3, S, S]`, of the weights' kind and on their device.
    ///
    /// # Panics
    /// If B is 1, because BatchNorm has no statistics of one sample; if kind, device or shape do not fit.
    pub fn forward_train(&self, images: &Tensor, draws: &Draws) -> Exits {
        assert!(images.size()[0] > 1, "training needs at least 2 images in a micro-batch");
        self.parts.forward(images, Mode::Train(*draws))
    }

    /// Logits of all exits with running statistics, without dropout and without a graph.
    ///
    /// # Panics
    /// If kind, device or shape of the images do not fit.
    pub fn forward_eval(&self, images: &Tensor) -> Exits {
        tch::no_grad(|| self.parts.forward(images, Mode::Eval))
    }

    /// Writes the gradients of the scalar `loss` into `flat` `[P]`, in flat order, over what was there. A
    /// parameter that the loss does not depend on gets zeros. The graph is freed; no `.grad` is touched.
    ///
    /// # Errors
    /// [`GradientError`] if `flat` has another size, kind or device, or backward fails.
    pub fn gradients(&self, loss: &Tensor, flat: &mut Tensor) -> Result<(), GradientError> {
        libtorch::gradients_into(loss, &self.leaves, flat)
    }
}

impl Stage {
    /// `stage` counts from 0.
    fn new(root: &Scope<'_, '_>, a: &Architecture, stage: usize) -> Stage {
        let width = a.backbone.widths()[stage];
        let number = stage + 1;
        let read = || LatentRead::new(root, number, width, a.with_dwc, a.dropout);
        // Without its first reading of the image the network does not train; it is no option.
        let read = (stage == 0 || a.with_x2z).then(read);
        let write = || {
            let scope = root / &format!("cross_att{number}_z2x");
            FeatureWrite::new(&scope, width, width, a.dropout)
        };
        let write = (stage > 0 && a.with_z2x).then(write);
        let size = LatentSize {
            layers: a.layers[stage],
            width,
            heads: a.heads[stage],
            widening: a.sa_widening_factor,
            dropout: a.dropout,
        };
        let attention = LatentStage::new(&(root / &format!("self_att{number}")), size);
        Stage { read, write, attention }
    }

    /// `z` `[B, N, C]` and `x` `[B, C, H, W]` to both updated: the latents see the features they wrote to.
    fn forward(&self, z: Tensor, x: Tensor, mode: Mode) -> (Tensor, Tensor) {
        let x = match &self.write {
            Some(write) => write.forward(&x, &z, mode),
            None => x,
        };
        let z = match &self.read {
            Some(read) => read.forward(&z, &x, mode),
            None => z,
        };
        (self.attention.forward(z, mode), x)
    }
}

/// A pass that has come to an exit of the latents. Axes as in the file; C is that of the stage reached.
#[derive(Debug)]
pub(crate) struct Reached {
    /// `[B, N, C]`
    z: Tensor,
    /// What the next stage of the CNN takes, `[B, C, H, W]`.
    x: Tensor,
    /// The mean of `z` over its tokens, `[B, C]`.
    code: Tensor,
    /// Of the exit, `[B, K]`.
    pub(crate) logits: Tensor,
}

impl Reached {
    /// The samples at `rows` `[B′]`, i64, and no others.
    pub(crate) fn only(&self, rows: &Tensor) -> Reached {
        let [z, code, logits] =
            [&self.z, &self.code, &self.logits].map(|tensor| tensor.index_select(0, rows));
        Reached { z, x: samples(&self.x, rows), code, logits }
    }
}

impl Parts {
    fn forward(&self, images: &Tensor, mode: Mode) -> Exits {
        let reached = self.to_early3(images, mode);
        let early3 = reached.logits.shallow_clone(); // [B, K]
        let reached = self.to_att(reached, mode);
        let att = reached.logits.shallow_clone(); // [B, K]
        let x = self.features(&reached, mode); // [B, Cout, H/16, W/16]

        // Without a last write the merge exit sees what dropout left, as in the reference (SPEC §17, Q12).
        let pooled = self.dropout_pooled.forward(average(&x), mode); // [B, Cout]
        let cnn = self.classify_cnn.forward(&pooled, mode); // [B, K]
        let merge = self.merge(&reached, &x, pooled, mode); // [B, K]
        Exits { early3, att, cnn, merge }
    }

    /// As far as the exit `early3`: CNN stages 1 and 2.
    pub(crate) fn to_early3(&self, images: &Tensor, mode: Mode) -> Reached {
        let x = self.backbone.stem(&laid_out(images), mode); // [B, C1, H, W]
        let z = self.latent.expand([images.size()[0], -1, -1], false); // [B, N, C1]
        let (mut z, mut x) = self.stages[0].forward(z, x, mode);
        x = self.backbone.stage(0, &x, mode); // [B, C2, H/2, W/2]

        z = self.transitions[0].forward(&z); // [B, N/2, C2]
        (z, x) = self.stages[1].forward(z, x, mode);
        x = self.backbone.stage(1, &x, mode); // [B, C3, H/4, W/4]

        z = self.transitions[1].forward(&z); // [B, N/4, C3]
        (z, x) = self.stages[2].forward(z, x, mode);
        let code = token_mean(&z); // [B, C3]
        let logits = self.classify_early.forward(&code); // [B, K]
        Reached { z, x, code, logits }
    }

    /// On to the exit `att`: CNN stage 3.
    pub(crate) fn to_att(&self, early: Reached, mode: Mode) -> Reached {
        let Reached { z, x, logits, .. } = early;
        let x = self.backbone.stage(2, &x, mode); // [B, C4, H/8, W/8]
        let z = self.transitions[2].forward(&z); // [B, N/8, C4]
        let (z, x) = self.stages[3].forward(z, x, mode);
        let code = token_mean(&z); // [B, C4]
        let joint = match &self.transfer {
            Some([to_att, _]) => Tensor::cat(&[&code, &to_att.forward(&logits, mode)], 1),
            None => code.shallow_clone(),
        };
        let logits = self.classify_att.forward(&joint); // [B, K]
        Reached { z, x, code, logits }
    }

    /// CNN stage 4: the features `[B, Cout, H/16, W/16]` that the last two exits read.
    pub(crate) fn features(&self, att: &Reached, mode: Mode) -> Tensor {
        self.backbone.stage(3, &att.x, mode)
    }

    /// Logits `[B, K]` of the exit `cnn` in evaluation, of `pooled` `[B, Cout]`.
    pub(crate) fn cnn(&self, pooled: &Tensor) -> Tensor {
        self.classify_cnn.forward(pooled, Mode::Eval)
    }

    /// Logits `[B, K]` of the exit `merge`, of the features `x` and what they were `pooled` to.
    pub(crate) fn merge(&self, att: &Reached, x: &Tensor, pooled: Tensor, mode: Mode) -> Tensor {
        let pooled = match &self.last_write {
            Some(write) => average(&write.forward(x, &att.z, mode)),
            None => pooled,
        };
        let joint = match &self.transfer {
            Some([_, to_merge]) => {
                Tensor::cat(&[&pooled, &att.code, &to_merge.forward(&att.logits, mode)], 1)
            }
            None => Tensor::cat(&[&pooled, &att.code], 1),
        };
        self.classify_merge.forward(&joint, mode)
    }
}

/// The samples of a map at `rows` `[B′]`, i64; channels that lie next to each other still do.
pub(crate) fn samples(x: &Tensor, rows: &Tensor) -> Tensor {
    if fused::takes(x) {
        return fused::by_channels(&fused::by_rows(x).index_select(0, rows));
    }
    x.index_select(0, rows)
}

/// Images as the convolutions take them: with channels next to each other, where all that follows keeps them.
fn laid_out(images: &Tensor) -> Tensor {
    if images.device() == Device::Cpu && images.kind() != Kind::Float {
        return images.shallow_clone();
    }
    let rows = images.permute([0, 2, 3, 1]).contiguous(); // [B, S, S, 3]
    rows.permute([0, 3, 1, 2])
}

/// `[B, N, C]` to `[B, C]`.
fn token_mean(z: &Tensor) -> Tensor {
    z.mean_dim([1_i64].as_slice(), false, None)
}

/// `[B, C, H, W]` to `[B, C]`.
pub(crate) fn average(x: &Tensor) -> Tensor {
    x.mean_dim([2_i64, 3].as_slice(), false, None)
}
