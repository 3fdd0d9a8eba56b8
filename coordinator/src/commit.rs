//! Commits manifests in the background and prunes what is no longer needed.

use std::sync::Arc;

use checkpoint::{Digest, Manifest, PartRecord, Retention, Retries, Section, Store, retrying};
use cluster::{Epoch, Evaluation, Event, Fingerprint, Generation, Part, Step, Term, Timestamp};
use tokio::sync::mpsc;
use tracing::warn;

use crate::{Config, StartError, host::Input, lease::Assurance};

/// Writes manifests, one task each.
#[derive(Debug)]
pub(crate) struct Committer {
    config: Arc<Config>,
    store: Store,
    inputs: mpsc::Sender<Input>,
    assurance: Option<Assurance>,
}

impl Committer {
    /// Opens the store, and makes sure that it keeps the contract.
    pub(crate) async fn new(
        config: Arc<Config>,
        inputs: mpsc::Sender<Input>,
        assurance: Option<Assurance>,
    ) -> Result<Self, StartError> {
        let store = Store::create(&config.checkpoints)
            .map_err(|source| StartError::Store { location: config.checkpoints.clone(), source })?;
        store.check_contract().await?;
        Ok(Self { config, store, inputs, assurance })
    }

    /// Commits a checkpoint whose parts are in the store; the outcome comes back as an event.
    pub(crate) fn commit(
        &self,
        (term, generation, step): (Term, Generation, Step),
        fingerprint: Fingerprint,
        parts: Vec<Part>,
        (part_bytes, sections): (u64, Vec<(String, u64)>),
        evaluations: Vec<Evaluation>,
        created: Timestamp,
    ) {
        let mut records = Vec::with_capacity(parts.len());
        for part in parts {
            let Ok(blake3) = Digest::try_from(part.digest) else {
                let reason = format!("the digest of part {} is not one", part.index);
                return self.report(Event::CheckpointFailed { step, reason });
            };
            records.push(PartRecord { index: part.index, bytes: part.bytes, blake3 });
        }
        let attempt = format!("{}/{term}/{generation}/{step}/{}", self.config.run.run, created.0);
        let manifest = Manifest {
            run: self.config.run.run.clone(),
            step,
            epoch: Epoch(step.0 / self.config.run.steps_per_epoch),
            term,
            generation,
            sections: sections.into_iter().map(|(name, bytes)| Section { name, bytes }).collect(),
            part_bytes,
            parts: records,
            state_sha256: None,
            recipe: self.config.recipe.clone(),
            fingerprint: fingerprint.0,
            software: self.config.software.clone(),
            created,
            nonce: blake3::hash(attempt.as_bytes()).to_hex().to_string(),
        };
        let (store, keep) = (self.store.clone(), self.config.keep);
        let (inputs, assurance) = (self.inputs.clone(), self.assurance.clone());
        tokio::spawn(async move {
            // One that has been replaced commits nothing and deletes nothing.
            if let Some(mut assurance) = assurance
                && let Err(error) = assurance.assured().await
            {
                return warn!(%error, step = %manifest.step, "a checkpoint is not committed");
            }
            carry_out(store, manifest, (keep, evaluations), inputs).await;
        });
    }

    fn report(&self, event: Event) {
        let inputs = self.inputs.clone();
        tokio::spawn(async move {
            drop(inputs.send(Input::Cluster(event)).await); // The host may have ended.
        });
    }
}

async fn carry_out(
    store: Store,
    manifest: Manifest,
    (keep, evaluations): (Retention, Vec<Evaluation>),
    inputs: mpsc::Sender<Input>,
) {
    let step = manifest.step;
    let commit =
        retrying(Retries::of("commit a checkpoint"), || checkpoint::commit(&store, &manifest));
    let event = match commit.await {
        Ok(_) => Event::CheckpointCommitted { step },
        Err(error) => Event::CheckpointFailed { step, reason: error.to_string() },
    };
    let is_committed = matches!(event, Event::CheckpointCommitted { .. });
    drop(inputs.send(Input::Cluster(event)).await); // The host may have ended.
    if is_committed && let Err(error) = prune(&store, keep, &evaluations).await {
        warn!(error = %error, "old checkpoints could not be pruned");
    }
}

/// Deletes what `keep` does not cover. Only what has a manifest counts, so a checkpoint that could not
/// be committed never takes the place of one that was.
async fn prune(
    store: &Store,
    keep: Retention,
    evaluations: &[Evaluation],
) -> Result<(), checkpoint::StoreError> {
    let committed = checkpoint::committed_steps(store).await?;
    for step in keep.prunable(&committed, evaluations) {
        checkpoint::prune(store, step).await?;
    }
    Ok(())
}
