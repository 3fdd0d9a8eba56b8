//! What the families' own regularisation does: drop-path in ResNet, dropout in the classifiers of features.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::sync::Arc;

use model::{
    Architecture, Draws, Exits, Layout, LossConfig, ModelConfig, Network, Targets, Weights,
    multi_exit,
};
use tch::{Device, Kind, Tensor};

const DRAWS: Draws = Draws { seed: 3, step: 0, virtual_rank: 0 };

/// A network of 10 classes on 32 pixels, in f64.
struct Model {
    weights: Weights,
    network: Network,
}

fn small(name: &str, change: impl FnOnce(&mut ModelConfig)) -> Model {
    libtorch::init(1).unwrap();
    let mut config = ModelConfig {
        classes: 10,
        input_size: 32,
        depth_factor: Some([1; 4]),
        ..ModelConfig::published(name)
    };
    change(&mut config);
    let architecture = Architecture::try_from(&config).unwrap();
    let layout = Arc::new(Layout::of(&architecture));
    let mut weights = Weights::initial(layout.clone(), 7, Kind::Double, Device::Cpu);
    let is_last_norm = |name: &str| name.ends_with("bn2.weight") || name.ends_with("bn3.weight");
    // The last norm of a ResNet's block starts at zero, which would hide what the block does.
    for entry in layout.entries().iter().filter(|entry| is_last_norm(&entry.name)) {
        let ones = Tensor::ones(&entry.shape[..], (Kind::Double, Device::Cpu));
        weights.set_value(&entry.name, &ones).unwrap();
    }
    let network = Network::new(&architecture, &weights);
    Model { weights, network }
}

fn images(batch: i64) -> Tensor {
    let places = Tensor::arange(batch * 3 * 32 * 32, (Kind::Double, Device::Cpu));
    ((&places * 0.37).sin() + (places * 0.011).cos()).view([batch, 3, 32, 32])
}

fn train(model: &Model, draws: Draws) -> Exits {
    tch::no_grad(|| model.network.forward_train(&images(4), &draws))
}

#[test]
fn gradients_of_every_family_equal_finite_differences() {
    for name in
        ["resnet18_perceiver_t128", "resnet50_0375_perceiver_t64", "mobilenetV3_0x5_perceiver_t128"]
    {
        let mut model = small(name, |config| config.dropout = 0.1);
        let labels = Tensor::from_slice(&[1_i64, 7, 3, 9]);
        // The teacher is a constant to autograd but not to a difference, so there is none here.
        let config = LossConfig { with_kd: false, ..LossConfig::default() };
        let loss = |model: &Model| {
            let exits = model.network.forward_train(&images(4), &DRAWS);
            multi_exit(&exits, Targets::Labels(&labels), &config).total
        };
        let mut gradients = model.weights.params().zeros_like();
        model.network.gradients(&loss(&model), &mut gradients).unwrap();
        let direction =
            (Tensor::arange(gradients.numel() as i64, (Kind::Double, Device::Cpu)) * 12.9898).sin();
        let direction = &direction / direction.norm();
        let slope = gradients.dot(&direction).double_value(&[]);
        let (width, start) = (1e-7, model.weights.params().copy());
        let mut at = |offset: f64| {
            let moved = &start + &direction * offset;
            tch::no_grad(|| model.weights.params_mut().copy_(&moved));
            loss(&model).double_value(&[])
        };
        let difference = (at(width) - at(-width)) / (2.0 * width);
        let error = (difference / slope - 1.0).abs();
        assert!(error < 1e-4, "{name}: slope {slope}, difference {difference}");
    }
}

#[test]
fn drop_path_follows_its_draws_in_training_and_does_nothing_in_evaluation() {
    let with_rate = |rate: f64| {
        small("resnet18_perceiver_t128", |config| {
            config.drop_path = Some(rate);
            config.head_dropout = Some(0.0);
        })
    };
    let (dropping, plain) = (with_rate(0.5), with_rate(0.0));
    let first = train(&dropping, DRAWS);
    assert_eq!(first.cnn, train(&dropping, DRAWS).cnn);
    assert_ne!(first.cnn, train(&dropping, Draws { step: 1, ..DRAWS }).cnn);
    assert_ne!(first.cnn, train(&plain, DRAWS).cnn);
    assert_eq!(train(&plain, DRAWS).cnn, train(&plain, Draws { step: 1, ..DRAWS }).cnn);
    let (dropping, plain) = (with_rate(0.5), with_rate(0.0));
    let evaluate = |model: &Model| model.network.forward_eval(&images(4)).merge;
    assert_eq!(evaluate(&dropping), evaluate(&plain));
}

#[test]
fn the_merge_exit_of_a_resnet_sees_the_head_s_dropout_only_without_a_last_write() {
    for with_last_ca in [true, false] {
        let with_rate = |rate: f64| {
            small("resnet18_perceiver_t128", |config| {
                config.with_last_ca = with_last_ca;
                config.drop_path = Some(0.0);
                config.head_dropout = Some(rate);
            })
        };
        let (dropped, plain) = (train(&with_rate(0.5), DRAWS), train(&with_rate(0.0), DRAWS));
        assert_ne!(dropped.cnn, plain.cnn);
        assert_eq!(dropped.att, plain.att);
        assert_eq!(dropped.merge == plain.merge, with_last_ca);
    }
}

#[test]
fn the_heads_dropout_of_a_mobilenet_reaches_both_classifiers_of_features() {
    let with_rate = |rate: f64| {
        small("mobilenetV3_0x5_perceiver_t128", |config| config.head_dropout = Some(rate))
    };
    let (dropped, plain) = (train(&with_rate(0.5), DRAWS), train(&with_rate(0.0), DRAWS));
    assert_ne!(dropped.cnn, plain.cnn);
    assert_ne!(dropped.merge, plain.merge);
    assert_eq!(dropped.att, plain.att);
}

#[test]
fn a_network_has_as_many_classes_as_were_asked_for_and_other_heads_change_the_result() {
    let name = "reg400m_perceiver_t32";
    let plain = small(name, |_| {});
    let exits = plain.network.forward_eval(&images(4));
    assert!(exits.in_order().iter().all(|logits| logits.size() == [4, 10]));
    let split = small(name, |config| config.num_sa_heads = Some([2, 4, 8, 16]));
    assert_ne!(exits.early3, split.network.forward_eval(&images(4)).early3);
}
