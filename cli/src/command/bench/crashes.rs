//! `percheron bench crashes`: real processes are killed with SIGKILL while they commit checkpoints and append to
//! the event log, and what they leave is read.
//!
//! A process says what has taken effect: a record whose append has returned, a checkpoint whose commit has.
//! None of it may be missing afterwards, every checkpoint must be readable to the last byte, and the next
//! process must go on from there.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{BufRead as _, BufReader, Read as _},
    ops::Range,
    path::{Path, PathBuf},
    process::{Child, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use checkpoint::{
    Checkpoint, Layout, Manifest, Retention, Section, Store, committed_steps, prune, save_part,
};
use clap::Args;
use cluster::{Epoch, Generation, Record, RunId, Step, Term, Timestamp};
use coordinator::EventLog;
use tokio::runtime::Runtime;

use crate::print;

/// Processes that follow each other in one folder.
const LIVES: u64 = 4;
/// Steps between two checkpoints.
const EVERY: u64 = 10;
/// How often a process is looked at before it is killed wherever it is.
const LOOKS_MAX: u32 = 200;
const NO_CALL: &str = "no such call";
const STATE_BYTES: u64 = 300_000;
const PART_BYTES: u64 = 64 << 10;

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Processes to kill.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u64).range(1..))]
    count: u64,
    /// A folder for the logs, empty or not there yet.
    #[arg(long, value_name = "DIR")]
    folder: PathBuf,
    /// Where the checkpoints go, as s3://BUCKET/PREFIX [default: beside the logs].
    #[arg(long, value_name = "LOCATION")]
    store: Option<String>,
    /// Print one object.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Life {
    log: PathBuf,
    store: String,
}

/// What a process said had taken effect: the newest of each.
#[derive(Debug, Default, Clone, Copy)]
struct Effective {
    record: u64,
    checkpoint: Option<u64>,
}

/// What all the crashes came to.
#[derive(Debug, Default)]
struct Toll {
    crashes: u64,
    records: u64,
    checkpoints: u64,
    /// How many of the killed were in which system calls.
    calls: BTreeMap<String, u64>,
}

// ---- The process that is killed ---------------------------------------------------------------

/// Lives until it is killed.
pub(crate) fn live(life: &Life) -> Result<()> {
    let mut log = EventLog::open(&life.log)?;
    let runtime = Runtime::new().context("cannot start the runtime")?;
    let store = Store::create(&life.store)?;
    let mut step = runtime.block_on(committed_steps(&store))?.first().map_or(0, |step| step.0);
    loop {
        step += EVERY;
        let next = log.last() + 1;
        log.append(Timestamp(next), &[record_of(next), record_of(next + 1)])?;
        print::out(&format!("record {}", next + 1));
        runtime.block_on(keep(&store, Step(step)))?;
        print::out(&format!("checkpoint {step}"));
        runtime.block_on(forget(&store))?;
    }
}

/// What entry `sequence` of the log says.
fn record_of(sequence: u64) -> Record {
    Record::CheckpointCommitted { step: Step(sequence) }
}

/// The state after `step`.
fn state_of(step: Step) -> Vec<u8> {
    (0..STATE_BYTES).map(|at| ((at ^ step.0) % 251) as u8).collect()
}

fn in_memory(range: &Range<u64>) -> Range<usize> {
    let index = |at: u64| usize::try_from(at).expect("the state is in memory");
    index(range.start)..index(range.end)
}

async fn keep(store: &Store, step: Step) -> Result<()> {
    let section = Section { name: "state".to_owned(), bytes: STATE_BYTES };
    let layout = Layout::new(vec![section], PART_BYTES)?;
    let state = Bytes::from(state_of(step));
    let mut parts = Vec::new();
    for part in 0..layout.parts() {
        let bytes = state.slice(in_memory(&layout.part_range(part)));
        parts.push(save_part(store, &layout, step, part, bytes).await?);
    }
    let manifest = Manifest {
        run: RunId::try_from("crashes".to_owned())?,
        step,
        epoch: Epoch(0),
        term: Term(1),
        generation: Generation(1),
        sections: layout.sections().to_vec(),
        part_bytes: PART_BYTES,
        parts,
        state_sha256: None,
        recipe: String::new(),
        fingerprint: BTreeMap::new(),
        software: "percheron bench".to_owned(),
        created: Timestamp(step.0),
        nonce: std::process::id().to_string(),
    };
    checkpoint::commit(store, &manifest).await?;
    Ok(())
}

