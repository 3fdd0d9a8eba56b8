//! Everything that can be wrong with a run before it starts. All is checked before anything is written.

use std::{collections::BTreeMap, path::PathBuf};

use anyhow::{Context as _, Result, bail};
use checkpoint::{Checkpoint, LoadError, Store, committed_steps, quarantine};
use cluster::{Ledger, Outcome, Record, RunConfig, RunId, Step};
use recipe::Recipe;
use shards::{Dataset, RandAugment};

use crate::{
    history::{self, OpenLog},
    print,
    run_dir::{Contents, Lock, RunDir, free_run_dir},
    shared::SharedRun,
    up::{
        chaos::Chaos,
        means::Means,
        report::{Report, Summary},
        worker_program,
    },
};

/// What a person asked for.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) recipe: Option<String>,
    /// A recipe that is complete, instead of a name and `sets`.
    pub(crate) ready: Option<Recipe>,
    pub(crate) workers: u32,
    pub(crate) run_dir: Option<PathBuf>,
    /// Where a new run keeps its checkpoints, if not in its folder.
    pub(crate) checkpoints: Option<String>,
    /// Where a new run keeps its event log, if not in its folder.
    pub(crate) log: Option<String>,
    /// Coordinators that stand by.
    pub(crate) standbys: u32,
    pub(crate) sets: Vec<String>,
    pub(crate) chaos: Option<String>,
    pub(crate) json: bool,
    /// Damaged checkpoints are set aside, and the newest intact one is taken.
    pub(crate) quarantine: bool,
    /// Devices of the workers, in turn; none for the CPU.
    pub(crate) devices: Vec<String>,
    /// What moves gradients between GPUs.
    pub(crate) transport: Option<String>,
}

/// A run that can be started.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) dir: RunDir,
    pub(crate) lock: Lock,
    pub(crate) plan: RunConfig,
    pub(crate) token: String,
    /// Coordinators that stand by.
    pub(crate) standbys: u32,
    /// What its workers compute on and by.
    pub(crate) means: Means,
    pub(crate) chaos: Chaos,
    pub(crate) json: bool,
    pub(crate) worker_program: PathBuf,
    /// What the event log says so far.
    pub(crate) report: Report,
}

/// What there is to do.
#[derive(Debug)]
pub(crate) enum Start {
    /// To train.
    Run(Box<Prepared>),
    /// Nothing: the run is finished.
    Finished(Box<Summary>),
}

/// Checks the request, and writes what makes the folder a run.
///
/// # Errors
/// The first problem, with the file or key it is in and what to do.
pub(crate) async fn prepare(mut request: Request) -> Result<Start> {
    let chaos = request.chaos.as_deref().map(str::parse).transpose()?.unwrap_or_default();
    let given = request.run_dir.as_deref().map(RunDir::at).transpose()?;
    let stored = match &given {
        Some(dir) => dir.contents()?,
        None => Contents::Nothing,
    };
    let recipe = asked_recipe(&request, given.as_ref(), &stored)?;
    if let (Some(dir), Contents::Run(stored)) = (&given, &stored) {
        check_same(dir, stored, &recipe)?;
    }
    check_standbys(&request, given.as_ref(), &stored)?;
    let samples = check_dataset(&recipe)?;
    let run = match &given {
        Some(dir) => dir.run()?,
        None => RunId::try_from("unnamed".to_owned())?, // Until its folder has a name.
    };
    let name = request.recipe.as_deref().unwrap_or(&recipe.name);
    let planned = recipe.plan(run, samples, request.workers);
    let mut plan = planned.with_context(|| format!("recipe {name}"))?;

    let (dir, lock, report, worker_program) = match (given, stored) {
        (Some(dir), Contents::Run(_)) => {
            let lock = dir.lock()?;
            check_same_place(&dir, request.checkpoints.as_deref())?;
            check_same_log(&dir, request.log.as_deref())?;
            let report = check_history(&dir, request.quarantine).await?;
            if let Some(summary) = report.summary(plan.run.as_str(), dir.location()) {
                return Ok(Start::Finished(Box::new(summary)));
            }
            (dir, lock, report, worker_program()?)
        }
        (given, _) => {
            let worker_program = worker_program()?;
            if let Some(location) = &mut request.checkpoints {
                *location = check_free(location).await?;
            }
            let dir = given.map_or_else(|| free_run_dir(&recipe.name), Ok)?;
            let lock = dir.lock()?;
            if let Some(location) = &mut request.log {
                *location = absolute(location)?;
                let checkpoints = request.checkpoints.as_deref().unwrap_or_else(|| dir.location());
                let (run, checkpoints) = (dir.run()?, checkpoints.to_owned());
                let shared = SharedRun { run, checkpoints, recipe: recipe.to_toml() };
                let store = Store::create(location).context("--log")?;
                store.check_contract().await.context("--log")?;
                shared.write(&store).await?;
            }
            (dir, lock, Report::default(), worker_program)
        }
    };
    plan.run = dir.run()?;
    dir.write(&plan.run, &recipe, request.checkpoints.as_deref(), request.log.as_deref())?;
    let token = dir.read_token()?;
    let Request { json, devices, transport, standbys, .. } = request;
    let means = Means { threads: recipe.threads, devices, transport };
    Ok(Start::Run(Box::new(Prepared {
        dir,
        lock,
        plan,
        token,
        standbys,
        means,
        chaos,
        json,
        worker_program,
        report,
    })))
}

