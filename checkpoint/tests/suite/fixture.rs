//! A small state and a folder to keep it in.

use std::{collections::BTreeMap, ops::Range, path::PathBuf};

use bytes::Bytes;
use checkpoint::{
    Committed, Layout, Manifest, PartRecord, Section, Store, commit, part_name, save_part,
};
use cluster::{Epoch, Generation, Rank, RunId, Step, Term, Timestamp};
use tempfile::TempDir;

pub(crate) const PART_BYTES: u64 = 1000;

pub(crate) struct Folder {
    root: TempDir,
    pub(crate) store: Store,
}

pub(crate) fn folder() -> Folder {
    let root = tempfile::tempdir().unwrap();
    let store = Store::create(root.path().join("run").to_str().unwrap()).unwrap();
    Folder { root, store }
}

impl Folder {
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.root.path().join("run").join(name)
    }

    pub(crate) fn part(&self, step: Step, index: u32) -> PathBuf {
        self.file(&part_name(step, index))
    }
}

pub(crate) fn layout() -> Layout {
    let section = |name: &str, bytes| Section { name: name.to_owned(), bytes };
    Layout::new(vec![section("params", 3_300), section("ema", 2_200)], PART_BYTES).unwrap()
}

/// The state after `step`: every byte tells where and when it belongs.
pub(crate) fn state(step: Step) -> Vec<u8> {
    let seed = u8::try_from(step.0 % 200).unwrap();
    (0..layout().total_bytes()).map(|at| seed.wrapping_add((at % 251) as u8)).collect()
}

/// The same range, as indices.
pub(crate) fn in_memory(range: Range<u64>) -> Range<usize> {
    usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()
}

/// Has `size` ranks save their shares.
pub(crate) async fn save(store: &Store, step: Step, size: u32) -> Vec<PartRecord> {
    let (layout, state) = (layout(), state(step));
    let mut parts = Vec::new();
    for rank in (0..size).map(Rank) {
        for part in layout.share(rank, size) {
            let bytes = Bytes::copy_from_slice(&state[in_memory(layout.part_range(part))]);
            parts.push(save_part(store, &layout, step, part, bytes).await.unwrap());
        }
    }
    parts
}

pub(crate) fn manifest(step: Step, parts: Vec<PartRecord>, nonce: &str) -> Manifest {
    Manifest {
        run: RunId::try_from("digits".to_owned()).unwrap(),
        step,
        epoch: Epoch(1),
        term: Term(1),
        generation: Generation(1),
        sections: layout().sections().to_vec(),
        part_bytes: PART_BYTES,
        parts,
        state_sha256: None,
        recipe: "epochs = 8\n".to_owned(),
        fingerprint: BTreeMap::new(),
        software: "percheron test".to_owned(),
        created: Timestamp(7),
        nonce: nonce.to_owned(),
    }
}

/// Saves and commits the state after each of `steps`.
pub(crate) async fn checkpoints(store: &Store, steps: &[u64]) {
    for step in steps.iter().copied().map(Step) {
        let parts = save(store, step, 3).await;
        let committed = commit(store, &manifest(step, parts, "first")).await.unwrap();
        assert_eq!(committed, Committed::Now);
    }
}
