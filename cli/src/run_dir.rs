//! The folder of a run: what lies where, whether it is one, and who may use it.
//!
//! ```text
//! DIR/run.toml             the name of the run, and where its checkpoints and its log are if not here
//! DIR/token                what opens sessions, readable by its owner only
//! DIR/recipe.toml          the recipe, every key written out; its presence makes DIR a run
//! DIR/log                  the event log
//! DIR/checkpoints/…        the states kept
//! DIR/logs/*.log           what coordinator and workers write
//! DIR/coordinator.address  where the coordinator listens, while there is one; -1 and so on those that stand by
//! ```

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Read as _, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use cluster::RunId;
use recipe::Recipe;
use serde::{Deserialize, Serialize};

const RECIPE: &str = "recipe.toml";
const RUN: &str = "run.toml";
const TOKEN: &str = "token";
const LOGS: &str = "logs";
/// What a start that was cut short may leave; a folder with nothing else can be taken.
const LEFT_BY_A_START: [&str; 3] = [RUN, TOKEN, LOGS];

/// More coordinators than that would wait for nothing.
pub(crate) const STANDBYS_MAX: u32 = 8;

/// What coordinator `seat` of a run is called, in its folder.
pub(crate) fn coordinator_name(seat: u32) -> String {
    if seat == 0 { "coordinator".to_owned() } else { format!("coordinator-{seat}") }
}

/// A folder that is, or can become, the folder of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RunDir {
    root: PathBuf,
    location: String,
}

/// What is in such a folder.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Contents {
    /// Nothing, or it is not there at all.
    Nothing,
    /// A run of this recipe.
    Run(Box<Recipe>),
}

/// Keeps others from using the folder until it is dropped.
#[derive(Debug)]
pub(crate) struct Lock(
    #[expect(dead_code, reason = "the lock lasts as long as the file is open")] File,
);

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RunFile {
    run: RunId,
    /// Where the checkpoints are; in the folder itself if nothing is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    checkpoints: Option<String>,
    /// The store of the event log; in the folder itself if nothing is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    log: Option<String>,
}

impl RunDir {
    /// The folder at `path`, there or not.
    pub(crate) fn at(path: &Path) -> Result<Self> {
        let root = std::path::absolute(path)
            .with_context(|| format!("run directory {}", path.display()))?;
        let Some(location) = root.to_str().map(str::to_owned) else {
            bail!("run directory {}: its path is not UTF-8; choose another", root.display());
        };
        Ok(Self { root, location })
    }

    /// As a store: checkpoints are kept below it, unless the run began with another place for them.
    pub(crate) fn location(&self) -> &str {
        &self.location
    }

    pub(crate) fn recipe(&self) -> PathBuf {
        self.root.join(RECIPE)
    }

    pub(crate) fn token(&self) -> PathBuf {
        self.root.join(TOKEN)
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.root.join("log")
    }

    pub(crate) fn address(&self) -> PathBuf {
        self.address_of(0)
    }

    /// Where coordinator `seat` says where it listens.
    pub(crate) fn address_of(&self, seat: u32) -> PathBuf {
        self.root.join(format!("{}.address", coordinator_name(seat)))
    }

    /// The log of the process called `name`.
    pub(crate) fn process_log(&self, name: &str) -> PathBuf {
        self.root.join(LOGS).join(format!("{name}.log"))
    }

