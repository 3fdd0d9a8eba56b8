//! Where things lie: the checkout, the cache that outlives it, the build folder, libtorch.
//!
//! Under CI each run has a new clone, while the cache stays. There the build folder and libtorch
//! are taken from the cache, under paths that do not change, so that libtorch's bindings, minutes
//! of C++, are built once. `.ci/run` exports the same variables for its own first `cargo` call.

use std::env;
use std::ffi::OsString;
use std::path::{self, Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::setup::{LIBTORCH_FOLDER, tools_on_path};

/// The checkout and the folders that go with it. All paths are absolute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Workspace {
    /// The repository's root.
    pub(crate) root: PathBuf,
    /// What setup prepares, shared by all checkouts of this user.
    pub(crate) cache: PathBuf,
    /// Cargo's target folder.
    pub(crate) target: PathBuf,
    /// What the build is told as `LIBTORCH`.
    pub(crate) libtorch: PathBuf,
    /// Whether this is a run of `.ci/run`, or like one.
    pub(crate) ci: bool,
}

impl Workspace {
    /// Reads the environment that `cargo xtask` runs in.
    pub(crate) fn find() -> Result<Self> {
        let manifest = env::var_os("CARGO_MANIFEST_DIR")
            .context("CARGO_MANIFEST_DIR is not set: start this as `cargo xtask`")?;
        let root = Path::new(&manifest).parent().context("xtask has no parent folder")?;
        Self::from_variables(root, |name| env::var_os(name))
    }

    fn from_variables(root: &Path, variable: impl Fn(&str) -> Option<OsString>) -> Result<Self> {
        let set = |name: &str| variable(name).filter(|value| !value.is_empty());
        let folder = |name: &str| set(name).map(path::absolute).transpose();

        let cache = if let Some(cache) = folder("PERCHERON_CACHE")? {
            cache
        } else if let Some(caches) = folder("XDG_CACHE_HOME")? {
            caches.join("percheron")
        } else if let Some(home) = folder("HOME")? {
            home.join(".cache/percheron")
        } else {
            bail!("no place for the cache: set PERCHERON_CACHE to a folder");
        };
        let ci = set("CI").is_some_and(|value| value != "false" && value != "0");

        let target = match folder("CARGO_TARGET_DIR")? {
            Some(target) => target,
            None if ci => cache.join("target-ci"),
            None => root.join("target"),
        };
        // Cargo hands its own configuration's LIBTORCH down to us, so only another one is a wish.
        let link = root.join(".libtorch");
        let libtorch = match folder("LIBTORCH")?.filter(|libtorch| *libtorch != link) {
            Some(libtorch) => libtorch,
            None if ci => cache.join(LIBTORCH_FOLDER),
            None => link,
        };
        Ok(Self { root: root.to_path_buf(), cache, target, libtorch, ci })
    }

    /// `cargo` with the words of `subcommand`, in the root, with everything it needs to build and
    /// run what links libtorch.
    pub(crate) fn cargo(&self, subcommand: &[&str]) -> Command {
        let mut cargo = self.command("cargo");
        cargo.args(subcommand);
        if self.ci && subcommand != ["fmt"] {
            cargo.arg("--locked");
        }
        cargo
    }

    /// One of this workspace's release binaries.
    pub(crate) fn binary(&self, name: &str) -> Command {
        self.command(self.target.join("release").join(name))
    }

    /// A program in the root, free of what `cargo run` told xtask about xtask itself.
    pub(crate) fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        command.current_dir(&self.root);
        for (name, _) in env::vars_os() {
            if name.to_str().is_some_and(is_about_xtask) {
                command.env_remove(name);
            }
        }
        command.env("CARGO_TARGET_DIR", &self.target);
        command.env("LIBTORCH", &self.libtorch);
        // Binaries look for .libtorch beside target/; a target folder elsewhere, and doctests, do not.
        command.env("LD_LIBRARY_PATH", prepended([self.libtorch.join("lib")], "LD_LIBRARY_PATH"));
        command.env("PATH", prepended(tools_on_path(&self.cache), "PATH"));
        command
    }
}

