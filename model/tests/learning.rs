//! What needs no reference: gradients against finite differences, the same bits twice, and a loss that falls.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::sync::Arc;

use model::{
    AdamW, AdamWConfig, Architecture, Draws, Ema, Layout, LossConfig, ModelConfig, Network, Role,
    Schedule, ScheduleConfig, Targets, Update, Weights, clip_norm, multi_exit,
};
use tch::{Device, Kind, Tensor};

const DRAWS: Draws = Draws { seed: 3, step: 0, virtual_rank: 0 };

/// A small network over its initial weights.
struct Model {
    weights: Weights,
    network: Network,
}

fn small(change: impl FnOnce(&mut ModelConfig), kind: Kind) -> Model {
    libtorch::init(1).unwrap();
    let mut config = ModelConfig {
        classes: 10,
        input_size: 32,
        depth_factor: Some([1; 4]),
        ..ModelConfig::published("reg400m_perceiver_t32")
    };
    change(&mut config);
    let architecture = Architecture::try_from(&config).unwrap();
    let layout = Arc::new(Layout::of(&architecture));
    let weights = Weights::initial(layout, 7, kind, Device::Cpu);
    let network = Network::new(&architecture, &weights);
    Model { weights, network }
}

/// `[B, 3, 32, 32]` images of ten kinds of stripes, with noise, and their labels.
fn stripes(batch: i64, kind: Kind) -> (Tensor, Tensor) {
    let options = (Kind::Double, Device::Cpu);
    let labels = Tensor::arange(batch, (Kind::Int64, Device::Cpu)).remainder(10);
    let frequency = (&labels + 1).to_kind(Kind::Double).view([batch, 1, 1, 1]) * 0.2;
    let axis = Tensor::arange(32, options);
    let rows = (axis.view([1, 1, 32, 1]) * &frequency).sin();
    let columns = (axis.view([1, 1, 1, 32]) * frequency).cos();
    let noise = (Tensor::arange(batch * 3 * 32 * 32, options) * 12.9898).sin() * 43_758.545;
    let noise = (&noise - noise.floor()).view([batch, 3, 32, 32]);
    ((rows + columns + noise).to_kind(kind), labels)
}

fn loss(model: &Model, images: &Tensor, labels: &Tensor, draws: &Draws) -> Tensor {
    let exits = model.network.forward_train(images, draws);
    multi_exit(&exits, Targets::Labels(labels), &LossConfig::default()).total
}

#[test]
fn gradients_equal_finite_differences() {
    let mut model = small(|config| config.dropout = 0.1, Kind::Double);
    let (images, labels) = stripes(4, Kind::Double);
    // The teacher is a constant to autograd but not to a difference, so there is none here.
    let config = LossConfig { with_kd: false, ..LossConfig::default() };
    let loss = |model: &Model| {
        let exits = model.network.forward_train(&images, &DRAWS);
        multi_exit(&exits, Targets::Labels(&labels), &config).total
    };
    let mut gradients = model.weights.params().zeros_like();
    model.network.gradients(&loss(&model), &mut gradients).unwrap();
    let options = (Kind::Double, Device::Cpu);
    let direction =
        (Tensor::arange(model.weights.params().numel() as i64, options) * 12.9898).sin();
    let direction = &direction / direction.norm();
    let slope = gradients.dot(&direction).double_value(&[]);

    let width = 1e-7;
    let start = model.weights.params().copy();
    let mut at = |offset: f64| {
        let moved = &start + &direction * offset;
        tch::no_grad(|| model.weights.params_mut().copy_(&moved));
        loss(&model).double_value(&[])
    };
    let difference = (at(width) - at(-width)) / (2.0 * width);
    assert!((difference / slope - 1.0).abs() < 1e-5, "slope {slope}, difference {difference}");
}

/// Thirty updates on the same 64 images; the losses, and everything they left.
fn thirty_updates(dropout: f64) -> (Vec<f64>, Vec<Vec<u32>>) {
    let mut model = small(|config| config.dropout = dropout, Kind::Float);
    let (images, labels) = stripes(64, Kind::Float);
    let layout = model.weights.layout().clone();
    let mut optimizer = AdamW::new(AdamWConfig::default(), &layout, model.weights.params());
    let mut ema = Ema::new(&model.weights);
    let mut gradients = model.weights.params().zeros_like();
    let config =
        ScheduleConfig { epochs: 30, lr: 1e-3, warmup_epochs: 3, ..ScheduleConfig::default() };
    let schedule = Schedule::new(&config, 1).unwrap();
    let mut losses = Vec::new();
    for step in 0..schedule.steps() {
        let value = loss(&model, &images, &labels, &Draws { step, ..DRAWS });
        model.network.gradients(&value, &mut gradients).unwrap();
        losses.push(value.double_value(&[]));
        clip_norm(&mut gradients, 5.0);
        let update = Update {
            step,
            learning_rate: schedule.learning_rate(step),
            weight_decay: schedule.weight_decay(step),
        };
        optimizer.step(model.weights.params_mut(), &gradients, &update);
        ema.update(&model.weights, 0.9);
    }
    let [first, second] = optimizer.moments();
    let averaged = ema.weights();
    let state = [
        model.weights.params(),
        model.weights.buffers(),
        averaged.params(),
        averaged.buffers(),
        first,
        second,
    ];
    let bits = |tensor: &Tensor| {
        libtorch::slice::<f32>(tensor).unwrap().iter().map(|value| value.to_bits()).collect()
    };
    (losses, state.map(bits).into())
}

