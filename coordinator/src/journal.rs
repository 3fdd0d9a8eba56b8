//! The event log in an object store: a coordinator can start on any node.
//!
//! ```text
//! <run>/log/entries/0000000001      what was appended together, named by its first entry's place
//! <run>/log/entries/0000000004      … put by a conditional create
//! <run>/log/segments/0000000001-0000000512   a copy of many, so that a restart reads few objects
//! ```
//!
//! **Invariant**: a place of the log is written once. Who has read all entries and appends after them
//! creates the next name; of two who do that, one wins and the other learns that it has been replaced. So
//! entries are never deleted, copied or not: a leader that slept would find its name free again.

use std::{ops::Range, path::PathBuf, time::Duration};

use bytes::Bytes;
use checkpoint::{Created, Store, StoreError, create};
use cluster::{Record, Term, Timestamp};
use futures::{StreamExt as _, TryStreamExt as _};
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::{Entry, LogError};

const ENTRIES: &str = "log/entries";
const SEGMENTS: &str = "log/segments";
const FORMAT: u32 = 1;
/// Entries that are copied together.
const SEGMENT: usize = 512;
/// Objects that are read at the same time.
const READERS: usize = 16;
/// Attempts to read an object whose digest is wrong: bits may change on the way.
const READS: u32 = 3;
/// The first and the longest pause of a store that does not answer.
const PAUSE: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// The log's end, held by a leader.
#[derive(Debug)]
pub(crate) struct Journal {
    store: Store,
    term: Term,
    writer: String,
    last: u64,
    uncopied: Vec<Entry>,
}

/// The first line of an object; entries follow, a line each.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    format: u32,
    /// The leadership that wrote it.
    term: Term,
    /// Tells one's own writes from another's.
    writer: String,
    /// Of the lines that follow.
    blake3: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    sequence: u64,
    at_ms: u64,
    record: Record,
}

impl Journal {
    /// The end of the log, for the leader of `term`, and all entries so far. `writer` is drawn at random.
    pub(crate) async fn open(
        store: Store,
        term: Term,
        writer: String,
    ) -> Result<(Self, Vec<Entry>), LogError> {
        let copied = copied_until(&segments(&store).await?);
        let entries = read(&store, 1).await?;
        let last = entries.last().map_or(0, |entry| entry.sequence);
        let uncopied = entries.iter().filter(|entry| entry.sequence > copied).cloned().collect();
        Ok((Self { store, term, writer, last, uncopied }, entries))
    }