    /// What is there. Nothing is changed.
    pub(crate) fn contents(&self) -> Result<Contents> {
        let root = self.root.display();
        let entries = match fs::read_dir(&self.root) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Contents::Nothing),
            Err(error) => {
                return Err(error).with_context(|| format!("run directory {root} cannot be read"));
            }
        };
        if self.recipe().exists() {
            let path = self.recipe();
            let text = fs::read_to_string(&path)
                .with_context(|| format!("{} cannot be read", path.display()))?;
            let recipe = Recipe::from_toml(&path.display().to_string(), &text, &[])?;
            return Ok(Contents::Run(Box::new(recipe)));
        }
        for entry in entries {
            let name = entry.with_context(|| format!("run directory {root}"))?.file_name();
            if !LEFT_BY_A_START.iter().any(|ours| *ours == name) {
                bail!(
                    "run directory {root} holds no run (there is no {RECIPE} in it) but is not \
                     empty (it has {}): choose another --run-dir",
                    name.display()
                );
            }
        }
        Ok(Contents::Nothing)
    }

    /// The name of the run: as stored, or made of the folder's own name.
    pub(crate) fn run(&self) -> Result<RunId> {
        Ok(self.read_run_file()?.run)
    }

    /// The store of the run's checkpoints: the folder itself, or the location that the run began with.
    pub(crate) fn checkpoints(&self) -> Result<String> {
        Ok(self.read_run_file()?.checkpoints.unwrap_or_else(|| self.location.clone()))
    }

    /// The store of the event log, if the run began with one.
    pub(crate) fn shared_log(&self) -> Result<Option<String>> {
        Ok(self.read_run_file()?.log)
    }

    fn read_run_file(&self) -> Result<RunFile> {
        let path = self.root.join(RUN);
        match fs::read_to_string(&path) {
            Ok(text) => toml::from_str(&text)
                .with_context(|| format!("{}: restore it from a copy", path.display())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Ok(RunFile { run: run_id(&self.root), checkpoints: None, log: None })
            }
            Err(error) => Err(error).with_context(|| format!("{} cannot be read", path.display())),
        }
    }

    pub(crate) fn read_token(&self) -> Result<String> {
        let path = self.token();
        let token = fs::read_to_string(&path)
            .with_context(|| format!("token {} cannot be read", path.display()))?;
        Ok(token.trim().to_owned())
    }

    /// Where the coordinator listens, or listened last; with those that stand by, separated by commas.
    pub(crate) fn read_address(&self) -> Option<String> {
        let address = |seat| fs::read_to_string(self.address_of(seat)).ok();
        let addresses: Vec<_> = (0..=STANDBYS_MAX).filter_map(address).collect();
        Some(addresses.join(",")).filter(|addresses| !addresses.is_empty())
    }

    /// Makes the folder if it is not there, and takes it.
    pub(crate) fn lock(&self) -> Result<Lock> {
        let root = self.root.display();
        fs::create_dir_all(&self.root)
            .with_context(|| format!("run directory {root} cannot be made"))?;
        let folder = File::open(&self.root)
            .with_context(|| format!("run directory {root} cannot be read"))?;
        match folder.try_lock() {
            Ok(()) => Ok(Lock(folder)),
            Err(TryLockError::WouldBlock) => {
                bail!(
                    "run directory {root} is in use by another `percheron up`: wait until it has \
                     ended, or choose another --run-dir"
                )
            }
            Err(TryLockError::Error(error)) => {
                Err(error).with_context(|| format!("run directory {root} cannot be locked"))
            }
        }
    }

    /// Writes what makes the folder a run. A run that is there keeps its name, its token and the place of
    /// its checkpoints.
    pub(crate) fn write(
        &self,
        run: &RunId,
        recipe: &Recipe,
        checkpoints: Option<&str>,
        log: Option<&str>,
    ) -> Result<()> {
        let logs = self.root.join(LOGS);
        fs::create_dir_all(&logs).with_context(|| format!("{} cannot be made", logs.display()))?;
        let run_file = self.root.join(RUN);
        if !run_file.exists() {
            let text = toml::to_string(&RunFile {
                run: run.clone(),
                checkpoints: checkpoints.map(str::to_owned),
                log: log.map(str::to_owned),
            })
            .context("the name of the run cannot be written")?;
            write_atomically(&run_file, text.as_bytes(), 0o644)?;
        }
        if !self.token().exists() {
            let mut token = [0; 32];
            let mut chance =
                File::open("/dev/urandom").context("/dev/urandom cannot be opened for a token")?;
            chance.read_exact(&mut token).context("/dev/urandom cannot be read for a token")?;
            write_atomically(&self.token(), hex::encode(token).as_bytes(), 0o600)?;
        }
        write_atomically(&self.recipe(), recipe.to_toml().as_bytes(), 0o644) // Last: see above.
    }
}

impl std::fmt::Display for RunDir {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.location)
    }
}

/// The first free `runs/NAME-NNN`, made.
pub(crate) fn free_run_dir(recipe_name: &str) -> Result<RunDir> {
    let name = usable_name(recipe_name).unwrap_or_else(|| "run".to_owned());
    let runs = Path::new("runs");
    fs::create_dir_all(runs).context("folder runs cannot be made")?;
    for number in 1_u32.. {
        let path = runs.join(format!("{name}-{number:03}"));
        match fs::create_dir(&path) {
            Ok(()) => return RunDir::at(&path),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => {
                return Err(error)
                    .with_context(|| format!("run directory {} cannot be made", path.display()));
            }
        }
    }
    unreachable!("there are four billion numbers")
}

