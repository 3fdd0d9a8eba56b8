//! `cargo xtask chaos`: breaks a run of real processes again and again, and wants the undisturbed run's bits.
//!
//! Nobody supervises the workers: that one has died is found by its peers and the coordinator alone. With
//! root and network namespaces each worker has a host of its own, whose network is broken as well.

pub(crate) mod crew;
mod lab;
mod tale;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use serde_json::json;

use self::crew::{Crew, Signal};
use self::lab::Lab;
use self::tale::{Fault, Line, Tale, percentile};
use crate::workspace::Workspace;
use crate::{process, setup, test};

/// How often the run is looked at.
const LOOK: Duration = Duration::from_millis(20);
/// Steps of the short run that tells how fast this machine is.
const TRIAL_STEPS: u64 = 60;
/// No fault before the run has got going, nor close to its end.
const FIRST_FAULT: Duration = Duration::from_secs(20);
/// How long a worker hangs, or is cut off.
const HANG: Duration = Duration::from_secs(7);
/// Shorter than any wait after which a worker is lost.
const FREEZE: Duration = Duration::from_millis(800);
/// How long traffic is slow or lossy, or a run has fewer workers.
const WHILE: Duration = Duration::from_secs(8);
/// From the death of a worker to the start of the next.
const REPLACE_AFTER: Duration = Duration::from_secs(6);
/// A run that is slower than expected by this factor has failed.
const PATIENCE: f64 = 4.0;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// How long the run is to last, about: its steps are counted from a short run before it.
    #[arg(long, value_name = "M", default_value_t = 5.0)]
    minutes: f64,
    /// Seconds from one fault to the next.
    #[arg(long, value_name = "S", default_value_t = 29.0)]
    every: f64,
    /// Workers that train.
    #[arg(long, value_name = "W", default_value_t = 8, value_parser = clap::value_parser!(u32).range(2..=8))]
    workers: u32,
    /// What is done, one after the other and again from the start [default: all that can be].
    #[arg(long, value_enum, value_delimiter = ',', value_name = "KIND,...")]
    faults: Vec<Kind>,
    /// Programs beside the run that use a processor each, to see who is evicted for being slow.
    #[arg(long, value_name = "N", default_value_t = 0)]
    burners: u32,
    /// Which workers are hurt follows from this number.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The last line of the output is one JSON object.
    #[arg(long)]
    json: bool,
}

/// What can be done to a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
enum Kind {
    /// A worker is killed; another starts in its place.
    Kill,
    /// A worker is stopped for longer than the others wait for it.
    Stop,
    /// A worker is stopped for a moment: nobody may be lost.
    Freeze,
    /// The coordinator is killed, and started again.
    Coordinator,
    /// One more worker joins; it is killed later.
    Join,
    /// The run gets two workers fewer, then as many as before.
    Resize,
    /// A worker and all others lose sight of each other.
    Partition,
    /// What a worker sends is lost, what it is sent is not.
    Oneway,
    /// A worker's traffic is 20 ms late, each way.
    Delay,
    /// Two of a hundred packets of a worker are lost.
    Loss,
}

impl Kind {
    const ALL: [Self; 10] = [
        Self::Kill,
        Self::Stop,
        Self::Partition,
        Self::Coordinator,
        Self::Join,
        Self::Oneway,
        Self::Freeze,
        Self::Resize,
        Self::Delay,
        Self::Loss,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Stop => "stop",
            Self::Freeze => "freeze",
            Self::Coordinator => "coordinator",
            Self::Join => "join",
            Self::Resize => "resize",
            Self::Partition => "partition",
            Self::Oneway => "oneway",
            Self::Delay => "delay",
            Self::Loss => "loss",
        }
    }

    fn needs_lab(self) -> bool {
        matches!(self, Self::Partition | Self::Oneway | Self::Delay | Self::Loss)
    }

    /// Whether the run must go on without the victim.
    fn takes_victim(self) -> bool {
        matches!(self, Self::Kill | Self::Stop | Self::Partition | Self::Oneway)
    }
}

