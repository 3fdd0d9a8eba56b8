//! What Prometheus is told of a server. Names follow Prometheus; see `docs/metrics.md`.

use std::{sync::Arc, time::Duration};

use prometheus_client::{
    encoding::{EncodeLabelSet, text},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};

/// Upper bounds of the buckets of the phases, in seconds.
const SECONDS: [f64; 12] = [0.001, 0.003, 0.01, 0.03, 0.06, 0.125, 0.25, 0.5, 1.0, 2.0, 5.0, 15.0];
/// Of batches, in images.
const IMAGES: [f64; 9] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 1024.0];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Answered {
    face: &'static str,
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Taken {
    exit: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct InPhase {
    phase: &'static str,
}

/// Counts and times. Clones count together.
#[derive(Debug, Clone)]
pub(super) struct Figures {
    registry: Arc<Registry>,
    requests: Family<Answered, Counter>,
    waiting: Gauge,
    batches: Histogram,
    exits: Family<Taken, Counter>,
    phases: Family<InPhase, Histogram, fn() -> Histogram>,
}

impl Figures {
    pub(super) fn new() -> Self {
        let mut registry = Registry::with_prefix("percheron_serve");
        let requests = Family::default();
        registry.register("requests", "requests by how they ended", requests.clone());
        let waiting = Gauge::default();
        registry.register("requests_under_way", "requests that wait now", waiting.clone());
        let batches = Histogram::new(IMAGES);
        registry.register("batch_images", "images answered together", batches.clone());
        let exits = Family::default();
        registry.register("exits", "images by the exit that they took", exits.clone());
        let phases: Family<InPhase, Histogram, fn() -> Histogram> =
            Family::new_with_constructor(|| Histogram::new(SECONDS));
        let help = "where the time of a request went";
        registry.register_with_unit("phase_duration", help, Unit::Seconds, phases.clone());
        Self { registry: Arc::new(registry), requests, waiting, batches, exits, phases }
    }

    /// A request of a face, `http` or `grpc`, has ended.
    pub(super) fn answered(&self, face: &'static str, outcome: &'static str) {
        self.requests.get_or_create(&Answered { face, outcome }).inc();
    }

    pub(super) fn under_way(&self, requests: usize) {
        self.waiting.set(i64::try_from(requests).unwrap_or(i64::MAX));
    }

    /// A batch was answered.
    pub(super) fn batch(&self, images: usize, network: Duration) {
        self.batches.observe(images as f64);
        self.phase("network", network);
    }

    pub(super) fn exit(&self, exit: &'static str) {
        self.exits.get_or_create(&Taken { exit }).inc();
    }

    /// One of `decode`, `wait` and `network`.
    pub(super) fn phase(&self, phase: &'static str, took: Duration) {
        self.phases.get_or_create(&InPhase { phase }).observe(took.as_secs_f64());
    }

    /// The text of a scrape, in OpenMetrics 1.0.
    pub(super) fn text(&self) -> String {
        let mut text = String::new();
        text::encode(&mut text, &self.registry).expect("a string takes all that is written");
        text
    }
}
