//! Files of a dataset that have been fetched from afar, kept on this machine.
//!
//! An entry is a block of a file that is known by its digest, so an entry never becomes stale. It is written
//! under another name, forced to the disk and then renamed, and it carries its length and checksum: one that
//! is torn or has rotted counts as none. Processes share the folder without talking to each other.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    process,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use bytes::Bytes;

use crate::{digest::Sha256, source::SourceError};

/// Names the folder.
pub(crate) const FOLDER: &str = "PERCHERON_DATA_CACHE";
/// Names the most that the folder may hold, in GiB.
pub(crate) const LIMIT: &str = "PERCHERON_DATA_CACHE_GIB";
const LIMIT_GIB_DEFAULT: f64 = 100.0;

/// Magic, crc32c of the rest as little-endian `u32`, its length as little-endian `u32`.
const HEADER_BYTES: usize = 16;
const MAGIC: &[u8; 8] = b"perchbl1";
/// The part of the limit that is freed at once, and after which other processes' entries are counted again.
const PART: u64 = 16;

/// Where the cache is and how much it may hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Settings {
    folder: PathBuf,
    limit_bytes: u64,
}

impl Settings {
    /// From the variables of an environment.
    pub(crate) fn from_variables(variables: &[(String, String)]) -> Result<Self, SourceError> {
        let value = |name| variables.iter().find(|(known, _)| known == name).map(|(_, v)| &**v);
        let absolute = |name| value(name).map(Path::new).filter(|path| path.is_absolute());
        let wrong = |variable, value: &str, problem| {
            let value = value.to_owned();
            SourceError::Variable { variable, value, problem }
        };
        let folder = match value(FOLDER) {
            Some("") => return Err(wrong(FOLDER, "", "give a folder")),
            Some(folder) => PathBuf::from(folder),
            None => {
                let home = || absolute("HOME").map(|home| home.join(".cache"));
                let users = absolute("XDG_CACHE_HOME").map(Path::to_owned).or_else(home);
                let problem = "there is no home folder to take instead: give a folder";
                users.ok_or_else(|| wrong(FOLDER, "", problem))?.join("percheron/data")
            }
        };
        let gib = match value(LIMIT) {
            None => LIMIT_GIB_DEFAULT,
            Some(text) => text
                .parse()
                .ok()
                .filter(|gib: &f64| gib.is_finite() && *gib > 0.0)
                .ok_or_else(|| wrong(LIMIT, text, "give a number of GiB above 0"))?,
        };
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "it is above 0, and what is beyond u64 becomes its greatest value"
        )]
        let limit_bytes = (gib * f64::from(1 << 30)) as u64;
        Ok(Self { folder, limit_bytes })
    }
}

/// Which entry: a block of the file with this digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Key {
    pub(crate) file: Sha256,
    pub(crate) block: u64,
}

/// Usable from any thread, and by several processes.
#[derive(Debug)]
pub(crate) struct Cache {
    folder: PathBuf,
    limit_bytes: u64,
    held: Mutex<Held>,
    written: AtomicU64,
}

/// What the folder holds, as far as this process knows.
#[derive(Debug, Default)]
struct Held {
    bytes: u64,
    /// Written since the folder was last looked through.
    since: u64,
}

impl Cache {
    /// Makes the folder if there is none.
    pub(crate) fn open(settings: Settings) -> Result<Self, SourceError> {
        let Settings { folder, limit_bytes } = settings;
        let unusable = |source| SourceError::Cache { folder: folder.display().to_string(), source };
        fs::create_dir_all(&folder).map_err(unusable)?;
        let bytes = entries(&folder).map_err(unusable)?.iter().map(|entry| entry.bytes).sum();
        let held = Mutex::new(Held { bytes, since: 0 });
        Ok(Self { folder, limit_bytes, held, written: AtomicU64::new(0) })
    }

    /// An entry whose checksum holds. It is used now, so others go first.
    pub(crate) fn load(&self, key: Key, length: usize) -> Option<Bytes> {
        let path = self.path(key);
        let mut entry = fs::read(&path).ok()?;
        let contents = entry.get(HEADER_BYTES..)?;
        if contents.len() != length || entry[..HEADER_BYTES] != header(contents) {
            self.drop_entry(key);
            return None;
        }
        self.touch(key);
        Some(Bytes::from(entry.split_off(HEADER_BYTES)))
    }

    /// Some bytes of an entry, unchecked. Whether they are there.
    pub(crate) fn read_at(&self, key: Key, offset: u64, bytes: &mut [u8]) -> bool {
        let mut read =
            || File::open(self.path(key))?.read_exact_at(bytes, offset + HEADER_BYTES as u64);
        read().is_ok()
    }

