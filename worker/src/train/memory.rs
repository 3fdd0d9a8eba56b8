//! Memory for shares of checkpoints. It is found while nobody waits, filled while training waits, and
//! given back when the last part is in the store.
//!
//! **Invariant**: of one worker no more than [`SHARES_MAX`] shares are in memory, but for the last of the run.

use std::{
    sync::{Arc, Mutex, MutexGuard},
    thread,
};

use bytes::Bytes;
use tracing::warn;

/// Shares that may be on their way to the store at once.
const SHARES_MAX: usize = 2;

/// Memory for shares; clones are the same memory.
#[derive(Debug, Clone, Default)]
pub(crate) struct ShareMemory(Arc<Mutex<Kept>>);

#[derive(Debug, Default)]
struct Kept {
    spare: Vec<Vec<u8>>,
    /// Shares on their way.
    lent: usize,
}

/// Bytes of a share; the memory goes back when the last user of them is done.
struct Lent {
    bytes: Vec<u8>,
    memory: ShareMemory,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let mut kept = self.memory.kept();
        kept.lent -= 1;
        if kept.lent + kept.spare.len() < SHARES_MAX {
            kept.spare.push(std::mem::take(&mut self.bytes));
        }
    }
}

impl ShareMemory {
    /// Has memory for a share of so many bytes found in the background: the system gives out pages when
    /// they are first written, and that takes longer than the copy.
    pub(crate) fn prepare(&self, bytes: usize) {
        {
            let mut kept = self.kept();
            kept.spare.retain(|spare| fits(spare, bytes));
            if !kept.spare.is_empty() || kept.lent >= SHARES_MAX {
                return;
            }
        }
        let memory = self.clone();
        let preparing = thread::Builder::new().name("memory".to_owned()).spawn(move || {
            let fresh = vec![1; bytes]; // Not 0: that would touch no page.
            let mut kept = memory.kept();
            if kept.lent + kept.spare.len() < SHARES_MAX {
                kept.spare.push(fresh);
            }
        });
        if let Err(error) = preparing {
            warn!(%error, "no thread is left to prepare memory; the next checkpoint stalls longer");
        }
    }

    /// Empty memory for a share of so many bytes; nothing if too many are on their way and this one is not
    /// `indispensable`. What is taken must be given to [`ShareMemory::lend`].
    pub(crate) fn take(&self, bytes: usize, indispensable: bool) -> Option<Vec<u8>> {
        let mut kept = self.kept();
        if kept.lent >= SHARES_MAX && !indispensable {
            return None;
        }
        kept.lent += 1;
        let place = kept.spare.iter().position(|spare| fits(spare, bytes));
        let mut memory = match place {
            Some(place) => kept.spare.swap_remove(place),
            None => {
                kept.spare.pop(); // It is for another number of workers.
                Vec::with_capacity(bytes)
            }
        };
        memory.clear();
        Some(memory)
    }

    /// Filled memory, as bytes that can be cut.
    pub(crate) fn lend(&self, bytes: Vec<u8>) -> Bytes {
        Bytes::from_owner(Lent { bytes, memory: self.clone() })
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().expect("nothing panics under this lock")
    }
}

/// Whether it is large enough, and not so large that most of it would lie idle.
fn fits(spare: &Vec<u8>, bytes: usize) -> bool {
    spare.capacity() >= bytes && spare.capacity() / 2 <= bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(memory: &ShareMemory, bytes: usize) -> Option<Bytes> {
        let mut share = memory.take(bytes, false)?;
        share.resize(bytes, 7);
        Some(memory.lend(share))
    }

    #[test]
    fn no_more_shares_are_in_memory_than_allowed_and_memory_comes_back() {
        let memory = ShareMemory::default();
        let first = filled(&memory, 100).unwrap();
        let place = first.as_ptr();
        let second = filled(&memory, 100).unwrap();
        assert!(filled(&memory, 100).is_none(), "two are on their way");
        assert!(memory.take(100, true).is_some(), "the last of the run has to be kept");
        memory.kept().lent -= 1;

        let part = first.slice(20..40);
        drop(first);
        assert!(filled(&memory, 100).is_none(), "a part of it is still on its way");
        drop(part);
        assert_eq!(filled(&memory, 100).unwrap().as_ptr(), place, "it is the same memory");
        drop(second);
        assert_eq!(memory.kept().lent, 0);
    }

    #[test]
    fn memory_of_another_size_is_not_kept() {
        let memory = ShareMemory::default();
        drop(filled(&memory, 100).unwrap());
        memory.prepare(1000);
        let larger = filled(&memory, 1000).unwrap();
        assert_eq!(larger.len(), 1000);
        drop(larger);
        assert!(memory.take(10, false).unwrap().capacity() < 100);
    }
}