/// The recipe that is asked for, with a location that means the same from everywhere.
fn asked_recipe(request: &Request, dir: Option<&RunDir>, stored: &Contents) -> Result<Recipe> {
    let mut recipe = match (&request.ready, &request.recipe, dir, stored) {
        (Some(recipe), ..) => recipe.clone(),
        (None, Some(name), _, _) => Recipe::load(name, &request.sets)?,
        (None, None, Some(dir), Contents::Run(_)) => {
            Recipe::load(&dir.recipe().display().to_string(), &request.sets)?
        }
        (None, None, _, _) => {
            bail!("no recipe is given: say --recipe NAME or PATH (see `percheron recipe list`)")
        }
    };
    let location = &mut recipe.data.location;
    if location.is_empty() {
        let name = request.recipe.as_deref().unwrap_or(&recipe.name);
        bail!(
            "recipe {name}: key \"data.location\" is not set: give a folder that `percheron shards \
             pack` wrote, such as --set data.location=DIR, or builtin:digits"
        );
    }
    let is_url = location.contains("://") || location.starts_with("builtin:");
    if !is_url {
        let absolute = std::path::absolute(&*location).context("key \"data.location\"")?;
        *location = absolute.display().to_string();
    }
    Ok(recipe)
}

fn check_same(dir: &RunDir, stored: &Recipe, asked: &Recipe) -> Result<()> {
    let differences = stored.differences(asked);
    if !differences.is_empty() {
        bail!(
            "run directory {dir} holds a run of another recipe; in {} and as asked for, these keys \
             are: {}; choose another --run-dir, or leave them as they are stored",
            dir.recipe().display(),
            differences.join("; ")
        );
    }
    Ok(())
}

/// A run stays with its checkpoints.
fn check_same_place(dir: &RunDir, asked: Option<&str>) -> Result<()> {
    let stored = dir.checkpoints()?;
    if let Some(asked) = asked
        && absolute(asked)? != stored
    {
        bail!(
            "run directory {dir} keeps its checkpoints in {stored}, and --checkpoints says {asked}: leave \
             it out"
        );
    }
    Ok(())
}

/// Who stands by must be able to read the log.
fn check_standbys(request: &Request, dir: Option<&RunDir>, stored: &Contents) -> Result<()> {
    if request.standbys == 0 || request.log.is_some() {
        return Ok(());
    }
    let begun = dir.filter(|_| *stored != Contents::Nothing);
    if let Some(dir) = begun
        && dir.shared_log()?.is_some()
    {
        return Ok(());
    }
    let advice = match begun {
        Some(dir) => {
            format!("and the run in {dir} keeps it in a file of its folder: leave --standbys out")
        }
        None => "say --log LOCATION".to_owned(),
    };
    bail!("--standbys needs an event log that several coordinators can read: {advice}")
}

