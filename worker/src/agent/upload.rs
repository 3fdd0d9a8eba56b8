//! Shares of a checkpoint on their way to the store.

use bytes::Bytes;
use checkpoint::{Layout, PartRecord, Retries, SaveError, Store, retrying, save_part};
use cluster::{Generation, Notice, Part, Share, Step};
use tracing::warn;

use crate::train::{ShareBytes, chain};

/// Puts a share into the store.
pub(crate) async fn upload(store: Store, generation: Generation, share: ShareBytes) -> Notice {
    let ShareBytes { step, layout, parts } = share;
    let mut written = Vec::with_capacity(parts.len());
    for (index, bytes) in parts {
        match put(&store, &layout, step, index, bytes).await {
            Ok(part) => written.push(part),
            Err(error) => {
                let reason = chain(&error);
                warn!(step = step.0, part = index, error = reason, "a part could not be saved");
                return Notice::ShareSaved { generation, step, outcome: Err(reason) };
            }
        }
    }
    let sections = layout.sections().iter().map(|s| (s.name.clone(), s.bytes)).collect();
    let (parts_total, part_bytes) = (layout.parts(), layout.part_bytes());
    let share = Share { step, parts: written, parts_total, part_bytes, sections };
    Notice::ShareSaved { generation, step, outcome: Ok(share) }
}

async fn put(
    store: &Store,
    layout: &Layout,
    step: Step,
    index: u32,
    bytes: Bytes,
) -> Result<Part, SaveError> {
    let record = retrying(Retries::of("save a part"), || {
        save_part(store, layout, step, index, bytes.clone())
    });
    record.await.map(part)
}

fn part(record: PartRecord) -> Part {
    Part { index: record.index, bytes: record.bytes, digest: record.blake3.to_string() }
}