/// What is still to be done about a fault.
#[derive(Debug)]
enum Later {
    Continue(usize),
    Heal,
    /// It has been cut off or asleep for so long that the run went on without it.
    Kill(usize),
    FillUp,
    Resize,
}

pub(crate) fn run(workspace: &Workspace, options: &Options) -> Result<()> {
    ensure!(options.minutes > 0.0 && options.every >= 1.0, "--minutes and --every are too small");
    setup::run(workspace)?;
    test::build(workspace)?;
    let without_lab = Lab::impossible();
    let mut kinds =
        if options.faults.is_empty() { Kind::ALL.to_vec() } else { options.faults.clone() };
    if let Some(why) = &without_lab {
        println!("no hosts, so no faults of the network: {why}");
        kinds.retain(|kind| !kind.needs_lab());
    }
    let folder = tempfile::tempdir().context("cannot make a folder for the runs")?;
    let hosts = without_lab.is_none() && kinds.iter().any(|kind| kind.needs_lab());
    let steps = steps_for(workspace, options, folder.path())?;
    println!("{steps} steps of {} workers; faults: {}", options.workers, names(&kinds));
    let mut oracle = start_oracle(workspace, steps, folder.path())?;
    let dir = folder.path().join("chaos");
    let done = Chaos::start(workspace, options, &kinds, steps, &dir, hosts)?.run(options)?;
    let undisturbed = finish_oracle(&mut oracle, folder.path())?;
    let tale = read(workspace, &dir)?;
    report(options, &done, &tale, &undisturbed)
}

fn names(kinds: &[Kind]) -> String {
    if kinds.is_empty() {
        return "none".to_owned();
    }
    kinds.iter().map(|kind| kind.name()).collect::<Vec<_>>().join(", ")
}

/// Digits, with a batch so small that a step is short.
fn sets(steps: u64) -> Vec<String> {
    vec![
        format!("max_steps={steps}"),
        format!("epochs={steps}"),
        "batch_size=2".to_owned(),
        "evaluate_every_epochs=0".to_owned(),
        "checkpoint.every_epochs=0".to_owned(),
        format!("checkpoint.every_steps={}", (steps / 8).max(100)),
    ]
}

fn recipe(workspace: &Workspace, steps: u64) -> Result<String> {
    let mut show = workspace.binary("percheron");
    show.args(["recipe", "show", "digits"]);
    for set in sets(steps) {
        show.args(["--set", &set]);
    }
    process::output(&mut show)
}

/// How many steps last about as long as asked for.
fn steps_for(workspace: &Workspace, options: &Options, folder: &Path) -> Result<u64> {
    let dir = folder.join("trial");
    let recipe = recipe(workspace, TRIAL_STEPS)?;
    let places = (options.workers, options.workers as usize);
    let mut crew = Crew::start(workspace, &dir, &recipe, places, None, 1)?;
    wait_for_the_end(&mut crew, Duration::from_secs(300), |_| Ok(()))?;
    let step = read(workspace, &dir)?.step_ms().context("the trial made no step")?.max(1);
    println!("a step takes {step} ms");
    let asked = Duration::from_secs_f64(options.minutes * 60.0).as_millis();
    Ok(u64::try_from(asked).context("--minutes is too long")? / step + TRIAL_STEPS)
}

/// The same steps in one worker that nobody disturbs, at the lowest priority.
fn start_oracle(workspace: &Workspace, steps: u64, folder: &Path) -> Result<Child> {
    let mut up = workspace.command("nice");
    up.args(["-n", "19"]).arg(workspace.binary("percheron").get_program());
    up.args(["up", "--recipe", "digits", "--json", "--workers", "1"]);
    for set in sets(steps) {
        up.args(["--set", &set]);
    }
    up.arg("--run-dir").arg(folder.join("oracle")).stdin(Stdio::null()).stderr(Stdio::null());
    up.stdout(Stdio::piped()).spawn().context("cannot start the undisturbed run")
}

