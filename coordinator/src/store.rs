//! The event log on disk: an append-only table in an embedded database (redb).
//!
//! **Invariant**: an append has been synced to disk when it returns, and entries are numbered from 1
//! without gaps. The database holds a file lock, so two coordinators never share a log.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
};

use cluster::{Record, Timestamp};
use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition};

const RECORDS: TableDefinition<'_, u64, (u64, &[u8])> = TableDefinition::new("records");

/// One entry: a record with its place and the moment it was written.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// Place in the log, from 1.
    pub sequence: u64,
    /// When it was written, by the coordinator's clock.
    pub at: Timestamp,
    /// What it says.
    pub record: Record,
}

/// The event log of a run.
#[derive(Debug)]
pub struct EventLog {
    path: PathBuf,
    database: Database,
    last: u64,
}

/// A log that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// Another process has it open.
    #[error("event log {}: another coordinator is using it; stop that one first, or choose another run directory", path.display())]
    InUse {
        /// The log.
        path: PathBuf,
    },
    /// There is no log, and none can be made.
    #[error("event log {}: it cannot be made", path.display())]
    Create {
        /// The log.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The database refuses.
    #[error("event log {}: cannot {doing}", path.display())]
    Database {
        /// The log.
        path: PathBuf,
        /// What was attempted.
        doing: &'static str,
        /// Why not.
        #[source]
        source: Box<redb::Error>,
    },
    /// An entry is not what was written.
    #[error("event log {}: entry {sequence} cannot be read; restore the file from a copy", path.display())]
    Damaged {
        /// The log.
        path: PathBuf,
        /// The entry.
        sequence: u64,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// An object of the log is not what was written.
    #[error("event log: {object} cannot be read: {fault}; restore it from a copy")]
    DamagedObject {
        /// The object.
        object: String,
        /// What is wrong with it.
        fault: String,
    },
    /// Another leader has written where this one wanted to. Nothing was appended.
    #[error("{object} was written by the leader of term {by}: this one has been replaced")]
    Superseded {
        /// The object.
        object: String,
        /// The other's term.
        by: cluster::Term,
    },
    /// The store did not answer, or said no.
    #[error("event log")]
    Store {
        /// What it said.
        #[source]
        source: checkpoint::StoreError,
    },
    /// The numbering has a hole.
    #[error("event log {}: entry {expected} is missing (found {found}); restore the file from a copy", path.display())]
    Gap {
        /// The log.
        path: PathBuf,
        /// The entry that should come next.
        expected: u64,
        /// The entry that does.
        found: u64,
    },
}

impl EventLog {
    /// Opens a log, or makes an empty one.
    ///
    /// # Errors
    /// [`LogError`] if it is in use or not a log.
    pub fn open(path: &Path) -> Result<Self, LogError> {
        if !path.exists() {
            create_whole(path)
                .map_err(|source| LogError::Create { path: path.to_owned(), source })?;
        }
        Self::on(path, Database::create(path))
    }

    /// The log in a database that people know by `path`.
    fn on(path: &Path, database: Result<Database, DatabaseError>) -> Result<Self, LogError> {
        let database = database.map_err(|error| {
            let path = path.to_owned();
            if matches!(error, DatabaseError::DatabaseAlreadyOpen) {
                return LogError::InUse { path };
            }
            LogError::Database { path, doing: "open it", source: Box::new(error.into()) }
        })?;
        let mut log = Self { path: path.to_owned(), database, last: 0 };
        log.last = log.write(&[]).map_err(log.failure("prepare it"))?;
        Ok(log)
    }

    /// Appends records and syncs them to disk; returns them with their places.
    ///
    /// # Errors
    /// [`LogError::Database`]; then nothing was appended.
    pub fn append(&mut self, at: Timestamp, records: &[Record]) -> Result<Vec<Entry>, LogError> {
        let entries: Vec<_> = (self.last + 1..)
            .zip(records)
            .map(|(sequence, record)| Entry { sequence, at, record: record.clone() })
            .collect();
        self.last = self.write(&entries).map_err(self.failure("append to it"))?;
        Ok(entries)
    }

    /// The entries from `from` on, in order.
    ///
    /// # Errors
    /// [`LogError`] that names the first entry that is damaged or missing.
    pub fn read_from(&self, from: u64) -> Result<Vec<Entry>, LogError> {
        let raw = self.read(from).map_err(self.failure("read it"))?;
        let mut entries = Vec::with_capacity(raw.len());
        for ((sequence, at, bytes), expected) in raw.into_iter().zip(from.max(1)..) {
            let path = || self.path.clone();
            if sequence != expected {
                return Err(LogError::Gap { path: path(), expected, found: sequence });
            }
            let record = serde_json::from_slice(&bytes).map_err(|source| LogError::Damaged {
                path: path(),
                sequence,
                source,
            })?;
            entries.push(Entry { sequence, at: Timestamp(at), record });
        }
        Ok(entries)
    }

    /// The place of the newest entry; 0 if there is none.
    #[must_use]
    pub fn last(&self) -> u64 {
        self.last
    }

    fn write(&self, entries: &[Entry]) -> Result<u64, redb::Error> {
        let transaction = self.database.begin_write()?;
        let last = {
            let mut table = transaction.open_table(RECORDS)?;
            for entry in entries {
                let bytes =
                    serde_json::to_vec(&entry.record).expect("records hold only plain values");
                table.insert(entry.sequence, (entry.at.0, bytes.as_slice()))?;
            }
            table.last()?.map_or(0, |(sequence, _)| sequence.value())
        };
        transaction.commit()?;
        Ok(last)
    }

    fn read(&self, from: u64) -> Result<Vec<(u64, u64, Vec<u8>)>, redb::Error> {
        let table = self.database.begin_read()?.open_table(RECORDS)?;
        let mut entries = Vec::new();
        for entry in table.range(from.max(1)..)? {
            let (sequence, value) = entry?;
            let (at, bytes) = value.value();
            entries.push((sequence.value(), at, bytes.to_vec()));
        }
        Ok(entries)
    }

    fn failure(&self, doing: &'static str) -> impl Fn(redb::Error) -> LogError {
        let path = self.path.clone();
        move |source| LogError::Database { path: path.clone(), doing, source: Box::new(source) }
    }
}

/// Makes an empty log under another name and links it to `path`, so that it is there as a whole or not at
/// all: a database whose making was cut short is refused for ever.
fn create_whole(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    let new = tempfile::Builder::new().prefix(".log.").suffix(".new").tempfile_in(folder)?;
    let database = Database::create(new.path()).map_err(io::Error::other)?;
    let log = EventLog { path: path.to_owned(), database, last: 0 };
    log.write(&[]).map_err(io::Error::other)?; // With its table, and synced.
    drop(log);
    match std::fs::hard_link(new.path(), path) {
        // Another coordinator was quicker; the lock decides between the two.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        linked => linked?,
    }
    new.close()?;
    File::open(folder)?.sync_all() // The name is durable as well.
}

#[cfg(test)]
mod crashes;

#[cfg(test)]
mod tests {
    use cluster::{Step, Term};

    use super::*;

    #[test]
    fn a_log_gives_back_what_was_appended_after_it_was_closed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log.redb");
        let records =
            [Record::TermStarted { term: Term(1) }, Record::CheckpointCommitted { step: Step(4) }];
        let mut log = EventLog::open(&path).unwrap();
        assert_eq!(log.read_from(1).unwrap(), []);
        log.append(Timestamp(7), &records[..1]).unwrap();
        log.append(Timestamp(8), &records[1..]).unwrap();
        drop(log);
        let log = EventLog::open(&path).unwrap();
        assert_eq!(log.last(), 2);
        let entries = log.read_from(2).unwrap();
        assert_eq!(entries.len(), 1);
        assert_eq!((entries[0].sequence, entries[0].at), (2, Timestamp(8)));
        assert_eq!(entries[0].record, records[1]);
    }

    #[test]
    fn a_log_is_made_as_a_whole_whatever_an_earlier_attempt_left() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log.redb");
        let log = EventLog::open(&path).unwrap();
        drop(log);
        let whole = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        // An attempt that is killed leaves a torn file, under another name.
        std::fs::write(folder.path().join(".log.torn.new"), &whole[..whole.len() / 2]).unwrap();
        let mut log = EventLog::open(&path).unwrap();
        log.append(Timestamp(1), &[Record::TermStarted { term: Term(1) }]).unwrap();
        assert_eq!(log.last(), 1);
        let names = std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name());
        assert_eq!(names.count(), 2, "nothing of the new attempt is left but the log");
    }

    #[test]
    fn two_coordinators_never_share_a_log() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log.redb");
        let _first = EventLog::open(&path).unwrap();
        let refusal = EventLog::open(&path).unwrap_err().to_string();
        assert!(refusal.contains("another coordinator is using it"), "{refusal}");
    }

    #[test]
    fn a_file_that_is_no_log_is_refused_and_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log.redb");
        std::fs::write(&path, b"this is not a database").unwrap();
        let refusal = EventLog::open(&path).unwrap_err().to_string();
        assert!(refusal.contains("log.redb"), "{refusal}");
        assert_eq!(std::fs::read(&path).unwrap(), b"this is not a database");
    }
}