#[test]
fn the_loss_falls_on_64_images_and_the_same_seed_gives_the_same_bits_twice() {
    let (losses, state) = thirty_updates(0.0);
    assert!(losses.iter().all(|loss| loss.is_finite()));
    assert!(losses[29] < 0.6 * losses[0], "{} to {}", losses[0], losses[29]);
    tch::manual_seed(12_345); // libtorch's own random state changes nothing.
    let (again, state_again) = thirty_updates(0.0);
    assert_eq!(losses, again);
    assert!(state == state_again, "the same seed gave other bits");
}

#[test]
fn dropout_follows_its_draws_and_leaves_libtorch_s_random_state_alone() {
    let model = small(|config| config.dropout = 0.3, Kind::Float);
    let (images, _) = stripes(4, Kind::Float);
    let merge = |draws: Draws| tch::no_grad(|| model.network.forward_train(&images, &draws).merge);
    let draw = || Tensor::rand([4], (Kind::Float, Device::Cpu));
    tch::manual_seed(1);
    let expected = draw();
    tch::manual_seed(1);
    let first = merge(DRAWS);
    assert_eq!(draw(), expected);
    assert_eq!(first, merge(DRAWS));
    assert_ne!(first, merge(Draws { virtual_rank: 1, ..DRAWS }));
    assert_ne!(first, merge(Draws { step: 1, ..DRAWS }));
}

#[test]
fn a_parameter_without_gradient_gives_zeros_whatever_was_there_before() {
    let model = small(|_| {}, Kind::Float);
    let (images, _) = stripes(4, Kind::Float);
    let exits = model.network.forward_train(&images, &DRAWS);
    let mut gradients = model.weights.params().ones_like();
    model.network.gradients(&exits.early3.square().sum(Kind::Float), &mut gradients).unwrap();
    let gradients = libtorch::slice::<f32>(&gradients).unwrap();
    let layout = model.weights.layout();
    let of = |name: &str| &gradients[layout.entry(name).unwrap().range.clone()];
    assert!(of("classifier_merge.1.weight").iter().all(|gradient| *gradient == 0.0));
    assert!(of("last_cross_att_z2x.mlp.fc1.weight").iter().all(|gradient| *gradient == 0.0));
    assert!(of("early_classifier3.weight").iter().any(|gradient| *gradient != 0.0));
    assert!(of("latent").iter().any(|gradient| *gradient != 0.0));
}

#[test]
fn a_training_forward_moves_the_flat_buffers_and_evaluation_does_not() {
    let mut model = small(|_| {}, Kind::Float);
    let (images, labels) = stripes(8, Kind::Float);
    let before = model.weights.buffers().copy();
    let evaluated = model.network.forward_eval(&images);
    assert_eq!(*model.weights.buffers(), before);
    assert!(!evaluated.merge.requires_grad());
    let first = loss(&model, &images, &labels, &DRAWS).double_value(&[]);
    assert_ne!(*model.weights.buffers(), before);
    // Restoring them in place restores everything that a forward changes.
    tch::no_grad(|| model.weights.buffers_mut().copy_(&before));
    assert_eq!(model.network.forward_eval(&images).merge, evaluated.merge);
    assert_eq!(loss(&model, &images, &labels, &DRAWS).double_value(&[]), first);
}

#[test]
fn what_is_written_to_the_flat_parameters_is_what_the_network_computes_with() {
    let mut model = small(|_| {}, Kind::Float);
    let (images, labels) = stripes(8, Kind::Float);
    let bias = Tensor::from_slice(&[0.0_f32, 0.0, 0.0, 99.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
    model.weights.set_value("classifier_cnn.bias", &bias).unwrap();
    let exits = model.network.forward_eval(&images);
    assert_eq!(exits.cnn.argmax(-1, false), Tensor::full([8], 3, (Kind::Int64, Device::Cpu)));
    assert_eq!(exits.correct(&labels)[2], 1); // Of labels 0 to 7 one is 3.
}

#[test]
fn values_that_do_not_fit_are_refused_by_name() {
    let mut model = small(|_| {}, Kind::Float);
    let zeros = Tensor::zeros([3], (Kind::Float, Device::Cpu));
    let error = model.weights.set_value("latent", &zeros).unwrap_err();
    assert_eq!(error.to_string(), "latent has shape [32, 32], and [3] was given");
    let counter = "cnn_stem.1.num_batches_tracked";
    assert!(model.weights.set_value(counter, &zeros).unwrap_err().to_string().contains(counter));
    assert!(model.weights.value(counter).is_none());
    assert!(model.weights.layout().counters().any(|name| name == counter));
}

#[test]
fn ranges_tile_the_flat_tensors_and_decay_comes_first() {
    let layout = small(|_| {}, Kind::Float).weights.layout().clone();
    for (roles, len) in [
        (&[Role::Decayed, Role::Undecayed][..], layout.param_len()),
        (&[Role::Buffer][..], layout.buffer_len()),
    ] {
        let mut ranges: Vec<_> = layout
            .entries()
            .iter()
            .filter(|entry| roles.contains(&entry.role))
            .map(|entry| entry.range.clone())
            .collect();
        ranges.sort_by_key(|range| range.start);
        let end = ranges.iter().fold(0, |end, range| {
            assert_eq!(range.start, end);
            range.end
        });
        assert_eq!(end, len);
    }
    let decayed = layout.entries().iter().filter(|entry| entry.role == Role::Decayed);
    assert_eq!(decayed.map(|entry| entry.range.end).max(), Some(layout.decay_len()));
}