fn finish_oracle(oracle: &mut Child, folder: &Path) -> Result<String> {
    let mut stdout = oracle.stdout.take().context("the undisturbed run has no output")?;
    let mut said = String::new();
    std::io::Read::read_to_string(&mut stdout, &mut said).context("the undisturbed run")?;
    let status = oracle.wait().context("the undisturbed run")?;
    let dir = folder.join("oracle");
    ensure!(status.success(), "the undisturbed run in {} failed ({status})", dir.display());
    let last = said.lines().last().context("the undisturbed run said nothing")?;
    let summary: serde_json::Value = serde_json::from_str(last).context("the undisturbed run")?;
    let state = summary["state_sha256"].as_str();
    Ok(state.context("the undisturbed run has no state_sha256")?.to_owned())
}

fn read(workspace: &Workspace, dir: &Path) -> Result<Tale> {
    let mut log = workspace.binary("percheron");
    let text = process::output(log.arg("log").arg(dir).arg("--json"))?;
    let lines = text.lines().map(|line| serde_json::from_str::<Line>(line).context("the log"));
    Ok(Tale::of(&lines.collect::<Result<Vec<_>>>()?))
}

fn wait_for_the_end(
    crew: &mut Crew<'_>,
    patience: Duration,
    mut look: impl FnMut(&mut Crew<'_>) -> Result<()>,
) -> Result<()> {
    let started = Instant::now();
    while !crew.has_ended()? {
        ensure!(started.elapsed() < patience, "the run has not ended within {patience:?}");
        look(crew)?;
        std::thread::sleep(LOOK);
    }
    Ok(())
}

fn unix_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

/// A run, and what is being done to it.
struct Chaos<'a> {
    crew: Crew<'a>,
    plan: Plan,
    burners: Vec<Child>,
}

/// What was done and what is to be done.
struct Plan {
    kinds: Vec<Kind>,
    workers: u32,
    seed: u64,
    done: Done,
    later: Vec<(Instant, Later)>,
}

/// What was done.
#[derive(Debug, Default)]
struct Done {
    faults: Vec<Fault>,
    /// When each worker that is not of the beginning was started.
    starts: BTreeMap<String, u64>,
    /// Workers that were told to leave, or killed after they had been given up.
    let_go: BTreeSet<String>,
}

impl<'a> Chaos<'a> {
    fn start(
        workspace: &'a Workspace,
        options: &Options,
        kinds: &[Kind],
        steps: u64,
        dir: &Path,
        hosts: bool,
    ) -> Result<Self> {
        let places = options.workers as usize + 1; // One for who joins.
        let shim = dir.with_extension("delay.py");
        let lab = hosts.then(|| Lab::up(places + 1, shim)).transpose()?;
        let recipe = recipe(workspace, steps)?;
        let crew = Crew::start(workspace, dir, &recipe, (options.workers, places), lab, 1)?;
        let burn = |_| {
            let mut burner = workspace.command("sh");
            burner.args(["-c", "while :; do :; done"]).spawn().context("cannot start a burner")
        };
        let burners = (0..options.burners).map(burn).collect::<Result<_>>()?;
        let plan = Plan {
            kinds: kinds.to_vec(),
            workers: options.workers,
            seed: options.seed,
            done: Done::default(),
            later: Vec::new(),
        };
        Ok(Self { crew, plan, burners })
    }

    fn run(mut self, options: &Options) -> Result<Done> {
        let lasts = options.minutes * 60.0;
        let mut next = Instant::now() + FIRST_FAULT;
        let mut last_seen = Instant::now();
        let plan = &mut self.plan;
        wait_for_the_end(
            &mut self.crew,
            Duration::from_secs_f64(lasts * PATIENCE + 300.0),
            |crew| {
                plan.carry_on(crew)?;
                if next <= Instant::now() && !plan.kinds.is_empty() {
                    next += Duration::from_secs_f64(options.every);
                    plan.next_fault(crew)?;
                }
                if last_seen.elapsed() > Duration::from_secs(60) {
                    last_seen = Instant::now();
                    println!("{} faults so far", plan.done.faults.len());
                }
                Ok(())
            },
        )?;
        Ok(std::mem::take(&mut self.plan.done))
    }
}