    /// Appends records; they are durable when this returns. As long as the store does not say, it is asked
    /// again: nothing can be decided without it.
    ///
    /// # Errors
    /// [`LogError::Superseded`] if another leader has written at this place: then nothing was appended.
    pub(crate) async fn append(
        &mut self,
        at: Timestamp,
        records: &[Record],
    ) -> Result<Vec<Entry>, LogError> {
        let entries: Vec<_> = (self.last + 1..)
            .zip(records)
            .map(|(sequence, record)| Entry { sequence, at, record: record.clone() })
            .collect();
        let name = format!("{ENTRIES}/{:010}", self.last + 1);
        let bytes = to_bytes(self.term, &self.writer, &entries);
        let mut pause = PAUSE;
        loop {
            match create(&self.store, &name, bytes.clone()).await {
                Ok(Created::Ours) => break,
                Ok(Created::Before(found)) => {
                    if let Ok((header, _)) = parse(&found) {
                        let object = self.store.object(&name);
                        return Err(LogError::Superseded { object, by: header.term });
                    }
                    warn!(object = self.store.object(&name), "what is read back is damaged");
                }
                Err(error) if error.is_transient() || error.is_not_found() => {
                    warn!(%error, "the log cannot be appended to; it is tried again");
                }
                Err(source) => return Err(LogError::Store { source }),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
        self.last += entries.len() as u64;
        self.uncopied.extend_from_slice(&entries);
        self.copy().await;
        Ok(entries)
    }

    /// Copies entries into a segment, when there are enough. A copy that fails is no loss.
    async fn copy(&mut self) {
        if self.uncopied.len() < SEGMENT {
            return;
        }
        let (Some(first), Some(last)) = (self.uncopied.first(), self.uncopied.last()) else {
            return;
        };
        let name = format!("{SEGMENTS}/{:010}-{:010}", first.sequence, last.sequence);
        let bytes = to_bytes(self.term, &self.writer, &self.uncopied);
        match create(&self.store, &name, bytes).await {
            Ok(Created::Ours | Created::Before(_)) => self.uncopied.clear(),
            Err(error) => warn!(%error, "entries of the log could not be copied together"),
        }
    }

    /// The end as it is now.
    pub(crate) async fn reopen(self) -> Result<(Self, Vec<Entry>), LogError> {
        Self::open(self.store, self.term, self.writer).await
    }

    pub(crate) fn store(&self) -> &Store {
        &self.store
    }
}

/// The entries of a run's log from `from` on.
///
/// # Errors
/// [`LogError`] that names the object that is damaged, or the place that is missing.
pub async fn read(store: &Store, from: u64) -> Result<Vec<Entry>, LogError> {
    let first = read_once(store, from).await;
    // A folder may list an entry and not yet the one before it.
    if matches!(first, Err(LogError::Gap { .. })) { read_once(store, from).await } else { first }
}

/// Appends to the log of a run that nobody leads, in objects of at most 512 records. A leader that is there
/// nevertheless is replaced by this.
///
/// # Errors
/// [`LogError`]; [`LogError::Superseded`] if a leader was faster.
pub async fn append(
    store: &Store,
    at: Timestamp,
    records: &[Record],
) -> Result<Vec<Entry>, LogError> {
    let (mut journal, entries) =
        Journal::open(store.clone(), Term::default(), format!("by hand at {}", at.0)).await?;
    let term = |entry: &Entry| {
        if let Record::TermStarted { term } = &entry.record { Some(*term) } else { None }
    };
    journal.term = entries.iter().rev().find_map(term).unwrap_or_default();
    let mut appended = Vec::with_capacity(records.len());
    for together in records.chunks(SEGMENT) {
        appended.extend(journal.append(at, together).await?);
    }
    Ok(appended)
}

async fn read_once(store: &Store, from: u64) -> Result<Vec<Entry>, LogError> {
    let segments = segments(store).await?;
    let copied = copied_until(&segments);
    let mut objects: Vec<String> = segments
        .iter()
        .filter(|places| places.end > from)
        .map(|places| format!("{SEGMENTS}/{:010}-{:010}", places.start, places.end - 1))
        .collect();
    let after = if copied == 0 { String::new() } else { format!("{copied:010}") };
    let names = store.names_after(ENTRIES, &after).await.map_err(store_error)?;
    // The last that begins at or before `from` may hold it.
    let begins = |name: &String| name.parse::<u64>().is_ok_and(|first| first <= from);
    let skipped = names.iter().take_while(|name| begins(name)).count().saturating_sub(1);
    objects.extend(names.iter().skip(skipped).map(|name| format!("{ENTRIES}/{name}")));

    let batches = futures::stream::iter(objects).map(|name| fetch(store, name)).buffered(READERS);
    let mut entries: Vec<Entry> = Vec::new();
    let mut expected = from.max(1);
    for entry in batches.try_concat().await? {
        if entry.sequence < expected {
            continue; // Before `from`, or in two segments.
        }
        if entry.sequence > expected {
            let path = PathBuf::from(store.location());
            return Err(LogError::Gap { path, expected, found: entry.sequence });
        }
        entries.push(entry);
        expected += 1;
    }
    Ok(entries)
}

async fn fetch(store: &Store, name: String) -> Result<Vec<Entry>, LogError> {
    let mut fault = String::new();
    for _ in 0..READS {
        let bytes =
            checkpoint::retrying(checkpoint::Retries::of("read the log"), || store.read(&name));
        match parse(&bytes.await.map_err(store_error)?) {
            Ok((_, entries)) => return Ok(entries),
            Err(found) => fault = found,
        }
    }
    Err(LogError::DamagedObject { object: store.object(&name), fault })
}

/// The places that segments cover, in order.
async fn segments(store: &Store) -> Result<Vec<Range<u64>>, LogError> {
    let names = store.names_after(SEGMENTS, "").await.map_err(store_error)?;
    let places = |name: &String| {
        let (first, last) = name.split_once('-')?;
        Some(first.parse::<u64>().ok()?..last.parse::<u64>().ok()? + 1)
    };
    Ok(names.iter().filter_map(places).collect())
}

/// The last place that is copied, with all before it.
fn copied_until(segments: &[Range<u64>]) -> u64 {
    let next = segments
        .iter()
        .fold(1, |next, places| if places.start <= next { places.end.max(next) } else { next });
    next - 1
}

fn store_error(source: StoreError) -> LogError {
    LogError::Store { source }
}

fn to_bytes(term: Term, writer: &str, entries: &[Entry]) -> Bytes {
    let plain = "records hold only plain values";
    let mut lines = Vec::new();
    for Entry { sequence, at, record } in entries {
        let line = Line { sequence: *sequence, at_ms: at.0, record: record.clone() };
        serde_json::to_writer(&mut lines, &line).expect(plain);
        lines.push(b'\n');
    }
    let blake3 = blake3::hash(&lines).to_hex().to_string();
    let header = Header { format: FORMAT, term, writer: writer.to_owned(), blake3 };
    let mut bytes = serde_json::to_vec(&header).expect(plain);
    bytes.push(b'\n');
    bytes.extend(lines);
    bytes.into()
}

fn parse(bytes: &[u8]) -> Result<(Header, Vec<Entry>), String> {
    let end = bytes.iter().position(|&byte| byte == b'\n').ok_or("it has no first line")?;
    let (first, lines) = (&bytes[..end], &bytes[end + 1..]);
    let header: Header = serde_json::from_slice(first).map_err(|e| format!("first line: {e}"))?;
    if header.format != FORMAT {
        return Err(format!("its format is {}, and this program reads {FORMAT}", header.format));
    }
    if blake3::hash(lines).to_hex().as_str() != header.blake3 {
        return Err("its digest is wrong".to_owned());
    }
    let lines = serde_json::Deserializer::from_slice(lines).into_iter::<Line>();
    let entry = |line: Line| Entry {
        sequence: line.sequence,
        at: Timestamp(line.at_ms),
        record: line.record,
    };
    let entries: Result<_, _> = lines.map(|line| line.map(entry)).collect();
    Ok((header, entries.map_err(|error| error.to_string())?))
}

#[cfg(test)]
mod tests {
    use cluster::Step;

    use super::*;

    fn record(step: u64) -> Record {
        Record::CheckpointCommitted { step: Step(step) }
    }

    async fn leader(store: &Store, term: u64) -> (Journal, Vec<Entry>) {
        Journal::open(store.clone(), Term(term), format!("writer {term}")).await.unwrap()
    }

    fn store() -> (tempfile::TempDir, Store) {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path().to_str().unwrap()).unwrap();
        (folder, store)
    }

    #[tokio::test]
    async fn a_log_is_read_as_it_was_appended_through_segments_and_from_any_place() {
        let (_folder, store) = store();
        let (mut journal, found) = leader(&store, 1).await;
        assert_eq!(found, []);
        let mut all = Vec::new();
        for batch in 0..70 {
            let records: Vec<_> = (0..20).map(|n| record(batch * 20 + n)).collect();
            all.extend(journal.append(Timestamp(batch), &records).await.unwrap());
        }
        assert_eq!(segments(&store).await.unwrap().len(), 2, "1,400 entries");
        for from in [1, 2, 512, 520, 521, 1_041, 1_381, 1_400] {
            let from_place = usize::try_from(from - 1).unwrap();
            assert_eq!(read(&store, from).await.unwrap(), all[from_place..], "from {from}");
        }
        assert_eq!(read(&store, 1_401).await.unwrap(), []);
        let (mut next, found) = leader(&store, 2).await;
        assert_eq!(found, all);
        let entries = next.append(Timestamp(99), &[record(0)]).await.unwrap();
        assert_eq!(entries[0].sequence, 1_401);
    }

    #[tokio::test]
    async fn of_two_who_append_one_is_told_that_it_has_been_replaced() {
        let (_folder, store) = store();
        let (mut old, _) = leader(&store, 1).await;
        old.append(Timestamp(1), &[record(1)]).await.unwrap();
        let (mut new, _) = leader(&store, 2).await;
        new.append(Timestamp(2), &[record(2), record(3)]).await.unwrap();
        let refused = old.append(Timestamp(3), &[record(9)]).await.unwrap_err();
        assert!(matches!(refused, LogError::Superseded { by: Term(2), .. }), "{refused}");
        let records: Vec<_> =
            read(&store, 1).await.unwrap().into_iter().map(|e| e.record).collect();
        assert_eq!(records, [record(1), record(2), record(3)]);
    }

    #[tokio::test]
    async fn a_flipped_bit_and_a_missing_object_are_named() {
        let (folder, store) = store();
        let (mut journal, _) = leader(&store, 1).await;
        for step in 0..3 {
            journal.append(Timestamp(1), &[record(step)]).await.unwrap();
        }
        let object = folder.path().join("log/entries/0000000002");
        let mut bytes = std::fs::read(&object).unwrap();
        let at = bytes.len() - 5;
        bytes[at] ^= 1;
        std::fs::write(&object, bytes).unwrap();
        let damaged = read(&store, 1).await.unwrap_err().to_string();
        assert!(damaged.contains("log/entries/0000000002 cannot be read: its digest"), "{damaged}");
        std::fs::remove_file(&object).unwrap();
        let missing = read(&store, 1).await.unwrap_err();
        assert!(matches!(missing, LogError::Gap { expected: 2, found: 3, .. }), "{missing}");
    }
}
