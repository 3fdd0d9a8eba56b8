//! Commits manifests in the background and prunes what is no longer needed.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use checkpoint::{
    Checkpoint, Digest, Manifest, PartRecord, Retention, Retries, Section, Store, retrying,
};
use cluster::{Epoch, Evaluation, Event, Fingerprint, Generation, Part, Step, Term, Timestamp};
use tokio::{
    sync::{Mutex, mpsc},
    task::JoinSet,
    time::timeout,
};
use tracing::warn;

use crate::{Config, StartError, host::Input, lease::Assurance};

/// How long the end of a run waits until old checkpoints are deleted.
const LAST_PRUNE_MAX: Duration = Duration::from_secs(5);

/// Checkpoints that this process has read back, and found whole. Who prunes holds it.
type ReadBack = Mutex<BTreeSet<Step>>;

/// Writes manifests, one task each.
#[derive(Debug)]
pub(crate) struct Committer {
    config: Arc<Config>,
    store: Store,
    inputs: mpsc::Sender<Input>,
    assurance: Option<Assurance>,
    read_back: Arc<ReadBack>,
    tasks: JoinSet<()>,
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
        let (read_back, tasks) = (Arc::default(), JoinSet::new());
        Ok(Self { config, store, inputs, assurance, read_back, tasks })
    }

    /// Waits for what has been begun, but not for long: what is not deleted now is deleted by hand, or never.
    pub(crate) async fn finish(mut self) {
        let ended = async { while self.tasks.join_next().await.is_some() {} };
        if timeout(LAST_PRUNE_MAX, ended).await.is_err() {
            warn!(
                "the run ends before old checkpoints are deleted: `percheron checkpoints prune` does it"
            );
        }
    }

    /// Commits a checkpoint whose parts are in the store; the outcome comes back as an event.
    pub(crate) fn commit(
        &mut self,
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
        let read_back = Arc::clone(&self.read_back);
        while self.tasks.try_join_next().is_some() {}
        self.tasks.spawn(async move {
            // One that has been replaced commits nothing and deletes nothing.
            if let Some(mut assurance) = assurance
                && let Err(error) = assurance.assured().await
            {
                return warn!(%error, step = %manifest.step, "a checkpoint is not committed");
            }
            carry_out(store, manifest, (keep, evaluations), inputs, &read_back).await;
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
    read_back: &ReadBack,
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
    if is_committed && let Err(error) = prune(&store, keep, &evaluations, read_back).await {
        warn!(error = %error, "old checkpoints could not be pruned");
    }
}

/// Deletes what `keep` does not cover. As many as it wants of the newest must have been read back whole before
/// any is deleted: one that is damaged, or could not be committed, never takes the place of a good one.
async fn prune(
    store: &Store,
    keep: Retention,
    evaluations: &[Evaluation],
    read_back: &ReadBack,
) -> Result<(), checkpoint::StoreError> {
    let mut read_back = read_back.lock().await;
    let (mut counted, mut good) = (Vec::new(), 0);
    for step in checkpoint::committed_steps(store).await? {
        if good < keep.good_min() && !read_back.contains(&step) {
            let read = async { Checkpoint::open(store, step).await?.verify().await };
            if let Err(error) = read.await {
                warn!(%step, %error, "a checkpoint cannot be read back: it does not count");
                continue;
            }
            read_back.insert(step);
        }
        good += 1;
        counted.push(step);
    }
    for step in keep.prunable(&counted, evaluations) {
        checkpoint::prune(store, step).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use checkpoint::{Layout, committed_steps, part_name, save_part};
    use cluster::RunId;

    use super::*;

    async fn keep(store: &Store, step: Step) {
        let sections = vec![Section { name: "state".to_owned(), bytes: 100 }];
        let layout = Layout::new(sections.clone(), 100).unwrap();
        let part = save_part(store, &layout, step, 0, Bytes::from(vec![7; 100])).await.unwrap();
        let manifest = Manifest {
            run: RunId::try_from("toy".to_owned()).unwrap(),
            step,
            epoch: Epoch(0),
            term: Term(1),
            generation: Generation(1),
            sections,
            part_bytes: 100,
            parts: vec![part],
            state_sha256: None,
            recipe: String::new(),
            fingerprint: std::collections::BTreeMap::new(),
            software: "test".to_owned(),
            created: Timestamp(1),
            nonce: "nonce".to_owned(),
        };
        checkpoint::commit(store, &manifest).await.unwrap();
    }

    #[tokio::test]
    async fn checkpoints_that_cannot_be_read_back_do_not_take_the_place_of_good_ones() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path().to_str().unwrap()).unwrap();
        let retention = Retention { newest: 2, every_steps: 0, best: false };
        let read_back = ReadBack::default();
        for step in 1..=5 {
            keep(&store, Step(step)).await;
        }
        for step in [4, 5] {
            let part = folder.path().join(part_name(Step(step), 0));
            let mut bytes = std::fs::read(&part).unwrap();
            bytes[50] ^= 1;
            std::fs::write(&part, bytes).unwrap();
        }
        prune(&store, retention, &[], &read_back).await.unwrap();
        let left = committed_steps(&store).await.unwrap();
        assert_eq!(left, [5, 4, 3, 2].map(Step), "two that are whole, and nothing that is not");
        keep(&store, Step(6)).await;
        prune(&store, retention, &[], &read_back).await.unwrap();
        let left = committed_steps(&store).await.unwrap();
        assert_eq!(left, [6, 5, 4, 3].map(Step), "the next good one lets the oldest go");
    }
}