    /// Marks an entry as used now. Whether it is there.
    pub(crate) fn touch(&self, key: Key) -> bool {
        let touch = || File::open(self.path(key))?.set_modified(SystemTime::now());
        touch().is_ok()
    }

    /// Removes an entry. Another process may have done so.
    pub(crate) fn drop_entry(&self, key: Key) {
        fs::remove_file(self.path(key)).ok();
    }

    /// Keeps a block, and makes room for it first. An entry larger than the limit is not kept.
    pub(crate) fn store(&self, key: Key, contents: &[u8]) -> io::Result<()> {
        let bytes = (HEADER_BYTES + contents.len()) as u64;
        if bytes > self.limit_bytes {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        self.make_room(bytes)?;
        let path = self.path(key);
        let number = self.written.fetch_add(1, Ordering::Relaxed);
        let folder = path.parent().expect("it is in the cache's folder");
        fs::create_dir_all(folder)?;
        // Where the limit counts it, should this process be killed meanwhile.
        let unfinished = folder.join(format!(".{}-{number}-{}", process::id(), key.block));
        let write = || {
            let mut file = File::create(&unfinished)?;
            file.write_all(&header(contents))?;
            file.write_all(contents)?;
            file.sync_data()?;
            fs::rename(&unfinished, &path)
        };
        let written = write();
        if written.is_err() {
            fs::remove_file(&unfinished).ok(); // It may not even have been made.
        }
        written
    }

    fn make_room(&self, bytes: u64) -> io::Result<()> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let part = self.limit_bytes / PART;
        if held.bytes + bytes > self.limit_bytes || held.since > part {
            let mut found = entries(&self.folder)?;
            found.sort_by_key(|entry| entry.used);
            let mut sum = found.iter().map(|entry| entry.bytes).sum::<u64>();
            if sum + bytes > self.limit_bytes {
                for entry in found {
                    if sum + bytes <= self.limit_bytes - part {
                        break;
                    }
                    fs::remove_file(entry.path).ok(); // Another process may have removed it.
                    sum -= entry.bytes;
                }
            }
            *held = Held { bytes: sum, since: 0 };
        }
        held.bytes += bytes;
        held.since += bytes;
        Ok(())
    }

    fn path(&self, Key { file, block }: Key) -> PathBuf {
        let digest = file.to_string();
        self.folder.join(&digest[..2]).join(format!("{digest}-{block}"))
    }
}

fn header(contents: &[u8]) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..8].copy_from_slice(MAGIC);
    header[8..12].copy_from_slice(&crc32c::crc32c(contents).to_le_bytes());
    let length = u32::try_from(contents.len()).unwrap_or(u32::MAX); // A hint: the file has its own.
    header[12..].copy_from_slice(&length.to_le_bytes());
    header
}

/// A file in the cache's folder, finished or not.
#[derive(Debug)]
struct Entry {
    used: SystemTime,
    bytes: u64,
    path: PathBuf,
}

