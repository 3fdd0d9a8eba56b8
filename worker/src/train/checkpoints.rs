//! The state to and from the parts of a checkpoint.

use std::ops::Range;

use bytes::Bytes;
use checkpoint::{
    Checkpoint, Layout, LoadError, Retries, Store, StoreError, committed_steps, prune, quarantine,
    retrying,
};
use cluster::{Rank, Step};
use tracing::warn;

use super::{
    memory::ShareMemory,
    state::{TrainState, section_index},
};

/// This worker's share of a checkpoint, copied out of the state.
#[derive(Debug)]
pub struct ShareBytes {
    /// The step whose state it is.
    pub step: Step,
    /// How the state is cut.
    pub layout: Layout,
    /// Index and bytes of each part of the share.
    pub parts: Vec<(u32, Bytes)>,
}

/// A checkpoint that cannot become the state.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The store cannot be opened.
    #[error("the checkpoints cannot be read: {0}")]
    Open(#[from] checkpoint::OpenError),
    /// It is damaged, or the store does not answer.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// It could not be set aside, or those that cannot be trusted could not be deleted.
    #[error("the store does not let a checkpoint that cannot be used be taken away")]
    Quarantine(#[from] StoreError),
    /// It is of another network or another version of this program.
    #[error(
        "checkpoint of step {step} holds {found} and not {wanted}: it is of another network or \
         another version of this program; resume with the recipe and version that wrote it"
    )]
    OtherSections {
        /// The step.
        step: Step,
        /// Its sections.
        found: String,
        /// The state's.
        wanted: String,
    },
}

/// The size of what `rank` of `size` saves.
pub(crate) fn share_bytes(layout: &Layout, rank: Rank, size: u32) -> usize {
    length(&share_range(layout, rank, size))
}

/// The bytes of the state that `rank` of `size` saves: its parts follow each other.
fn share_range(layout: &Layout, rank: Rank, size: u32) -> Range<u64> {
    let parts = layout.share(rank, size);
    if parts.is_empty() {
        return 0..0;
    }
    layout.part_range(parts.start).start..layout.part_range(parts.end - 1).end
}

/// Copies what `rank` of `size` saves of the state; training waits for this and for nothing else of a
/// checkpoint. Nothing is copied if too many shares are in memory, unless this one is `indispensable`.
pub(crate) fn share(
    state: &TrainState,
    layout: &Layout,
    (rank, size): (Rank, u32),
    memory: &ShareMemory,
    indispensable: bool,
) -> Option<ShareBytes> {
    let step = state.step().expect("only a state that was agreed on is saved");
    let sections = state.sections();
    let range = share_range(layout, rank, size);
    let mut bytes = memory.take(length(&range), indispensable)?;
    for piece in layout.pieces(range.clone()) {
        let section = section_index(piece.section).expect("the layout is of this state");
        bytes.extend_from_slice(&sections[section][indices(&piece.range)]);
    }
    let bytes = memory.lend(bytes);
    let part = |index: u32| {
        let part = layout.part_range(index);
        let part = part.start - range.start..part.end - range.start;
        (index, bytes.slice(indices(&part)))
    };
    let parts = layout.share(rank, size).map(part).collect();
    Some(ShareBytes { step, layout: layout.clone(), parts })
}

/// Overwrites the state with a checkpoint. On error there is no usable state.
///
/// # Errors
/// [`RestoreError`] names the object and says what to do.
pub(crate) async fn restore(
    location: &str,
    step: Step,
    state: &mut TrainState,
    wanted: &Layout,
) -> Result<(), RestoreError> {
    let store = Store::open(location)?;
    let (mut retries, mut was_damaged) = (Retries::of("read a checkpoint"), false);
    loop {
        match read(&store, step, state, wanted).await {
            // Bytes may be damaged on their way. What is damaged in the store is so twice.
            Err(RestoreError::Load(error)) if error.fault.is_damage() && !was_damaged => {
                warn!(step = step.0, %error, "a checkpoint seems damaged; it is read once more");
                was_damaged = true;
            }
            Err(RestoreError::Load(error)) => {
                if !retries.again(&error).await {
                    return Err(error.into());
                }
            }
            done => return done,
        }
    }
}

/// Sets the checkpoint aside if another is intact, and says what is wrong with it.
///
/// # Errors
/// If the store does not take the marker.
pub(crate) async fn set_aside(location: &str, error: &LoadError) -> Result<String, RestoreError> {
    let reason = error.fault.to_string();
    if error.intact.is_some() {
        let store = Store::open(location)?;
        let retries = Retries::of("set a checkpoint aside");
        retrying(retries, || quarantine(&store, error.step, &reason)).await?;
    }
    Ok(reason)
}

/// Deletes all checkpoints of steps after `agreed`.
///
/// # Errors
/// If the store cannot be opened or does not answer.
pub(crate) async fn retract(location: &str, agreed: Step) -> Result<(), RestoreError> {
    let store = Store::open(location)?;
    let find = || committed_steps(&store);
    for step in retrying(Retries::of("look for checkpoints"), find).await? {
        if step > agreed {
            warn!(step = step.0, "a checkpoint that cannot be trusted is deleted");
            retrying(Retries::of("delete a checkpoint"), || prune(&store, step)).await?;
        }
    }
    Ok(())
}

async fn read(
    store: &Store,
    step: Step,
    state: &mut TrainState,
    wanted: &Layout,
) -> Result<(), RestoreError> {
    state.tear();
    let checkpoint = Checkpoint::open(store, step).await?;
    let manifest = checkpoint.manifest();
    if manifest.sections != wanted.sections() {
        let text = |sections: &[checkpoint::Section]| {
            let section = |s: &checkpoint::Section| format!("{} ({} bytes)", s.name, s.bytes);
            sections.iter().map(section).collect::<Vec<_>>().join(", ")
        };
        let (found, wanted) = (text(&manifest.sections), text(wanted.sections()));
        return Err(RestoreError::OtherSections { step, found, wanted });
    }
    // The run may have been resumed with another size of parts; the sections are the same.
    checkpoint
        .read(&mut |range, bytes| {
            let mut at = 0;
            for piece in wanted.pieces(range) {
                let section = section_index(piece.section).expect("the layout is of this state");
                let end = at + length(&piece.range);
                state.section_mut(section)[indices(&piece.range)].copy_from_slice(&bytes[at..end]);
                at = end;
            }
        })
        .await?;
    state.mend();
    assert_eq!(state.step(), Some(step), "a checkpoint holds the state of its step");
    Ok(())
}

fn length(range: &Range<u64>) -> usize {
    indices(range).len()
}

fn indices(range: &Range<u64>) -> Range<usize> {
    let index = |at: u64| usize::try_from(at).expect("the state lies in memory");
    index(range.start)..index(range.end)
}