/// A run stays with its log.
fn check_same_log(dir: &RunDir, asked: Option<&str>) -> Result<()> {
    let stored = dir.shared_log()?;
    let Some(asked) = asked else { return Ok(()) };
    if Some(absolute(asked)?) != stored {
        let stored = stored.unwrap_or_else(|| dir.log().display().to_string());
        bail!(
            "run directory {dir} keeps its event log in {stored}, and --log says {asked}: leave it out"
        );
    }
    Ok(())
}

/// Opens the place for a new run's checkpoints; returns a location that means the same from everywhere.
async fn check_free(location: &str) -> Result<String> {
    let location = absolute(location)?;
    let store = Store::create(&location).context("--checkpoints")?;
    store.check_contract().await.context("--checkpoints")?;
    if let Some(newest) = committed_steps(&store).await?.first() {
        bail!(
            "--checkpoints: {location} holds another run's checkpoints, up to step {newest}: choose another \
             place, or go on with that run by its --run-dir"
        );
    }
    Ok(location)
}

fn absolute(location: &str) -> Result<String> {
    if location.contains("://") {
        return Ok(location.trim_end_matches('/').to_owned());
    }
    let path = std::path::absolute(location).context("--checkpoints")?;
    let text = path.to_str().context("--checkpoints: the path is not UTF-8; choose another")?;
    Ok(text.to_owned())
}

/// Checks what the recipe says about images and opens both splits; returns the number of training samples.
fn check_dataset(recipe: &Recipe) -> Result<u64> {
    if let Some(aa) = &recipe.augment.aa {
        RandAugment::parse(aa).context("key \"augment.aa\"")?;
    }
    let location = &recipe.data.location;
    let open = |key: &str, split: &str| {
        Dataset::open(location, split).with_context(|| format!("key \"data.{key}\""))
    };
    let train = open("train", &recipe.data.train)?;
    let validation = open("validation", &recipe.data.validation)?;
    if let Some((there, missing, class)) = difference(&train, &validation) {
        bail!(
            "dataset {location}: the splits have different classes: {there:?} has {class:?} and {missing:?} \
             has not: pack both from the same class folders"
        );
    }
    let (found, classes) = (train.classes().len(), recipe.model.classes);
    if found > classes as usize {
        bail!(
            "dataset {location} has {found} classes and key \"model.classes\" is {classes}: set \
             model.classes={found}"
        );
    }
    Ok(train.len())
}

/// The split that has a class which the other has not, the other, and the first such class. The same classes in
/// another order are none too.
fn difference<'d>(a: &'d Dataset, b: &'d Dataset) -> Option<(&'d str, &'d str, &'d str)> {
    let name = |dataset: &'d Dataset| dataset.manifest().split.as_str();
    let lacks = |there: &'d Dataset, missing: &'d Dataset| {
        let classes = there.classes().iter();
        let class = classes.clone().find(|class| !missing.classes().contains(class))?;
        Some((name(there), name(missing), class.as_str()))
    };
    let moved = || {
        let (class, _) = a.classes().iter().zip(b.classes()).find(|(a, b)| a != b)?;
        Some((name(a), name(b), class.as_str()))
    };
    lacks(a, b).or_else(|| lacks(b, a)).or_else(moved)
}