impl Drop for Chaos<'_> {
    fn drop(&mut self) {
        for burner in &mut self.burners {
            burner.kill().and_then(|()| burner.wait().map(drop)).ok(); // It may have ended.
        }
    }
}

impl Plan {
    fn next_fault(&mut self, crew: &mut Crew<'_>) -> Result<()> {
        let (busy, free) = crew.look_around()?;
        let number = self.done.faults.len();
        let kind = self.kinds[number % self.kinds.len()];
        ensure!(!busy.is_empty(), "no worker is left");
        let choices = u64::try_from(busy.len()).expect("workers are few");
        let place = busy[usize::try_from(self.draw() % choices).expect("it is below their number")];
        let has_victim = !matches!(kind, Kind::Coordinator | Kind::Join | Kind::Resize);
        let victim = crew.name(place).filter(|_| has_victim).map(str::to_owned);
        let at_ms = unix_ms();
        println!("fault {}: {} {}", number + 1, kind.name(), victim.as_deref().unwrap_or_default());
        match kind {
            Kind::Kill => {
                crew.kill(place)?;
                self.after(REPLACE_AFTER, Later::FillUp);
            }
            Kind::Stop => {
                crew.signal(place, Signal::Stop)?;
                self.after(HANG, Later::Continue(place));
                self.after(HANG + FREEZE, Later::Kill(place));
            }
            Kind::Freeze => {
                crew.signal(place, Signal::Stop)?;
                self.after(FREEZE, Later::Continue(place));
            }
            Kind::Coordinator => {
                crew.kill_coordinator(0)?;
                crew.start_coordinator(0)?;
            }
            Kind::Join => {
                if let Some(&place) = free.first() {
                    self.start(crew, place)?;
                    self.after(WHILE, Later::Kill(place));
                }
            }
            Kind::Resize => {
                crew.resize(self.workers.saturating_sub(2).max(1))?;
                let names = busy.iter().filter_map(|&place| crew.name(place));
                self.done.let_go.extend(names.map(str::to_owned));
                self.after(WHILE, Later::Resize);
            }
            Kind::Partition | Kind::Oneway | Kind::Delay | Kind::Loss => {
                self.break_network(crew, kind, place)?;
            }
        }
        self.done.faults.push(Fault { kind: kind.name(), at_ms, victim });
        Ok(())
    }

    fn break_network(&mut self, crew: &mut Crew<'_>, kind: Kind, place: usize) -> Result<()> {
        let lab = crew.lab.as_mut().context("there are no hosts")?;
        match kind {
            Kind::Partition => lab.cut_from(place).and_then(|()| lab.cut_to(place))?,
            Kind::Oneway => lab.cut_from(place)?,
            Kind::Delay => lab.delay(place, 20)?,
            Kind::Loss => lab.lose(place, 2)?,
            Kind::Kill
            | Kind::Stop
            | Kind::Freeze
            | Kind::Coordinator
            | Kind::Join
            | Kind::Resize => {
                bail!("{} is no fault of the network", kind.name())
            }
        }
        self.after(HANG, Later::Heal);
        if kind.takes_victim() {
            self.after(HANG + FREEZE, Later::Kill(place));
        }
        Ok(())
    }

    fn after(&mut self, wait: Duration, later: Later) {
        self.later.push((Instant::now() + wait, later));
    }

    /// Does what is due.
    fn carry_on(&mut self, crew: &mut Crew<'_>) -> Result<()> {
        while let Some(at) = self.later.iter().position(|(due, _)| *due <= Instant::now()) {
            match self.later.remove(at).1 {
                Later::Continue(place) => crew.signal(place, Signal::Continue)?,
                Later::Heal => crew.lab.as_mut().context("there are no hosts")?.heal()?,
                Later::Kill(place) => {
                    self.done.let_go.extend(crew.name(place).map(str::to_owned));
                    crew.kill(place)?;
                    self.fill_up(crew)?;
                }
                Later::FillUp => self.fill_up(crew)?,
                Later::Resize => {
                    crew.resize(self.workers)?;
                    self.fill_up(crew)?;
                }
            }
        }
        Ok(())
    }

