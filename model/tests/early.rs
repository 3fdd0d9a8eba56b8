//! Early exit for real: the answers are those of the full forward, whoever leaves where.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::sync::Arc;

use model::{
    Answers, Architecture, Layout, ModelConfig, Network, Weights, confidences,
    dynamic::{self, NEVER},
};
use tch::{Device, Kind, Tensor};

const BATCH: usize = 9;

fn network(name: &str, change: impl FnOnce(&mut ModelConfig)) -> Network {
    made(name, change, Network::new)
}

fn made(
    name: &str,
    change: impl FnOnce(&mut ModelConfig),
    make: fn(&Architecture, &Weights) -> Network,
) -> Network {
    libtorch::init(1).unwrap();
    let published = ModelConfig::published(name);
    let mut config =
        ModelConfig { classes: 10, input_size: 64, depth_factor: Some([1; 4]), ..published };
    change(&mut config);
    let architecture = Architecture::try_from(&config).unwrap();
    let weights =
        Weights::initial(Arc::new(Layout::of(&architecture)), 5, Kind::Float, Device::Cpu);
    make(&architecture, &weights)
}

fn images() -> Tensor {
    let batch = i64::try_from(BATCH).unwrap();
    let places = Tensor::arange(batch * 3 * 64 * 64, (Kind::Float, Device::Cpu));
    ((&places * 0.37).sin() * 2.0 + (places * 0.0011).cos()).view([batch, 3, 64, 64])
}

/// What the full forward says at each exit, and how sure it is.
fn full(network: &Network, images: &Tensor) -> (Vec<Tensor>, [Vec<f32>; 4]) {
    let exits = network.forward_eval(images);
    let logits: Vec<_> = exits.in_order().iter().map(|logits| logits.shallow_clone()).collect();
    (logits, exits.in_order().map(confidences))
}

/// The largest difference of an answer from what the full forward says at the same exit.
fn farthest(answers: &Answers, logits: &[Tensor]) -> f64 {
    let far = |(row, exit): (usize, &usize)| {
        let row = i64::try_from(row).unwrap();
        let (own, other) = (answers.logits.get(row), logits[*exit].get(row));
        (own - other).abs().max().double_value(&[])
    };
    answers.exits.iter().enumerate().map(far).fold(0.0, f64::max)
}

/// Thresholds at which two samples leave at each exit but the last, and no sample is at one of them.
fn apart(sure: &[Vec<f32>; 4]) -> [f32; 4] {
    dynamic::thresholds(sure, [0.25; 4]).map(|threshold| threshold * (1.0 - 1e-5))
}

const NAMES: [&str; 3] =
    ["reg400m_perceiver_t32", "resnet18_perceiver_t128", "mobilenetV3_0x5_perceiver_t128"];

#[test]
fn where_all_take_one_exit_the_bits_are_the_full_forwards() {
    for name in NAMES {
        let (network, images) = (network(name, |_| {}), images());
        let (logits, _) = full(&network, &images);
        for (exit, logits) in logits.iter().enumerate() {
            let thresholds = std::array::from_fn(|at| if at == exit { 0.0 } else { NEVER });
            let answers = network.forward_early(&images, thresholds);
            assert_eq!(answers.exits, [exit; BATCH], "{name}");
            assert!(answers.logits.equal(logits), "{name}: exit {exit}");
            assert_eq!(answers.confidences, confidences(logits), "{name}: exit {exit}");
        }
    }
}

#[test]
fn where_some_leave_at_each_exit_the_answers_differ_by_rounding_only() {
    for name in NAMES {
        for with_last_ca in [true, false] {
            let network = network(name, |config| {
                config.with_last_ca = with_last_ca;
                config.with_isc = with_last_ca;
            });
            let images = images();
            let (logits, sure) = full(&network, &images);
            let thresholds = apart(&sure);
            let answers = network.forward_early(&images, thresholds);
            let expected: Vec<usize> = (0..BATCH)
                .map(|row| (0..3).find(|&exit| sure[exit][row] >= thresholds[exit]).unwrap_or(3))
                .collect();
            assert_eq!(answers.exits, expected, "{name}");
            for exit in 0..4 {
                assert!(expected.contains(&exit), "{name}: nobody takes exit {exit}: {expected:?}");
            }
            let far = farthest(&answers, &logits);
            assert!(far < 1e-5, "{name}: {far:.1e}");
        }
    }
}

#[test]
fn one_image_and_a_batch_are_answered_alike() {
    let (network, images) = (network("reg400m_perceiver_t32", |_| {}), images());
    let (_, sure) = full(&network, &images);
    let thresholds = apart(&sure);
    let together = network.forward_early(&images, thresholds);
    for row in 0..BATCH {
        let row = i64::try_from(row).unwrap();
        let alone = network.forward_early(&images.narrow(0, row, 1), thresholds);
        assert_eq!(alone.exits[0], together.exits[usize::try_from(row).unwrap()]);
        let far = (alone.logits.get(0) - together.logits.get(row)).abs().max().double_value(&[]);
        assert!(far < 1e-5, "{far:.1e}");
    }
}

#[test]
fn each_image_may_have_thresholds_of_its_own() {
    let (network, images) = (network("reg400m_perceiver_t32", |_| {}), images());
    let (logits, _) = full(&network, &images);
    let wanted: Vec<usize> = (0..BATCH).map(|row| row % 4).collect();
    let only = |exit: &usize| std::array::from_fn(|at| if at == *exit { 0.0 } else { NEVER });
    let thresholds: Vec<[f32; 4]> = wanted.iter().map(only).collect();
    let answers = network.forward_early_each(&images, &thresholds);
    assert_eq!(answers.exits, wanted);
    let far = farthest(&answers, &logits);
    assert!(far < 1e-5, "{far:.1e}");
}

#[test]
fn a_network_for_inference_exits_early_as_its_full_forward_does() {
    for name in NAMES {
        let (network, images) = (made(name, |_| {}, Network::for_inference), images());
        let (logits, sure) = full(&network, &images);
        let answers = network.forward_early(&images, apart(&sure));
        assert!((0..4).all(|exit| answers.exits.contains(&exit)), "{name}: {:?}", answers.exits);
        let far = farthest(&answers, &logits);
        assert!(far < 1e-5, "{name}: {far:.1e}");
    }
}