async fn forget(store: &Store) -> Result<()> {
    let retention = Retention { newest: 2, every_steps: 0, best: false };
    for old in retention.prunable(&committed_steps(store).await?, &[]) {
        prune(store, old).await?;
    }
    Ok(())
}

// ---- The process that kills and looks ---------------------------------------------------------

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let folder = &arguments.folder;
    fs::create_dir_all(folder).with_context(|| format!("--folder {}", folder.display()))?;
    let is_empty = fs::read_dir(folder).context("--folder")?.next().is_none();
    ensure!(is_empty, "--folder {} is not empty: choose another", folder.display());
    let runtime = Runtime::new().context("cannot start the runtime")?;
    let mut toll = Toll::default();
    while toll.crashes < arguments.count {
        let place = folder.join(toll.crashes.to_string());
        fs::create_dir(&place).with_context(|| format!("{} cannot be made", place.display()))?;
        let own = place.to_str().context("--folder: the path is not UTF-8")?;
        let store = match &arguments.store {
            Some(location) => format!("{}/{}", location.trim_end_matches('/'), toll.crashes),
            None => own.to_owned(),
        };
        let life = Life { log: place.join("log"), store };
        let mut effective = Effective::default();
        for _ in 0..LIVES.min(arguments.count - toll.crashes) {
            let call = crash(&life, &mut effective)?;
            toll.crashes += 1;
            *toll.calls.entry(call).or_default() += 1;
            let number = toll.crashes;
            let seen = look(&runtime, &life, effective);
            effective = seen.with_context(|| format!("crash {number}, {}", place.display()))?;
        }
        toll.records += effective.record;
        toll.checkpoints += effective.checkpoint.unwrap_or(0) / EVERY;
        fs::remove_dir_all(&place).with_context(|| format!("{} stays", place.display()))?;
    }
    report(arguments, &toll);
    Ok(())
}

/// What was survived: the first loss would have ended the command with an error, so there is none to count.
fn report(arguments: &Arguments, toll: &Toll) {
    let Toll { crashes, records, checkpoints, calls } = toll;
    if arguments.json {
        let figures = serde_json::json!({
            "crashes": crashes, "records": records, "checkpoints": checkpoints, "killed_in": calls,
        });
        return print::out(&figures.to_string());
    }
    print::out(&format!(
        "{crashes} processes killed, {records} records and {checkpoints} checkpoints written: no record \
         that had taken effect is lost, and the newest checkpoint was whole each time"
    ));
    for (call, count) in calls {
        print::out(&format!("  {count:>4} killed in {call}"));
    }
}

/// Starts a process and kills it at a moment of chance; returns what it was doing.
fn crash(life: &Life, effective: &mut Effective) -> Result<String> {
    let program = std::env::current_exe().context("cannot find this program")?;
    let mut command = std::process::Command::new(program);
    command.args(["bench", "crashing-life"]).arg(&life.log).arg(&life.store);
    let mut child = command.stdout(Stdio::piped()).spawn().context("cannot start a process")?;
    let mut lines = BufReader::new(child.stdout.take().expect("it is piped")).lines();
    // Every third is killed early, while it makes or opens its log; the others in the middle of their work.
    let [early, many, delay] = draw()?;
    let delay = u64::from(delay);
    let mut call = None;
    if early < 85 {
        thread::sleep(Duration::from_micros(delay * 100));
        call = Some(kill(&mut child)?);
    }
    let mut heard = 0;
    for line in lines.by_ref() {
        effective.hear(&line.context("the process cannot be heard")?)?;
        heard += 1;
        if heard > many % 16 && call.is_none() {
            thread::sleep(Duration::from_micros(delay * 40));
            call = Some(kill(&mut child)?);
        }
    }
    let status = child.wait().context("the process cannot be waited for")?;
    // A life has no end: what ended by itself has failed.
    call.with_context(|| format!("a process has ended by itself: {status}"))
}

