//! What Prometheus is told of a run. Counts and figures are a fold of the event log, so that a coordinator that
//! takes over goes on counting where the one before ended; how the workers are is asked at each scrape.
//!
//! Names follow Prometheus: a unit at the end, `_total` for what only grows. See `docs/metrics.md`.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, PoisonError, atomic::AtomicU64},
};

use cluster::{ExitScores, Ledger, Record, StepMetrics, Timestamp, WorkerId};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, text},
    metrics::{
        MetricType,
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::{ConstGauge, Gauge},
        histogram::Histogram,
        info::Info,
    },
    registry::{Registry, Unit},
};
use proto::v1::{self, DeviceHealth};
use tokio::sync::watch;

use crate::Entry;

/// Upper bounds of the buckets of a step and its phases, in seconds: from a digit's step to a slow node's.
const STEP_BUCKETS: [f64; 14] =
    [0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 12.0, 30.0, 60.0];
/// Of a recovery: from a socket that broke to machines that had to be found.
const RECOVERY_BUCKETS: [f64; 10] = [0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 60.0, 600.0];

type Real = Gauge<f64, AtomicU64>;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Phase {
    phase: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Scored {
    exit: &'static str,
    weights: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Planned {
    planned: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Settled {
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfWorker {
    worker: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfWorkerBy {
    worker: String,
    reason: String,
}

/// What the drivers of the workers' GPUs said last.
#[derive(Debug, Clone, Default)]
pub(crate) struct Devices(Arc<Mutex<BTreeMap<WorkerId, DeviceHealth>>>);

impl Devices {
    pub(crate) fn said(&self, worker: WorkerId, health: DeviceHealth) {
        self.held(|devices| devices.insert(worker, health));
    }

    pub(crate) fn forget(&self, worker: WorkerId) {
        self.held(|devices| devices.remove(&worker));
    }

    fn held<T>(&self, work: impl FnOnce(&mut BTreeMap<WorkerId, DeviceHealth>) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// All that a scrape gives.
pub(crate) struct Metrics {
    registry: Registry,
    fold: Fold,
    run: Mutex<Run>,
}

/// How the run stands.
#[derive(Debug, Default)]
struct Run {
    ledger: Ledger,
    /// When training stopped, as long as no step has been adopted since.
    stopped: Option<Timestamp>,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

/// What the records add up to.
#[derive(Debug, Clone)]
struct Fold {
    term: Gauge,
    generation: Gauge,
    members: Gauge,
    step: Gauge,
    images: Counter,
    loss: Real,
    gradient_norm: Real,
    learning_rate: Real,
    step_seconds: Histogram,
    phase_seconds: Family<Phase, Histogram, fn() -> Histogram>,
    recovery_seconds: Histogram,
    repeated: Counter,
    generations: Family<Planned, Counter>,
    joined: Counter,
    lost: Counter,
    refused: Counter,
    faulty: Gauge,
    checkpoints: Family<Settled, Counter>,
    checkpoint_step: Gauge,
    top1: Family<Scored, Real>,
}

impl Default for Fold {
    fn default() -> Self {
        Self {
            term: Gauge::default(),
            generation: Gauge::default(),
            members: Gauge::default(),
            step: Gauge::default(),
            images: Counter::default(),
            loss: Real::default(),
            gradient_norm: Real::default(),
            learning_rate: Real::default(),
            step_seconds: Histogram::new(STEP_BUCKETS),
            phase_seconds: Family::new_with_constructor(|| Histogram::new(STEP_BUCKETS)),
            recovery_seconds: Histogram::new(RECOVERY_BUCKETS),
            repeated: Counter::default(),
            generations: Family::default(),
            joined: Counter::default(),
            lost: Counter::default(),
            refused: Counter::default(),
            faulty: Gauge::default(),
            checkpoints: Family::default(),
            checkpoint_step: Gauge::default(),
            top1: Family::default(),
        }
    }
}

impl Metrics {
    /// Those of a run that is to make `steps` steps.
    pub(crate) fn new(
        run: &str,
        steps: u64,
        liveness: watch::Receiver<v1::Liveness>,
        devices: Devices,
    ) -> Self {
        let mut registry = Registry::with_prefix("percheron");
        let fold = Fold::default();
        let info = Info::new([("run", run.to_owned()), ("version", version())]);
        registry.register("run", "The run that this coordinator leads", info);
        let planned: Gauge = Gauge::default();
        planned.set(whole(steps));
        registry.register("steps_planned", "Steps of the whole run", planned);
        fold.register(&mut registry);
        registry.register_collector(Box::new(Workers { liveness, devices }));
        Self { registry, fold, run: Mutex::default() }
    }

    /// Takes an entry of the log in.
    pub(crate) fn observe(&self, entry: &Entry) {
        self.fold.observe(&entry.record);
        let mut run = self.run.lock().unwrap_or_else(PoisonError::into_inner);
        if run.ledger.canonical.0 > 0 && run.ledger.is_disturbed_by(&entry.record) {
            run.stopped.get_or_insert(entry.at);
        } else if matches!(entry.record, Record::StepAdopted { .. })
            && let Some(since) = run.stopped.take()
        {
            self.fold.recovery_seconds.observe(entry.at.since(since).as_secs_f64());
        }
        run.ledger.apply(&entry.record);
    }

    /// The text of a scrape, in OpenMetrics 1.0.
    pub(crate) fn text(&self) -> String {
        let mut out = String::new();
        text::encode(&mut out, &self.registry).expect("a string takes all that is written");
        out
    }
}

impl Fold {
    #[rustfmt::skip] // A line a metric.
    fn register(&self, registry: &mut Registry) {
        let Self { term, generation, members, step, images, loss, gradient_norm, learning_rate, .. } = self.clone();
        let Self { step_seconds, phase_seconds, recovery_seconds, repeated, generations, .. } = self.clone();
        let Self { joined, lost, refused, faulty, checkpoints, checkpoint_step, top1, .. } = self.clone();
        registry.register("term", "Leadership under which this coordinator speaks", term);
        registry.register("generation", "Version of the membership", generation);
        registry.register("generation_workers", "Workers of the newest generation", members);
        registry.register("generations", "Generations opened; planned ones lose no step", generations);
        registry.register("step", "Newest step whose result the run has adopted", step);
        registry.register("images", "Images trained on in adopted steps", images);
        registry.register("steps_repeated", "Steps computed more than once", repeated);
        registry.register("loss", "Mean training loss of the newest step", loss);
        registry.register("gradient_norm", "L2 norm of the mean gradient before clipping, of the newest step", gradient_norm);
        registry.register("learning_rate", "Learning rate of the newest step", learning_rate);
        registry.register_with_unit("step_duration", "Wall time of adopted steps", Unit::Seconds, step_seconds);
        registry.register_with_unit("step_phase_duration", "Wall time of the phases of adopted steps, on the worker that reports", Unit::Seconds, phase_seconds);
        registry.register_with_unit("recovery_duration", "From the first news of a loss to the next adopted step", Unit::Seconds, recovery_seconds);
        registry.register("workers_joined", "Workers let in", joined);
        registry.register("workers_lost", "Workers lost", lost);
        registry.register("workers_refused", "Workers turned away", refused);
        registry.register("nodes_faulty", "Machines that no worker is let in from", faulty);
        registry.register("checkpoints", "Checkpoints by how they ended", checkpoints);
        registry.register("checkpoint_step", "Step of the newest checkpoint that can be trusted", checkpoint_step);
        registry.register("top1_ratio", "Share of the validation split whose first guess is right", top1);
    }

    fn observe(&self, record: &Record) {
        match record {
            Record::TermStarted { term } => {
                self.term.set(whole(term.0));
            }
            Record::GenerationOpened { generation, members, planned, .. } => {
                self.generation.set(whole(generation.0));
                self.members.set(whole(members.len() as u64));
                let planned = if *planned { "true" } else { "false" };
                self.generations.get_or_create(&Planned { planned }).inc();
            }
            Record::GenerationFormed { repeated, .. } => {
                self.repeated.inc_by(*repeated);
            }
            Record::StepAdopted { step, metrics, .. } => {
                self.step.set(whole(step.0));
                if let Some(metrics) = metrics {
                    self.stepped(metrics);
                }
            }
            Record::Evaluated { evaluation, .. } => {
                self.scored("current", &evaluation.weights);
                self.scored("ema", &evaluation.ema);
            }
            Record::WorkerJoined { .. } => {
                self.joined.inc();
            }
            Record::WorkerLost { .. } => {
                self.lost.inc();
            }
            Record::WorkerRefused { .. } => {
                self.refused.inc();
            }
            Record::NodeMarked { .. } => {
                self.faulty.inc();
            }
            Record::NodeReadmitted { .. } => {
                self.faulty.dec();
            }
            Record::CheckpointCommitted { step } => {
                self.checkpoints.get_or_create(&Settled { outcome: "committed" }).inc();
                self.checkpoint_step.set(whole(step.0));
            }
            Record::CheckpointAbandoned { .. } => {
                self.checkpoints.get_or_create(&Settled { outcome: "abandoned" }).inc();
            }
            Record::RunCreated { .. }
            | Record::FingerprintFixed { .. }
            | Record::ExchangeLost { .. }
            | Record::Resized { .. }
            | Record::RunFinished { .. }
            | Record::RunFailed { .. } => {}
        }
    }

    fn stepped(&self, metrics: &StepMetrics) {
        self.images.inc_by(metrics.images);
        self.loss.set(metrics.loss.into());
        self.gradient_norm.set(metrics.gradient_norm.into());
        self.learning_rate.set(metrics.learning_rate);
        self.step_seconds.observe(f64::from(metrics.step_ms) / 1e3);
        let phases = [
            ("load", metrics.load_ms),
            ("compute", metrics.compute_ms),
            ("reduce", metrics.reduce_ms),
            ("update", metrics.update_ms),
        ];
        for (phase, ms) in phases {
            self.phase_seconds.get_or_create(&Phase { phase }).observe(f64::from(ms) / 1e3);
        }
    }

    fn scored(&self, weights: &'static str, scores: &ExitScores) {
        for (exit, top1) in ExitScores::EXITS.into_iter().zip(scores.top1) {
            self.top1.get_or_create(&Scored { exit, weights }).set(top1);
        }
    }
}

/// How the workers are, asked at each scrape.
#[derive(Debug)]
struct Workers {
    liveness: watch::Receiver<v1::Liveness>,
    devices: Devices,
}

impl Collector for Workers {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let liveness = self.liveness.borrow().clone();
        let named: Vec<_> = liveness
            .workers
            .iter()
            .map(|worker| (OfWorker { worker: worker.name.clone() }, worker))
            .collect();
        let progress = |read: fn(&v1::Heartbeat) -> f64| {
            let of = move |(label, worker): &(OfWorker, &v1::WorkerLiveness)| {
                Some((label.clone(), read(worker.progress.as_ref()?)))
            };
            named.iter().filter_map(of).collect::<Vec<_>>()
        };
        let connected = named
            .iter()
            .map(|(label, worker)| (label.clone(), if worker.session { 1.0 } else { 0.0 }))
            .collect();
        gauges(&mut encoder, "worker_connected", "Whether its session is open", None, connected)?;
        let resident = progress(|beat| real(beat.resident_bytes));
        let help = "Resident memory of the worker's process";
        gauges(&mut encoder, "worker_resident", help, Some(Unit::Bytes), resident)?;
        let in_phase = progress(|beat| real(beat.in_phase_ms) / 1e3);
        let help = "For how long it has been doing what it does";
        gauges(&mut encoder, "worker_in_phase", help, Some(Unit::Seconds), in_phase)?;
        let held = self.devices.held(|devices| devices.clone());
        let devices: Vec<_> = liveness
            .workers
            .iter()
            .filter_map(|worker| Some((worker.name.clone(), held.get(&WorkerId(worker.worker))?)))
            .collect();
        if devices.is_empty() { Ok(()) } else { gpus(&mut encoder, &devices) }
    }
}

type Asked<'a> = (String, &'a DeviceHealth);

#[rustfmt::skip] // A line a metric.
fn gpus(encoder: &mut DescriptorEncoder<'_>, devices: &[Asked<'_>]) -> fmt::Result {
    let of = |read: fn(&DeviceHealth) -> Option<f64>| -> Vec<(OfWorker, f64)> {
        let read = |(worker, health): &Asked<'_>| Some((OfWorker { worker: worker.clone() }, read(health)?));
        devices.iter().filter_map(read).collect()
    };
    let by = |read: fn(&DeviceHealth) -> Vec<(String, f64)>| -> Vec<(OfWorkerBy, f64)> {
        let read = |(worker, health): &Asked<'_>| {
            let worker = worker.clone();
            read(health).into_iter().map(move |(reason, value)| (OfWorkerBy { worker: worker.clone(), reason }, value)).collect::<Vec<_>>()
        };
        devices.iter().flat_map(read).collect()
    };
    gauges(encoder, "gpu_utilization", "Share of the time in which the GPU computed", Some(Unit::Ratios), of(|gpu| Some(gpu.utilization)))?;
    gauges(encoder, "gpu_memory_used", "Memory of the GPU in use", Some(Unit::Bytes), of(|gpu| Some(real(gpu.memory_used_bytes))))?;
    gauges(encoder, "gpu_memory_total", "Memory of the GPU", Some(Unit::Bytes), of(|gpu| Some(real(gpu.memory_total_bytes))))?;
    gauges(encoder, "gpu_temperature", "Temperature of the GPU", Some(Unit::Celsius), of(|gpu| gpu.temperature_celsius.map(f64::from)))?;
    gauges(encoder, "gpu_power", "Power that the GPU draws", Some(Unit::Other("watts".to_owned())), of(|gpu| gpu.power_watts))?;
    gauges(encoder, "gpu_nvlinks_active", "NVLinks that are up", None, of(|gpu| Some(f64::from(gpu.nvlinks_active))))?;
    gauges(encoder, "gpu_throttled", "1 for each reason why the GPU is slower than it could be", None, by(|gpu| gpu.throttled_by.iter().map(|reason| (reason.clone(), 1.0)).collect()))?;
    counters(encoder, "gpu_nvlink_errors", "Errors of all NVLinks since the driver was loaded", of(|gpu| Some(real(gpu.nvlink_errors))))?;
    counters(encoder, "gpu_ecc_errors_corrected", "ECC errors that were corrected since the driver was loaded", of(|gpu| gpu.ecc_corrected.map(real)))?;
    counters(encoder, "gpu_ecc_errors_uncorrected", "ECC errors that could not be corrected since the driver was loaded", of(|gpu| gpu.ecc_uncorrected.map(real)))?;
    counters(encoder, "gpu_xid_errors", "Errors that the driver reported since the worker began, by their Xid", by(|gpu| gpu.xids.iter().map(|(xid, count)| (xid.to_string(), real(*count))).collect()))
}

fn gauges<S: EncodeLabelSet>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    unit: Option<Unit>,
    values: Vec<(S, f64)>,
) -> fmt::Result {
    let mut family = encoder.encode_descriptor(name, help, unit.as_ref(), MetricType::Gauge)?;
    values.into_iter().try_for_each(|(labels, value)| {
        ConstGauge::new(value).encode(family.encode_family(&labels)?)
    })
}

fn counters<S: EncodeLabelSet>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    values: Vec<(S, f64)>,
) -> fmt::Result {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    values.into_iter().try_for_each(|(labels, value)| {
        ConstCounter::new(value).encode(family.encode_family(&labels)?)
    })
}

/// Counts that are told as reals: exact up to 2⁵³.
#[expect(clippy::cast_precision_loss, reason = "a figure for people, exact up to 2^53")]
fn real(count: u64) -> f64 {
    count as f64
}

fn whole(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

fn version() -> String {
    env!("CARGO_PKG_VERSION").to_owned()
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use cluster::{Epoch, Evaluation, Generation, Member, Step};

    use super::*;

    fn metrics() -> (Metrics, watch::Sender<v1::Liveness>, Devices) {
        let (liveness, receiver) = watch::channel(v1::Liveness::default());
        let devices = Devices::default();
        (Metrics::new("toy", 100, receiver, devices.clone()), liveness, devices)
    }

    fn observe(metrics: &Metrics, at: u64, record: Record) {
        metrics.observe(&Entry { sequence: 1, at: Timestamp(at), record });
    }

    fn adopted(step: u64) -> Record {
        let figures =
            StepMetrics { loss: 2.5, images: 64, step_ms: 150.0, ..StepMetrics::default() };
        Record::StepAdopted {
            step: Step(step),
            generation: Generation(1),
            metrics: Some(figures),
            applied_at: None,
        }
    }

    fn lines<'a>(text: &'a str, name: &str) -> Vec<&'a str> {
        text.lines().filter(|line| line.starts_with(name)).collect()
    }

    #[test]
    fn the_log_adds_up() {
        let (metrics, ..) = metrics();
        let (name, address) = ("a".to_owned(), String::new());
        let member = Member { worker: WorkerId(1), name, address, block: 0..1 };
        let opened = Record::GenerationOpened {
            generation: Generation(1),
            members: vec![member],
            planned: false,
            reason: "a test".to_owned(),
        };
        observe(&metrics, 0, opened);
        observe(&metrics, 0, adopted(1));
        observe(&metrics, 1000, adopted(2));
        let lost =
            Record::WorkerLost { worker: WorkerId(1), name: "a".to_owned(), cause: String::new() };
        observe(&metrics, 2000, lost);
        observe(&metrics, 3500, adopted(3));
        let text = metrics.text();
        assert_eq!(lines(&text, "percheron_step "), ["percheron_step 3"]);
        assert_eq!(lines(&text, "percheron_images_total"), ["percheron_images_total 192"]);
        assert_eq!(lines(&text, "percheron_loss "), ["percheron_loss 2.5"]);
        let took = "percheron_recovery_duration_seconds_sum";
        assert_eq!(lines(&text, took), ["percheron_recovery_duration_seconds_sum 1.5"]);
        assert_eq!(
            lines(&text, "percheron_workers_lost_total"),
            ["percheron_workers_lost_total 1"]
        );
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn accuracy_is_told_by_exit() {
        let (metrics, ..) = metrics();
        let weights = ExitScores { top1: [0.25, 0.5, 0.5, 0.75], loss: 1.0 };
        let ema = ExitScores { top1: [0.125, 0.25, 0.25, 0.5], loss: 2.0 };
        let evaluation = Evaluation { step: Step(5), epoch: Epoch(1), samples: 8, weights, ema };
        observe(&metrics, 0, Record::Evaluated { generation: Generation(1), evaluation });
        let text = metrics.text();
        let merge = "percheron_top1_ratio{exit=\"merge\",weights=";
        let mut found = lines(&text, merge);
        found.sort_unstable();
        assert_eq!(found, [format!("{merge}\"current\"}} 0.75"), format!("{merge}\"ema\"}} 0.5")]);
    }

    #[test]
    fn gpus_are_told_while_their_workers_are_there() {
        let (metrics, liveness, devices) = metrics();
        assert!(!metrics.text().contains("gpu"));
        let worker = |worker| v1::WorkerLiveness {
            worker,
            name: format!("worker-{worker}"),
            session: true,
            progress: None,
        };
        liveness.send_replace(v1::Liveness { term: 1, workers: vec![worker(1), worker(2)] });
        let health = DeviceHealth {
            utilization: 0.5,
            memory_used_bytes: 1 << 30,
            throttled_by: vec!["thermal".to_owned()],
            xids: HashMap::from([(79, 1)]),
            ecc_uncorrected: None,
            ..DeviceHealth::default()
        };
        devices.said(WorkerId(2), health);
        let text = metrics.text();
        let of = "percheron_gpu_utilization_ratios{worker=\"worker-2\"} 0.5";
        assert_eq!(lines(&text, "percheron_gpu_utilization_ratios"), [of]);
        let xid = "percheron_gpu_xid_errors_total{worker=\"worker-2\",reason=\"79\"} 1";
        assert!(text.contains(xid), "{text}");
        assert!(text.contains("percheron_gpu_throttled{worker=\"worker-2\",reason=\"thermal\"} 1"));
        assert_eq!(lines(&text, "percheron_gpu_ecc_errors_uncorrected_total"), Vec::<&str>::new());
        devices.forget(WorkerId(2));
        assert!(!metrics.text().contains("gpu"));
    }
}