    fn fill_up(&mut self, crew: &mut Crew<'_>) -> Result<()> {
        let (busy, free) = crew.look_around()?;
        for place in free.into_iter().take((self.workers as usize).saturating_sub(busy.len())) {
            self.start(crew, place)?;
        }
        Ok(())
    }

    fn start(&mut self, crew: &mut Crew<'_>, place: usize) -> Result<()> {
        let at = unix_ms();
        let name = crew.start_worker(place)?;
        self.done.starts.insert(name, at);
        Ok(())
    }

    /// SplitMix64 (Steele and others, 2014).
    fn draw(&mut self) -> u64 {
        self.seed = self.seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.seed ^ (self.seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

/// Prints what came out, and fails if the bits are others or somebody was evicted wrongly.
fn report(options: &Options, done: &Done, tale: &Tale, undisturbed: &str) -> Result<()> {
    let Done { faults, starts, let_go } = done;
    let costs_of = |kind: Kind| faults.iter().filter(move |f| f.kind == kind.name());
    let mut by_kind = serde_json::Map::new();
    println!("\nkind         faults  abort p50, p99, most     next step p50, p99, most (ms)");
    for kind in Kind::ALL {
        let costs: Vec<_> = costs_of(kind).map(|fault| tale.cost(fault)).collect();
        if costs.is_empty() {
            continue;
        }
        let costs = if kind.takes_victim() { costs.as_slice() } else { &[] };
        let aborts: Vec<_> = costs.iter().filter_map(|cost| cost.abort_ms).collect();
        let nexts: Vec<_> = costs.iter().filter_map(|cost| cost.next_step_ms).collect();
        let three = |of: &[u64]| [50, 99, 100].map(|part| percentile(of.to_vec(), part));
        let count = costs_of(kind).count();
        println!("{:<12} {count:>6}  {:?}  {:?}", kind.name(), three(&aborts), three(&nexts));
        let figures = json!({
            "faults": count, "measured": nexts.len(),
            "abort_ms": three(&aborts), "next_step_ms": three(&nexts),
        });
        by_kind.insert(kind.name().to_owned(), figures);
    }
    let killed: Vec<_> = costs_of(Kind::Kill).map(|fault| tale.cost(fault)).collect();
    let abort_p99 = percentile(killed.iter().filter_map(|cost| cost.abort_ms).collect(), 99);
    let next_p99 = percentile(killed.iter().filter_map(|cost| cost.next_step_ms).collect(), 99);
    let stopped: Vec<_> = costs_of(Kind::Stop).filter_map(|f| f.victim.as_deref()).collect();
    let named = stopped.iter().filter(|name| tale.cause(name).is_some()).count();
    let wrong = tale.evicted_wrongly(faults, let_go);
    let same_hash = tale.state_sha256.as_deref() == Some(undisturbed);
    let ratio = tale.throughput(faults, starts);
    println!(
        "throughput {ratio:.4} of the usual pace; {} steps, {} repeated",
        tale.steps(),
        tale.repeated
    );
    println!("of {} stopped workers {named} were named; evicted wrongly: {wrong:?}", stopped.len());
    println!("state {}: {}", undisturbed, if same_hash { "the same" } else { "ANOTHER" });
    if options.json {
        let figures = json!({
            "faults": faults.len(), "throughput_ratio": ratio, "same_hash": same_hash,
            "abort_p99_ms": abort_p99, "next_step_p99_ms": next_p99, "by_kind": by_kind,
            "stopped": stopped.len(), "stopped_named": named, "false_evictions": wrong.len(),
            "steps": tale.steps(), "repeated_steps": tale.repeated, "workers": options.workers,
            "step_ms_p50": tale.step_ms(), "step_ms_p99": tale.step_ms_p99(),
            "state_sha256": tale.state_sha256,
        });
        println!("{figures}");
    }
    ensure!(
        same_hash,
        "the disturbed run ended in {:?} and not in {undisturbed}",
        tale.state_sha256
    );
    Ok(())
}
