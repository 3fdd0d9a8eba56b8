//! The event log of a run: from its coordinator while there is one, afterwards from the file.

use std::time::Duration;

use anyhow::{Result, bail};
use coordinator::{Entry, EventLog, LogError};
use proto::v1::{Liveness, watch_response::Kind};
use tokio::time::{Instant, sleep, timeout};

use crate::{
    client::{self, Client},
    run_dir::{Contents, RunDir},
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
    if !dir.log().exists() {
        return Ok(History::default());
    }
    let entries = open_log(dir).await?.read_from(from)?;
    Ok(History { entries, ..History::default() })
}

/// Opens the file. The coordinator of a run that has just ended lets it go a moment later.
pub(crate) async fn open_log(dir: &RunDir) -> Result<EventLog> {
    let give_up = Instant::now() + LOG_PATIENCE;
    loop {
        match EventLog::open(&dir.log()) {
            Err(LogError::InUse { .. }) if Instant::now() < give_up => sleep(RETRY).await,
            opened => return Ok(opened?),
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
                return Ok(Some(History { entries, coordinator: Some(address), liveness }));
            }
            None => {}
        }
    }
    Ok(None)
}