fn is_about_xtask(variable: &str) -> bool {
    ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_"]
        .iter()
        .any(|prefix| variable.starts_with(prefix))
}

fn prepended(first: impl IntoIterator<Item = PathBuf>, variable: &str) -> OsString {
    let rest = env::var_os(variable).unwrap_or_default();
    let rest = env::split_paths(&rest).filter(|folder| !folder.as_os_str().is_empty());
    env::join_paths(first.into_iter().chain(rest)).unwrap_or_else(|_| {
        // Only a folder with a colon in its name gets here; the loader could not use it either.
        env::var_os(variable).unwrap_or_default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workspace(variables: &[(&str, &str)]) -> Workspace {
        let variable = |name: &str| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.into())
        };
        Workspace::from_variables(Path::new("/checkout"), variable).unwrap()
    }

    #[test]
    fn by_default_everything_but_libtorch_lies_in_the_checkout() {
        let workspace = workspace(&[("HOME", "/me"), ("LIBTORCH", "/checkout/.libtorch")]);
        assert_eq!(workspace.cache, Path::new("/me/.cache/percheron"));
        assert_eq!(workspace.target, Path::new("/checkout/target"));
        assert_eq!(workspace.libtorch, Path::new("/checkout/.libtorch"));
        assert!(!workspace.ci);
    }

    #[test]
    fn under_ci_the_build_does_not_move_with_the_clone() {
        let variables = [("HOME", "/me"), ("CI", "true"), ("LIBTORCH", "/checkout/.libtorch")];
        let workspace = workspace(&variables);
        assert_eq!(workspace.target, Path::new("/me/.cache/percheron/target-ci"));
        assert_eq!(workspace.libtorch, Path::new("/me/.cache/percheron/libtorch-2.11.0"));
        assert!(workspace.ci);
    }

    #[test]
    fn explicit_folders_win_over_those_of_ci() {
        let workspace = workspace(&[
            ("PERCHERON_CACHE", "/cache"),
            ("XDG_CACHE_HOME", "/xdg"),
            ("CI", "true"),
            ("CARGO_TARGET_DIR", "/build"),
            ("LIBTORCH", "/torch"),
        ]);
        assert_eq!(workspace.cache, Path::new("/cache"));
        assert_eq!(workspace.target, Path::new("/build"));
        assert_eq!(workspace.libtorch, Path::new("/torch"));
    }

    #[test]
    fn an_empty_variable_counts_as_unset() {
        let workspace =
            workspace(&[("XDG_CACHE_HOME", "/xdg"), ("PERCHERON_CACHE", ""), ("CI", "")]);
        assert_eq!(workspace.cache, Path::new("/xdg/percheron"));
        assert!(!workspace.ci);
    }

    #[test]
    fn without_a_home_the_message_says_what_to_set() {
        let error = Workspace::from_variables(Path::new("/checkout"), |_| None).unwrap_err();
        assert!(error.to_string().contains("PERCHERON_CACHE"), "{error}");
    }

    #[test]
    fn a_program_inherits_nothing_about_xtask() {
        assert!(is_about_xtask("CARGO_PKG_NAME"));
        assert!(is_about_xtask("CARGO_MANIFEST_DIR"));
        assert!(!is_about_xtask("CARGO_TARGET_DIR"));
        assert!(!is_about_xtask("CARGO_HOME"));
    }

    #[test]
    fn cargo_keeps_the_lock_file_under_ci() {
        let arguments = |variables: &[(&str, &str)], subcommand: &[&str]| -> Vec<String> {
            let cargo = workspace(variables).cargo(subcommand);
            cargo.get_args().map(|argument| argument.to_string_lossy().into_owned()).collect()
        };
        let ci = [("HOME", "/me"), ("CI", "true")];
        assert_eq!(arguments(&ci, &["nextest", "run"]), ["nextest", "run", "--locked"]);
        assert_eq!(arguments(&ci, &["fmt"]), ["fmt"]);
        assert_eq!(arguments(&ci[..1], &["build"]), ["build"]);
    }
}
