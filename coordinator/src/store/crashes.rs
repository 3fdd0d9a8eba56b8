//! The machine stops at any write or sync of the log, and what was not synced may be there or not, or
//! half: the log opens again, and no record that had taken effect is missing.
//!
//! The machine does not stop while the file is made: a database that is cut short then, and holds no
//! record yet, is refused when it is opened again.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use cluster::{Record, Step, Timestamp};
use redb::{Database, StorageBackend};
use testing::Chance;

use super::EventLog;

/// Stops of the machine, over all seeds.
const STOPS: u64 = 10_000;

/// A disk that keeps what was synced, and of the rest what chance lets it keep.
#[derive(Debug, Default)]
struct Disk {
    durable: Vec<u8>,
    /// What a reader sees.
    seen: Vec<u8>,
    unsynced: Vec<(usize, Vec<u8>)>,
    /// Operations until the machine stops; nothing: it runs.
    left: Option<u64>,
}

/// A machine's hold on the disk.
#[derive(Debug, Clone, Default)]
struct Machine(Arc<Mutex<Disk>>);

impl Machine {
    fn disk(&self) -> MutexGuard<'_, Disk> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Disk {
    /// Counts an operation that changes something.
    fn operate(&mut self) -> io::Result<()> {
        match &mut self.left {
            Some(0) => Err(io::Error::other("the machine has stopped")),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// The machine has stopped: what is on the disk when it starts again.
    fn restart(&mut self, chance: &mut Chance) {
        let mut kept = std::mem::take(&mut self.durable);
        for (offset, bytes) in self.unsynced.drain(..) {
            let whole = bytes.len() as u64;
            // Lost, whole, or torn somewhere.
            let written = match chance.below(3) {
                0 => 0,
                1 => bytes.len(),
                _ => usize::try_from(chance.below(whole + 1)).expect("it is small"),
            };
            if kept.len() < offset + written {
                kept.resize(offset + written, 0);
            }
            kept[offset..offset + written].copy_from_slice(&bytes[..written]);
        }
        if kept.len() < self.seen.len() && chance.below(2) == 0 {
            kept.resize(self.seen.len(), 0);
        }
        self.seen.clone_from(&kept);
        self.durable = kept;
    }
}

impl StorageBackend for Machine {
    fn len(&self) -> io::Result<u64> {
        Ok(self.disk().seen.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let disk = self.disk();
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let found = disk.seen.get(start..start + out.len());
        out.copy_from_slice(found.ok_or_else(|| io::Error::other("beyond the end"))?);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut disk = self.disk();
        disk.operate()?;
        disk.seen.resize(usize::try_from(len).map_err(io::Error::other)?, 0);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut disk = self.disk();
        disk.operate()?;
        let Disk { durable, seen, unsynced, .. } = &mut *disk;
        durable.resize(seen.len(), 0);
        for (offset, bytes) in unsynced.drain(..) {
            durable[offset..offset + bytes.len()].copy_from_slice(&bytes);
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut disk = self.disk();
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        disk.operate()?;
        disk.unsynced.push((start, data.to_vec()));
        let end = start + data.len();
        if disk.seen.len() < end {
            disk.seen.resize(end, 0);
        }
        disk.seen[start..end].copy_from_slice(data);
        Ok(())
    }
}

fn open(machine: &Machine) -> Result<EventLog, super::LogError> {
    let mut builder = Database::builder();
    builder.set_cache_size(1 << 16);
    EventLog::on("a disk of the test".as_ref(), builder.create_with_backend(machine.clone()))
}

/// Appends until the machine stops; returns how many records had taken effect.
fn work(log: Result<EventLog, super::LogError>, chance: &mut Chance, effective: &mut u64) {
    let Ok(mut log) = log else { return };
    loop {
        let batch = 1 + chance.below(3);
        let records: Vec<_> = (1..=batch)
            .map(|place| Record::CheckpointCommitted { step: Step(log.last() + place) })
            .collect();
        match log.append(Timestamp(1), &records) {
            Ok(entries) => *effective = entries.last().expect("it was not empty").sequence,
            Err(_) => return,
        }
    }
}

#[test]
fn whenever_the_machine_stops_no_record_that_had_taken_effect_is_lost() {
    let (mut stops, mut longest) = (0, 0);
    for seed in 0.. {
        let mut chance = Chance::new(seed);
        let machine = Machine::default();
        drop(open(&machine).expect("nothing stops yet"));
        let mut effective = 0;
        for life in 0..5 {
            machine.disk().left = Some(chance.below(60));
            work(open(&machine), &mut chance, &mut effective);
            stops += 1;
            {
                let mut disk = machine.disk();
                disk.restart(&mut chance);
                disk.left = None;
            }
            let place = format!("seed {seed}, life {life}");
            let log = open(&machine).unwrap_or_else(|error| panic!("{place}: {error:?}"));
            let entries = log.read_from(1).unwrap_or_else(|error| panic!("{place}: {error}"));
            let found = entries.len() as u64;
            assert!(found >= effective, "{place}: {found} of {effective} records are there");
            for (entry, sequence) in entries.iter().zip(1..) {
                let record = Record::CheckpointCommitted { step: Step(sequence) };
                assert_eq!((entry.sequence, &entry.record), (sequence, &record), "{place}");
            }
            effective = found;
        }
        longest = longest.max(effective);
        if stops >= STOPS {
            break;
        }
    }
    assert!(longest >= 10, "the lives are too short to show anything: {longest}");
    println!("{stops} stops, up to {longest} records");
}