/// The run's name from its folder's.
fn run_id(folder: &Path) -> RunId {
    let name = folder.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let name = usable_name(name).unwrap_or_else(|| "run".to_owned());
    RunId::try_from(name).expect("only usable characters are left")
}

/// `name` with what cannot stand in a run's name replaced; nothing if nothing is left.
fn usable_name(name: &str) -> Option<String> {
    let usable = |c: char| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '-' };
    let name: String = name.to_ascii_lowercase().chars().map(usable).collect();
    let name: String = name.trim_start_matches(['-', '_', '.']).chars().take(60).collect();
    (!name.is_empty()).then_some(name)
}

/// Writes a file so that it is there as a whole or not at all.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let written = || -> io::Result<()> {
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".{}.new", std::process::id()));
        let new = PathBuf::from(name);
        let mut options = OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(mode).open(&new)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&new, path)
    };
    written().with_context(|| format!("{} cannot be written", path.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn recipe() -> Recipe {
        recipe::built_in("digits", &[]).unwrap()
    }

    #[test]
    fn a_run_is_found_again_as_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let dir = RunDir::at(&folder.path().join("My Run")).unwrap();
        assert_eq!(dir.contents().unwrap(), Contents::Nothing);
        let _lock = dir.lock().unwrap();
        let run = dir.run().unwrap();
        assert_eq!(run.as_str(), "my-run");
        dir.write(&run, &recipe(), None, None).unwrap();
        assert_eq!(dir.contents().unwrap(), Contents::Run(Box::new(recipe())));
        let token = dir.read_token().unwrap();
        assert_eq!(token.len(), 64);
        let mode = fs::metadata(dir.token()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);

        dir.write(&RunId::try_from("other".to_owned()).unwrap(), &recipe(), None, None).unwrap();
        assert_eq!(dir.run().unwrap(), run, "a run keeps its name");
        assert_eq!(dir.read_token().unwrap(), token, "and its token");
    }

    #[test]
    fn a_run_keeps_its_name_when_its_folder_is_moved() {
        let folder = tempfile::tempdir().unwrap();
        let dir = RunDir::at(&folder.path().join("before")).unwrap();
        let _lock = dir.lock().unwrap();
        dir.write(&dir.run().unwrap(), &recipe(), None, None).unwrap();
        fs::rename(folder.path().join("before"), folder.path().join("after")).unwrap();
        let moved = RunDir::at(&folder.path().join("after")).unwrap();
        assert_eq!(moved.run().unwrap().as_str(), "before");
    }

    #[test]
    fn a_folder_of_something_else_is_refused_by_what_is_in_it() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("thesis.tex"), "").unwrap();
        let refusal = RunDir::at(folder.path()).unwrap().contents().unwrap_err().to_string();
        assert!(refusal.contains("it has thesis.tex"), "{refusal}");
        assert!(refusal.contains("choose another --run-dir"), "{refusal}");
    }

    #[test]
    fn what_a_start_that_was_cut_short_left_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(RUN), "").unwrap();
        fs::create_dir(folder.path().join(LOGS)).unwrap();
        let dir = RunDir::at(folder.path()).unwrap();
        assert_eq!(dir.contents().unwrap(), Contents::Nothing);
    }

    #[test]
    fn two_cannot_use_one_folder() {
        let folder = tempfile::tempdir().unwrap();
        let dir = RunDir::at(folder.path()).unwrap();
        let first = dir.lock().unwrap();
        let refusal = dir.lock().unwrap_err().to_string();
        assert!(refusal.contains("in use by another `percheron up`"), "{refusal}");
        drop(first);
        dir.lock().unwrap();
    }

    #[test]
    fn any_folder_name_makes_a_run_name() {
        let named = |name: &str| run_id(Path::new(name)).to_string();
        assert_eq!(named("/tmp/r1"), "r1");
        assert_eq!(named("Größe 2"), "gr--e-2");
        assert_eq!(named("/"), "run");
        assert_eq!(named(".hidden"), "hidden");
        assert_eq!(named(&"x".repeat(99)).len(), 60);
    }
}
