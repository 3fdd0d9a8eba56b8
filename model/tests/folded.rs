//! A network for inference answers as the network that it was made of.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::sync::Arc;

use model::{Architecture, Layout, ModelConfig, Network, Weights};
use tch::{Device, Kind, Tensor};

/// Weights whose running statistics are far from the first ones, and whose scales are not all alike.
fn weights(architecture: &Architecture, kind: Kind) -> Weights {
    let layout = Arc::new(Layout::of(architecture));
    let mut weights = Weights::initial(Arc::clone(&layout), 5, kind, Device::Cpu);
    for (number, entry) in layout.entries().iter().enumerate() {
        let count = entry.shape.iter().product::<i64>();
        let places = Tensor::arange(count, (Kind::Double, Device::Cpu)) * 1.7 + number as f64;
        let wave = places.sin().view(entry.shape.as_slice());
        let is_norm = entry.shape.len() == 1 && entry.name.ends_with("weight");
        let value = if entry.name.ends_with("running_mean") {
            wave * 0.2
        } else if entry.name.ends_with("running_var") {
            wave * 0.5 + 1.0
        } else if is_norm {
            wave * 0.3 + 0.8
        } else {
            continue;
        };
        weights.set_value(&entry.name, &value.to_kind(kind)).unwrap();
    }
    weights
}

#[test]
fn logits_are_those_of_the_network_with_batch_norm() {
    libtorch::init(1).unwrap();
    for name in [
        "reg400m_perceiver_t32",
        "resnet18_perceiver_t128",
        "resnet50_0375_perceiver_t128",
        "mobilenetV3_0x5_perceiver_t128",
    ] {
        let published = ModelConfig::published(name);
        let config =
            ModelConfig { classes: 10, input_size: 64, depth_factor: Some([1; 4]), ..published };
        let architecture = Architecture::try_from(&config).unwrap();
        let places = Tensor::arange(3 * 3 * 64 * 64, (Kind::Double, Device::Cpu));
        let images = ((&places * 0.37).sin() * 2.0 + (places * 0.0011).cos()).view([3, 3, 64, 64]);
        for (kind, tolerance) in [(Kind::Float, 1e-4), (Kind::Double, 1e-10)] {
            let weights = weights(&architecture, kind);
            let images = images.to_kind(kind);
            let plain = Network::new(&architecture, &weights).forward_eval(&images);
            let folded = Network::for_inference(&architecture, &weights).forward_eval(&images);
            for (plain, folded) in plain.in_order().into_iter().zip(folded.in_order()) {
                let far =
                    (folded - plain).norm().double_value(&[]) / plain.norm().double_value(&[]);
                assert!(far < tolerance, "{name} {kind:?}: {far:.1e}");
            }
        }
    }
}

#[test]
#[should_panic(expected = "does not train")]
fn it_does_not_train() {
    libtorch::init(1).unwrap();
    let published = ModelConfig::published("resnet18_perceiver_t128");
    let config = ModelConfig { classes: 10, input_size: 64, ..published };
    let architecture = Architecture::try_from(&config).unwrap();
    let weights = weights(&architecture, Kind::Float);
    let network = Network::for_inference(&architecture, &weights);
    let images = Tensor::zeros([2, 3, 64, 64], (Kind::Float, Device::Cpu));
    drop(network.forward_train(&images, &model::Draws { seed: 1, step: 0, virtual_rank: 0 }));
}
