//! Ending a blocked call from another thread.

use std::{
    fmt,
    io::{self, PipeReader, PipeWriter, Write as _},
    os::fd::{AsFd, BorrowedFd},
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicBool, Ordering},
    },
};

/// Ends the formation and the exchanges of one generation from any thread; for good.
///
/// It is made by whoever may want to abort, before the formation begins, so that there is no moment
/// at which an abort finds nobody.
#[derive(Clone)]
pub struct AbortHandle(Arc<Inner>);

/// What is called once at the abort; its owner keeps it alive.
pub(crate) type Waker = Arc<dyn Fn() + Send + Sync>;

struct Inner {
    aborted: AtomicBool,
    /// Readable once aborted, and never drained: every poll that includes it then returns.
    reader: PipeReader,
    writer: PipeWriter,
    wakers: Mutex<Vec<Weak<dyn Fn() + Send + Sync>>>,
}

impl AbortHandle {
    /// A handle that nobody has used yet.
    ///
    /// # Errors
    /// If the process is out of file descriptors.
    pub fn new() -> io::Result<Self> {
        let (reader, writer) = io::pipe()?;
        let wakers = Mutex::new(Vec::new());
        Ok(Self(Arc::new(Inner { aborted: AtomicBool::new(false), reader, writer, wakers })))
    }

    /// Ends every call that is or will be blocked under this handle. Calling it again does nothing.
    pub fn abort(&self) {
        if self.0.aborted.swap(true, Ordering::SeqCst) {
            return;
        }
        (&self.0.writer).write_all(&[1]).expect("one byte fits, and the reader is held here");
        let wakers = std::mem::take(&mut *self.wakers());
        for waker in wakers.iter().filter_map(Weak::upgrade) {
            waker();
        }
    }

    /// Whether [`AbortHandle::abort`] was called.
    #[must_use]
    pub fn is_aborted(&self) -> bool {
        self.0.aborted.load(Ordering::SeqCst)
    }

    /// Has `waker` called at the abort, for those who wait where no descriptor can be polled.
    ///
    /// An abort that came before calls nobody: check [`AbortHandle::is_aborted`] before each wait.
    pub(crate) fn wake_at_abort(&self, waker: &Waker) {
        let mut wakers = self.wakers();
        wakers.retain(|held| held.strong_count() > 0);
        wakers.push(Arc::downgrade(waker));
    }

    fn wakers(&self) -> std::sync::MutexGuard<'_, Vec<Weak<dyn Fn() + Send + Sync>>> {
        self.0.wakers.lock().expect("nothing panics under this lock")
    }
}

impl AsFd for AbortHandle {
    /// Readable once aborted.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.reader.as_fd()
    }
}

impl fmt::Debug for AbortHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AbortHandle").field("aborted", &self.is_aborted()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[test]
    fn an_abort_wakes_once_and_lasts() {
        let handle = AbortHandle::new().unwrap();
        let calls = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&calls);
        let waker: Waker = Arc::new(move || {
            counted.fetch_add(1, Ordering::SeqCst);
        });
        handle.wake_at_abort(&waker);
        assert!(!handle.is_aborted());
        handle.clone().abort();
        handle.abort();
        assert!(handle.is_aborted());
        assert_eq!(calls.load(Ordering::SeqCst), 1);
    }
}
