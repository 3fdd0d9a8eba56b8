//! A run whose event log is in a store: what another node needs to know of it, and how it is read.

use anyhow::{Context as _, Result, bail, ensure};
use checkpoint::{Created, Store, create};
use cluster::RunId;
use recipe::Recipe;
use serde::{Deserialize, Serialize};

/// Its presence makes a place the shared log of a run.
pub(crate) const OBJECT: &str = "run.json";

/// What lies beside the log. No secret: the token comes another way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SharedRun {
    pub(crate) run: RunId,
    /// The store of its checkpoints.
    pub(crate) checkpoints: String,
    /// The recipe, as TOML.
    pub(crate) recipe: String,
}

impl SharedRun {
    /// Says what the run is, once; a store that holds another run is refused.
    pub(crate) async fn write(&self, store: &Store) -> Result<()> {
        let bytes = serde_json::to_vec(self).context("the run cannot be described")?;
        match create(store, OBJECT, bytes.into()).await? {
            Created::Ours => Ok(()),
            Created::Before(found) => {
                let object = store.object(OBJECT);
                let found: Self = serde_json::from_slice(&found)
                    .with_context(|| format!("{object} cannot be read: restore it from a copy"))?;
                bail!(
                    "--log: {} holds the log of run {}: choose another place, or go on with that run by its \
                     --run-dir",
                    store.location(),
                    found.run
                )
            }
        }
    }

    /// Says what the run is unless that has been said; a store that holds another run, or the same with
    /// another recipe, is refused. So any number of coordinators may begin a run together.
    pub(crate) async fn agree(&self, store: &Store) -> Result<()> {
        let bytes = serde_json::to_vec(self).context("the run cannot be described")?;
        let Created::Before(found) = create(store, OBJECT, bytes.into()).await? else {
            return Ok(());
        };
        let location = store.location();
        let found: Self = serde_json::from_slice(&found).with_context(|| {
            format!("{}: it cannot be read: restore it from a copy", store.object(OBJECT))
        })?;
        ensure!(
            found.run == self.run,
            "--log: {location} holds the log of run {} and not of {}: choose another place",
            found.run,
            self.run
        );
        ensure!(
            found.checkpoints == self.checkpoints,
            "--log: the run in {location} keeps its checkpoints in {} and not in {}",
            found.checkpoints,
            self.checkpoints
        );
        let differences = found.recipe(location)?.differences(&self.recipe("asked for")?);
        ensure!(
            differences.is_empty(),
            "--recipe: the run in {location} began with another recipe; there and as asked for, these keys \
             are: {}; give the recipe that it began with, or another --log",
            differences.join("; ")
        );
        Ok(())
    }

    pub(crate) async fn read(store: &Store) -> Result<Self> {
        let object = store.object(OBJECT);
        let bytes = store.read(OBJECT).await.with_context(|| {
            format!("{} holds no run: give the --log that it was started with", store.location())
        })?;
        serde_json::from_slice(&bytes)
            .with_context(|| format!("{object} cannot be read: restore it from a copy"))
    }

    pub(crate) fn recipe(&self, location: &str) -> Result<Recipe> {
        Ok(Recipe::from_toml(&format!("{location}/{OBJECT}"), &self.recipe, &[])?)
    }
}