/// What is there of a run that was begun: its log, and the checkpoint that it would go on from.
async fn check_history(dir: &RunDir, can_quarantine: bool) -> Result<Report> {
    let mut log = history::open_log(dir).await?;
    let entries = match &log {
        Some(log) => log.read_from(1).await?,
        None => Vec::new(),
    };
    let mut report = Report::of(&entries);
    match &report.ledger().outcome {
        Some(Outcome::Finished { .. }) => return Ok(report),
        Some(Outcome::Failed { reason }) => bail!(
            "the run in {dir} has failed and cannot go on: {reason}; start it again in another \
             --run-dir"
        ),
        None => {}
    }
    let store = Store::open(&dir.checkpoints()?)?;
    let mut aside = BTreeMap::new();
    while let Some(error) = check_newest(&store).await? {
        if !can_quarantine || error.intact.is_none() {
            return Err(explain(dir, report.ledger(), &error));
        }
        let LoadError { step, fault, .. } = error;
        print::err(&format!("warning: the checkpoint of step {step} is quarantined: {fault}"));
        quarantine(&store, step, &fault.to_string()).await?;
        aside.insert(step, format!("quarantined, for {fault}"));
    }
    let committed = committed_steps(&store).await?;
    if report.last() == 0
        && let Some(newest) = committed.first()
    {
        bail!(
            "the run in {dir} has checkpoints up to step {newest}, but its event log {} has no record: \
             put it back, or move {dir}/checkpoints away to train from the start",
            dir.log().display()
        );
    }
    if let Some(log) = &mut log {
        forget_missing(dir, log, &mut report, &committed, &aside).await?;
    }
    Ok(report)
}

/// What is wrong with the newest checkpoint, if anything.
async fn check_newest(store: &Store) -> Result<Option<LoadError>> {
    let Some(&newest) = committed_steps(store).await?.first() else { return Ok(None) };
    Ok(match Checkpoint::open(store, newest).await {
        Ok(checkpoint) => checkpoint.verify().await.err(),
        Err(error) => Some(error),
    })
}

/// A checkpoint that was taken away, because it was damaged for instance, is no longer counted on.
async fn forget_missing(
    dir: &RunDir,
    log: &mut OpenLog,
    report: &mut Report,
    committed: &[Step],
    aside: &BTreeMap<Step, String>,
) -> Result<()> {
    let kept = report.ledger().checkpoints.iter().rev();
    let missing: Vec<Step> = kept.take_while(|step| !committed.contains(step)).copied().collect();
    let Some(newest) = missing.first() else { return Ok(()) };
    let (records, after) = forgetting(report.ledger(), &missing, aside);
    // Without any, the run would silently begin anew.
    if after.checkpoints.last().is_none_or(|step| !committed.contains(step)) {
        bail!(
            "the run in {dir} counts on its checkpoint of step {newest}, which is not in {dir}/\
             checkpoints any more: put it back"
        );
    }
    // The log's own clock does not run backwards.
    let at = log.read_from(report.last()).await?.last().map(|entry| entry.at).unwrap_or_default();
    log.append(at, &records).await?.iter().for_each(|entry| report.apply(entry));
    Ok(())
}

/// The records that say that checkpoints are gone, and the ledger after them: whether that is enough
/// to go on from another one is for the rules to say.
fn forgetting(
    ledger: &Ledger,
    gone: &[Step],
    aside: &BTreeMap<Step, String>,
) -> (Vec<Record>, Ledger) {
    let missing = "it is quarantined, or no longer in the run directory";
    let record = |&step: &Step| {
        let reason = aside.get(&step).map_or(missing, String::as_str).to_owned();
        Record::CheckpointAbandoned { step, reason }
    };
    let records: Vec<_> = gone.iter().map(record).collect();
    let mut after = ledger.clone();
    records.iter().for_each(|record| after.apply(record));
    (records, after)
}

fn explain(dir: &RunDir, ledger: &Ledger, error: &LoadError) -> anyhow::Error {
    let LoadError { step, fault, intact } = error;
    let advice = match intact {
        Some(intact) if ledger.checkpoints.contains(intact) => format!(
            "restore that object from a copy, or say --quarantine to set this checkpoint aside and go on \
             from step {intact}, whose checkpoint is intact"
        ),
        Some(intact) => {
            format!("restore that object from a copy (the checkpoint of step {intact} is intact)")
        }
        None if fault.is_damage() => {
            format!("restore that object from a copy: no other checkpoint in {dir} is intact")
        }
        None => "try again when the store answers".to_owned(),
    };
    anyhow::anyhow!("the checkpoint of step {step} cannot be used: {fault}; {advice}")
}
