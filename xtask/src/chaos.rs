//! `cargo xtask chaos`: breaks a run of real processes again and again, and wants the undisturbed run's bits.
//!
//! Nobody supervises the workers: that one has died is found by its peers and the coordinator alone. With
//! root and network namespaces each worker has a host of its own, whose network is broken as well.

pub(crate) mod crew;
mod lab;
mod report;
mod tale;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;

use self::crew::{Crew, Signal};
use self::lab::Lab;
use self::report::Oracle;
use self::tale::{Fault, Line, Tale};
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
    /// Where the runs lie; nothing may be there [default: a folder that is removed at the end].
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
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
    let passing = tempfile::tempdir().context("cannot make a folder for the runs")?;
    let folder = options.run_dir.as_deref().unwrap_or(passing.path());
    ensure!(!folder.join("chaos").exists(), "--run-dir {}: has runs already", folder.display());
    fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    let workspace = &with_own_programs(workspace, folder)?;
    let hosts = without_lab.is_none() && kinds.iter().any(|kind| kind.needs_lab());
    let steps = steps_for(workspace, options, folder)?;
    println!("{steps} steps of {} workers; faults: {}", options.workers, names(&kinds));
    let mut oracle = start_oracle(workspace, steps, folder)?;
    let dir = folder.join("chaos");
    let done = Chaos::start(workspace, options, &kinds, steps, &dir, hosts)?.run(options)?;
    let undisturbed = finish_oracle(&mut oracle, folder)?;
    let tale = read(workspace, &dir)?;
    let oracle = Oracle { state_sha256: undisturbed, audit: audit(workspace, &dir)? };
    report::print(options, &done, &tale, &oracle)
}

/// With copies of the programs, so that a build beside a long run changes nothing about it.
fn with_own_programs(workspace: &Workspace, folder: &Path) -> Result<Workspace> {
    let own = Workspace { target: folder.join("programs"), ..workspace.clone() };
    let (from, to) = (workspace.target.join("release"), own.target.join("release"));
    fs::create_dir_all(&to).with_context(|| to.display().to_string())?;
    for program in ["percheron", "percheron-worker"] {
        fs::copy(from.join(program), to.join(program))
            .with_context(|| format!("cannot copy {program} to {}", to.display()))?;
    }
    Ok(own)
}

fn names(kinds: &[Kind]) -> String {
    if kinds.is_empty() {
        return "none".to_owned();
    }
    kinds.iter().map(|kind| kind.name()).collect::<Vec<_>>().join(", ")
}

/// Digits, with a model and a batch so small that a step is short.
fn sets(steps: u64, keeps: bool) -> Vec<String> {
    vec![
        "model.name=mobilenetV3_0x5_perceiver_t128".to_owned(),
        format!("max_steps={steps}"),
        format!("epochs={steps}"),
        "batch_size=2".to_owned(),
        "evaluate_every_epochs=0".to_owned(),
        "checkpoint.every_epochs=0".to_owned(),
        format!("checkpoint.every_steps={}", if keeps { (steps / 8).max(100) } else { 0 }),
    ]
}

pub(crate) fn recipe(workspace: &Workspace, steps: u64, keeps: bool) -> Result<String> {
    let mut show = workspace.binary("percheron");
    show.args(["recipe", "show", "digits"]);
    for set in sets(steps, keeps) {
        show.args(["--set", &set]);
    }
    process::output(&mut show)
}

/// How many steps last about as long as asked for.
fn steps_for(workspace: &Workspace, options: &Options, folder: &Path) -> Result<u64> {
    let dir = folder.join("trial");
    let recipe = recipe(workspace, TRIAL_STEPS, true)?;
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
    for set in sets(steps, true) {
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

pub(crate) fn read(workspace: &Workspace, dir: &Path) -> Result<Tale> {
    let mut log = workspace.binary("percheron");
    let text = process::output(log.arg("log").arg(dir).arg("--json"))?;
    let lines = text.lines().map(|line| serde_json::from_str::<Line>(line).context("the log"));
    Ok(Tale::of(&lines.collect::<Result<Vec<_>>>()?))
}

/// What `percheron audit` finds; fails if it finds something wrong.
fn audit(workspace: &Workspace, dir: &Path) -> Result<String> {
    let said = process::output(workspace.binary("percheron").arg("audit").arg(dir))?;
    Ok(said.lines().last().unwrap_or_default().to_owned())
}

pub(crate) fn wait_for_the_end(
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

pub(crate) fn unix_ms() -> u64 {
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
    /// Workers that were killed after they had joined for a while, or been given up.
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
        let recipe = recipe(workspace, steps, true)?;
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
        let settled = busy.iter().copied().filter(|&place| crew.is_settled(place));
        let settled: Vec<_> = settled.collect();
        let busy = if settled.is_empty() { busy } else { settled };
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
                self.after(WHILE, Later::Resize);
            }
            Kind::Partition | Kind::Oneway | Kind::Delay | Kind::Loss => {
                self.break_network(crew, kind, place)?;
            }
        }
        let is_fatal = kind.takes_victim();
        self.done.faults.push(Fault { kind: kind.name(), at_ms, victim, is_fatal });
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