/// All of them. What vanishes meanwhile is left out.
fn entries(folder: &Path) -> io::Result<Vec<Entry>> {
    let mut found = Vec::new();
    for part in fs::read_dir(folder)? {
        let Ok(files) = fs::read_dir(part?.path()) else { continue };
        for file in files.flatten() {
            let Ok(metadata) = file.metadata() else { continue };
            let used = metadata.modified()?;
            found.push(Entry { used, bytes: metadata.len(), path: file.path() });
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::{
        env,
        io::{BufRead as _, BufReader, stdout},
        process::{Command, Stdio},
    };

    use testing::Chance;

    use super::*;

    /// Makes the test of a killed process that process.
    const VICTIM: &str = "PERCHERON_TEST_VICTIM_CACHE";
    const VICTIM_BLOCKS: u64 = 8;
    const VICTIM_BYTES: usize = 256 << 10;

    fn settings(variables: &[(&str, &str)]) -> Result<Settings, SourceError> {
        let owned = |&(name, value): &(&str, &str)| (name.to_owned(), value.to_owned());
        Settings::from_variables(&variables.iter().map(owned).collect::<Vec<_>>())
    }

    fn key(block: u64) -> Key {
        Key { file: Sha256::of(b"a shard"), block }
    }

    #[test]
    fn the_environment_says_where_and_how_much() {
        let found = settings(&[(FOLDER, "kept"), (LIMIT, "0.5")]).unwrap();
        assert_eq!(found, Settings { folder: "kept".into(), limit_bytes: 1 << 29 });
        let found = settings(&[("HOME", "/home/a")]).unwrap();
        assert_eq!(found.folder, Path::new("/home/a/.cache/percheron/data"));
        assert_eq!(found.limit_bytes, 100 << 30);
        let found = settings(&[("HOME", "/home/a"), ("XDG_CACHE_HOME", "/c")]).unwrap();
        assert_eq!(found.folder, Path::new("/c/percheron/data"));
    }

    #[test]
    fn a_bad_variable_is_named() {
        for (name, value) in [(FOLDER, ""), (LIMIT, "much"), (LIMIT, "0"), (LIMIT, "-1")] {
            let error = settings(&[("HOME", "/home/a"), (name, value)]).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
        assert!(settings(&[]).unwrap_err().to_string().contains(FOLDER));
    }

    #[test]
    fn the_least_recently_used_make_room() {
        let folder = tempfile::tempdir().unwrap();
        let settings = Settings { folder: folder.path().into(), limit_bytes: 3 * 1016 + 200 };
        let cache = Cache::open(settings).unwrap();
        let used = |block, seconds| {
            let time = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
            File::open(cache.path(key(block))).unwrap().set_modified(time).unwrap();
        };
        for block in 0..3 {
            cache.store(key(block), &[block.to_le_bytes()[0]; 1000]).unwrap();
            used(block, block);
        }
        used(0, 9);
        cache.store(key(3), &[3; 1000]).unwrap();
        assert_eq!(cache.load(key(1), 1000), None);
        assert_eq!(cache.load(key(0), 1000).unwrap(), [0; 1000].as_slice());
        assert_eq!(cache.load(key(3), 1000).unwrap(), [3; 1000].as_slice());
        assert!(entries(folder.path()).unwrap().iter().map(|e| e.bytes).sum::<u64>() <= 3248);
        assert!(cache.store(key(4), &[0; 4000]).is_err());
    }

    fn victims_contents(block: u64) -> Vec<u8> {
        vec![block.to_le_bytes()[0] + 1; VICTIM_BYTES]
    }

    fn victims_cache(folder: &Path) -> Cache {
        Cache::open(Settings { folder: folder.into(), limit_bytes: 64 << 20 }).unwrap()
    }

    /// Keeps the same few blocks again and again, and says so each time.
    fn keep_until_killed(folder: &Path) -> ! {
        let cache = victims_cache(folder);
        for block in (0..VICTIM_BLOCKS).cycle() {
            writeln!(stdout(), "keeping {block}").unwrap();
            cache.store(key(block), &victims_contents(block)).unwrap();
        }
        unreachable!("there is always another block");
    }

    #[test]
    fn a_process_that_is_killed_while_it_writes_leaves_only_whole_entries() {
        if let Some(folder) = env::var_os(VICTIM) {
            keep_until_killed(Path::new(&folder));
        }
        let folder = tempfile::tempdir().unwrap();
        let name =
            "cache::tests::a_process_that_is_killed_while_it_writes_leaves_only_whole_entries";
        let mut chance = Chance::new(4);
        let mut served = 0;
        for round in 0..12 {
            let mut victim = Command::new(env::current_exe().unwrap())
                .args(["--exact", name, "--nocapture"])
                .env(VICTIM, folder.path())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let said = BufReader::new(victim.stdout.take().unwrap()).lines().map(Result::unwrap);
            let place = usize::try_from(chance.below(VICTIM_BLOCKS)).unwrap();
            said.filter(|line| line.contains("keeping")).nth(place).expect("it writes for ever");
            victim.kill().unwrap();
            victim.wait().unwrap();

            let cache = victims_cache(folder.path());
            for block in 0..VICTIM_BLOCKS {
                let is_there = cache.path(key(block)).exists();
                let found = cache.load(key(block), VICTIM_BYTES);
                assert_eq!(found.is_some(), is_there, "round {round}: block {block} is torn");
                assert!(found.is_none_or(|found| found == victims_contents(block)));
                served += u32::from(is_there);
            }
        }
        assert!(served > 0, "something was kept before the kills");
    }

    #[test]
    fn a_torn_or_rotten_entry_counts_as_none() {
        let folder = tempfile::tempdir().unwrap();
        let settings = Settings { folder: folder.path().into(), limit_bytes: 1 << 20 };
        let cache = Cache::open(settings).unwrap();
        cache.store(key(0), b"some bytes").unwrap();
        let whole = fs::read(cache.path(key(0))).unwrap();
        for cut in 0..whole.len() {
            fs::write(cache.path(key(0)), &whole[..cut]).unwrap();
            assert_eq!(cache.load(key(0), 10), None);
        }
        for place in 0..whole.len() {
            let mut rotten = whole.clone();
            rotten[place] ^= 1;
            fs::write(cache.path(key(0)), rotten).unwrap();
            assert_eq!(cache.load(key(0), 10), None);
        }
        fs::write(cache.path(key(0)), whole).unwrap();
        assert_eq!(cache.load(key(0), 10).unwrap(), b"some bytes".as_slice());
    }
}