impl Effective {
    fn hear(&mut self, line: &str) -> Result<()> {
        match line.split_once(' ').map(|(what, number)| (what, number.parse())) {
            Some(("record", Ok(sequence))) => self.record = sequence,
            Some(("checkpoint", Ok(step))) => self.checkpoint = Some(step),
            _ => bail!("a process said {line:?}"),
        }
        Ok(())
    }
}

/// Bytes of the system's chance.
fn draw<const COUNT: usize>() -> Result<[u8; COUNT]> {
    let mut bytes = [0; COUNT];
    let mut chance = File::open("/dev/urandom").context("/dev/urandom cannot be opened")?;
    chance.read_exact(&mut bytes).context("/dev/urandom cannot be read")?;
    Ok(bytes)
}

/// Kills a process with SIGKILL as soon as it is seen in a call that changes files; returns which it was.
fn kill(child: &mut Child) -> Result<String> {
    let mut calls = NO_CALL.to_owned();
    for _ in 0..LOOKS_MAX {
        calls = calls_of(child.id());
        if calls != NO_CALL {
            break;
        }
    }
    child.kill().context("the process cannot be killed")?;
    Ok(calls)
}

/// The system calls of its threads that change files, by their numbers on x86-64.
fn calls_of(process: u32) -> String {
    let threads = fs::read_dir(format!("/proc/{process}/task"));
    let mut names = BTreeSet::new();
    for thread in threads.into_iter().flatten().flatten() {
        let call = fs::read_to_string(thread.path().join("syscall")).unwrap_or_default();
        names.insert(match call.split(' ').next() {
            Some("1" | "18" | "20" | "44" | "46") => "write",
            Some("74" | "75" | "277") => "fsync",
            Some("82" | "86" | "87" | "263" | "264" | "265") => "rename, link or unlink",
            Some("77" | "285") => "set length",
            Some("2" | "257") => "open",
            _ => continue, // It computes, or waits for another thread.
        });
    }
    let names: Vec<_> = names.into_iter().collect();
    if names.is_empty() { NO_CALL.to_owned() } else { names.join(" and ") }
}

/// Reads what is left; returns what the next process has to begin with.
fn look(runtime: &Runtime, life: &Life, said: Effective) -> Result<Effective> {
    let record = if life.log.exists() { look_at_log(&life.log)? } else { 0 };
    ensure!(record >= said.record, "the log has {record} records of {}", said.record);
    let is_there = life.store.contains("://") || Path::new(&life.store).exists();
    let looking = look_at_checkpoints(&life.store, said.checkpoint);
    let checkpoint = if is_there { runtime.block_on(looking)? } else { None };
    ensure!(checkpoint >= said.checkpoint, "{checkpoint:?} is the newest, not {said:?}");
    Ok(Effective { record, checkpoint })
}

/// How many records there are; each must be the one that was written.
fn look_at_log(path: &Path) -> Result<u64> {
    let log = EventLog::open(path)?;
    for (entry, sequence) in log.read_from(1)?.iter().zip(1..) {
        let is_right = entry.sequence == sequence && entry.record == record_of(sequence);
        ensure!(is_right, "entry {sequence} is {entry:?}");
    }
    Ok(log.last())
}

/// The newest step; every byte of all must be the one that was written.
async fn look_at_checkpoints(location: &str, said: Option<u64>) -> Result<Option<u64>> {
    let store = Store::open(location)?;
    let kept = committed_steps(&store).await?;
    for &step in &kept {
        let (state, mut is_right) = (state_of(step), true);
        let mut sink = |range: Range<u64>, bytes: &[u8]| {
            is_right &= state[in_memory(&range)] == *bytes;
        };
        Checkpoint::open(&store, step).await?.read(&mut sink).await?;
        ensure!(is_right, "the checkpoint of step {step} holds another state");
    }
    let least = said.map_or(0, |step| (step / EVERY).min(2));
    ensure!(kept.len() as u64 >= least, "only {kept:?} are kept, and {said:?} was the newest");
    Ok(kept.first().map(|step| step.0))
}
