//! The event log of a run: from its coordinator while there is one, afterwards from the file.

use std::{path::Path, time::Duration};

use anyhow::{Result, bail};
use checkpoint::Store;
use cluster::{Record, RunId, Timestamp};
use coordinator::{Entry, EventLog, LogError, append_shared, read_shared};
use proto::v1::{Liveness, watch_response::Kind};
use tokio::time::{Instant, sleep, timeout};

use crate::{
    client::{self, Client},
    run_dir::{Contents, RunDir},
    shared::{self, SharedRun},
};

/// How long a coordinator may take to answer before the file is read instead.
const ANSWER_MAX: Duration = Duration::from_secs(3);
/// A coordinator that says nothing for so long has said all it knows.
const SILENCE: Duration = Duration::from_secs(1);
/// How long the coordinator of a run that has just ended may still hold the file.
const LOG_PATIENCE: Duration = Duration::from_secs(5);
const RETRY: Duration = Duration::from_millis(100);

/// What happened in a run, as far as it got.
#[derive(Debug, Default)]
pub(crate) struct History {
    pub(crate) entries: Vec<Entry>,
    /// Where the coordinator listens, if one answered.
    pub(crate) coordinator: Option<String>,
    /// What it says of the workers.
    pub(crate) liveness: Liveness,
}

/// Refuses a folder without a run.
pub(crate) fn require_run(dir: &RunDir) -> Result<Box<recipe::Recipe>> {
    match dir.contents()? {
        Contents::Run(recipe) => Ok(recipe),
        Contents::Nothing => {
            bail!("run directory {dir} holds no run: there is no recipe.toml in it")
        }
    }
}

/// The entries from `from` on: all that there are now.
pub(crate) async fn read(dir: &RunDir, from: u64) -> Result<History> {
    if let Some(history) = ask(dir, from).await? {
        return Ok(history);
    }
    let Some(log) = open_log(dir).await? else { return Ok(History::default()) };
    Ok(History { entries: log.read_from(from).await?, ..History::default() })
}

/// A run's log without its coordinator.
#[derive(Debug)]
pub(crate) enum OpenLog {
    File(EventLog),
    Shared(Store),
}

impl OpenLog {
    /// The entries from `from` on.
    pub(crate) async fn read_from(&self, from: u64) -> Result<Vec<Entry>> {
        Ok(match self {
            Self::File(log) => log.read_from(from)?,
            Self::Shared(store) => read_shared(store, from).await?,
        })
    }

    pub(crate) async fn append(&mut self, at: Timestamp, records: &[Record]) -> Result<Vec<Entry>> {
        Ok(match self {
            Self::File(log) => log.append(at, records)?,
            Self::Shared(store) => append_shared(store, at, records).await?,
        })
    }
}

/// Opens the log, if there is one. The coordinator of a run that has just ended lets its file go a moment
/// later.
pub(crate) async fn open_log(dir: &RunDir) -> Result<Option<OpenLog>> {
    if let Some(location) = dir.shared_log()? {
        return Ok(Some(OpenLog::Shared(Store::open(&location)?)));
    }
    if !dir.log().exists() {
        return Ok(None);
    }
    let give_up = Instant::now() + LOG_PATIENCE;
    loop {
        match EventLog::open(&dir.log()) {
            Err(LogError::InUse { .. }) if Instant::now() < give_up => sleep(RETRY).await,
            opened => return Ok(Some(OpenLog::File(opened?))),
        }
    }
}

/// Where a run is read from: its folder, or the store of its log.
#[derive(Debug)]
pub(crate) enum Source {
    Dir(RunDir),
    Shared(Store, SharedRun),
}

impl Source {
    /// The folder of a run, or what was given to `--log`.
    pub(crate) async fn of(place: &Path) -> Result<Self> {
        match place.to_str() {
            Some(location) if location.contains("://") || place.join(shared::OBJECT).is_file() => {
                let store = Store::open(location)?;
                let run = SharedRun::read(&store).await?;
                Ok(Self::Shared(store, run))
            }
            _ => {
                let dir = RunDir::at(place)?;
                require_run(&dir)?;
                Ok(Self::Dir(dir))
            }
        }
    }

    pub(crate) async fn read(&self, from: u64) -> Result<History> {
        match self {
            Self::Dir(dir) => read(dir, from).await,
            Self::Shared(store, _) => {
                Ok(History { entries: read_shared(store, from).await?, ..History::default() })
            }
        }
    }

    pub(crate) fn run(&self) -> Result<RunId> {
        match self {
            Self::Dir(dir) => dir.run(),
            Self::Shared(_, run) => Ok(run.run.clone()),
        }
    }

    pub(crate) fn recipe(&self) -> Result<Box<recipe::Recipe>> {
        match self {
            Self::Dir(dir) => require_run(dir),
            Self::Shared(store, run) => run.recipe(store.location()).map(Box::new),
        }
    }

    /// The store of its checkpoints.
    pub(crate) fn checkpoints(&self) -> Result<String> {
        match self {
            Self::Dir(dir) => dir.checkpoints(),
            Self::Shared(_, run) => Ok(run.checkpoints.clone()),
        }
    }

    pub(crate) fn location(&self) -> &str {
        match self {
            Self::Dir(dir) => dir.location(),
            Self::Shared(store, _) => store.location(),
        }
    }
}

/// What the coordinator says; nothing if there is none, or it ended before it had said all.
async fn ask(dir: &RunDir, from: u64) -> Result<Option<History>> {
    let Some(address) = dir.read_address() else { return Ok(None) };
    let client = Client::new(&address, dir.run()?, &dir.read_token()?)?;
    let Ok(Ok(mut stream)) = timeout(ANSWER_MAX, client.watch(from)).await else { return Ok(None) };
    let mut entries = Vec::new();
    // The log comes first, then the first news of the workers.
    while let Ok(Ok(Some(message))) = timeout(SILENCE, stream.message()).await {
        match message.kind {
            Some(Kind::Entry(entry)) => entries.push(client::entry(&entry)?),
            Some(Kind::Liveness(liveness)) => {
                return Ok(Some(History {
                    entries,
                    coordinator: Some(client.address().to_owned()),
                    liveness,
                }));
            }
            None => {}
        }
    }
    Ok(None)
}
