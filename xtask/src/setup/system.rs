//! What comes from the system's package manager: compilers and Python.

use std::env;
use std::fs;
use std::io::{self, IsTerminal};
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::process;

/// A program that the build calls, and the package that has it.
#[derive(Debug)]
pub(super) struct Tool {
    program: &'static str,
    /// Names another program to use in its place, as the build does.
    variable: Option<&'static str>,
    apt: &'static str,
    dnf: &'static str,
}

/// For libtorch's shim (a C++ compiler) and libjpeg-turbo (all of them).
pub(super) const BUILD_TOOLS: [Tool; 4] = [
    Tool { program: "c++", variable: Some("CXX"), apt: "g++", dnf: "gcc-c++" },
    Tool { program: "make", variable: None, apt: "make", dnf: "make" },
    Tool { program: "cmake", variable: None, apt: "cmake", dnf: "cmake" },
    Tool { program: "nasm", variable: None, apt: "nasm", dnf: "nasm" },
];

const PYTHON: [Tool; 1] =
    [Tool { program: "python3", variable: None, apt: "python3", dnf: "python3" }];

/// Counts instructions.
pub(super) const VALGRIND: [Tool; 1] =
    [Tool { program: "valgrind", variable: None, apt: "valgrind", dnf: "valgrind" }];

/// A cluster manager whose nodes can all be on one machine.
pub(super) const SLURM: [Tool; 3] = [
    Tool { program: "slurmctld", variable: None, apt: "slurm-wlm", dnf: "slurm-slurmctld" },
    Tool { program: "slurmd", variable: None, apt: "slurm-wlm", dnf: "slurm-slurmd" },
    Tool { program: "munged", variable: None, apt: "munge", dnf: "munge" },
];

/// Beside the programs of a Kubernetes control plane.
pub(super) const ETCD: [Tool; 2] = [
    Tool { program: "etcd", variable: None, apt: "etcd-server", dnf: "etcd" },
    Tool { program: "openssl", variable: None, apt: "openssl", dnf: "openssl" },
];

/// Installs those of `tools` that are not on the search path.
pub(super) fn install_missing(tools: &[Tool]) -> Result<()> {
    let missing: Vec<&Tool> = tools.iter().filter(|tool| !tool.is_there()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let programs: Vec<&str> = missing.iter().map(|tool| tool.program).collect();
    let manager = Manager::find().with_context(|| {
        format!("install these programs, then try again: {}", programs.join(", "))
    })?;
    println!("setup: {} not found: installing", programs.join(", "));
    manager.install(&missing.iter().map(|tool| manager.package(tool)).collect::<Vec<_>>())
}

/// Sees to it that `python3 -m pip` works.
pub(super) fn install_pip() -> Result<()> {
    install_missing(&PYTHON)?;
    let pip_answers = || process::answers(Command::new("python3").args(["-m", "pip", "--version"]));
    if pip_answers() {
        return Ok(());
    }
    let manager =
        Manager::find().context("install pip for python3, then try again (python3 -m pip)")?;
    println!("setup: python3 has no pip: installing");
    manager.install(&["python3-pip"])?;
    if !pip_answers() {
        bail!("`python3 -m pip` still does not work: install pip for the python3 on your PATH");
    }
    Ok(())
}

impl Tool {
    fn is_there(&self) -> bool {
        let named = self.variable.and_then(env::var_os).filter(|name| !name.is_empty());
        process::find_program(named.as_deref().unwrap_or(self.program.as_ref())).is_some()
    }
}

/// A package manager that we know how to call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Manager {
    Apt,
    Dnf,
}

/// How we become allowed to install.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rights {
    Root,
    /// Sudo, which may ask for a password only where somebody can answer.
    Sudo {
        asks: bool,
    },
    None,
}

impl Manager {
    fn find() -> Option<Self> {
        let known = [("apt-get", Self::Apt), ("dnf", Self::Dnf)];
        known.into_iter().find_map(|(program, manager)| {
            process::find_program(program).is_some().then_some(manager)
        })
    }

    fn package(self, tool: &Tool) -> &'static str {
        match self {
            Self::Apt => tool.apt,
            Self::Dnf => tool.dnf,
        }
    }

    fn install(self, packages: &[&str]) -> Result<()> {
        let rights = Rights::of_this_process();
        let commands = self.commands(packages);
        if rights == Rights::None {
            let lines: Vec<String> = commands.iter().map(|words| words.join(" ")).collect();
            bail!("neither root nor sudo: have this run as root: {}", lines.join(" && "));
        }
        for words in commands {
            let words = rights.prefixed(words);
            let (program, arguments) = words.split_first().expect("a command has a first word");
            process::run(Command::new(program).args(arguments))?;
        }
        Ok(())
    }

    /// What to run, one list of words a command.
    fn commands(self, packages: &[&str]) -> Vec<Vec<String>> {
        let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let mut commands = match self {
            // A fresh machine has no list of packages, or an old one.
            Self::Apt => vec![
                words("apt-get update"),
                words(
                    "env DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends",
                ),
            ],
            Self::Dnf => vec![words("dnf install --assumeyes")],
        };
        let install = commands.last_mut().expect("each manager has a command");
        install.extend(packages.iter().map(|&package| package.to_owned()));
        commands
    }
}

impl Rights {
    fn of_this_process() -> Self {
        if fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0) {
            Self::Root
        } else if process::find_program("sudo").is_some() {
            Self::Sudo { asks: io::stdin().is_terminal() }
        } else {
            Self::None
        }
    }

    fn prefixed(self, command: Vec<String>) -> Vec<String> {
        let prefix: &[&str] = match self {
            Self::Root | Self::None => &[],
            Self::Sudo { asks: true } => &["sudo"],
            Self::Sudo { asks: false } => &["sudo", "-n"],
        };
        prefix.iter().map(|&word| word.to_owned()).chain(command).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn apt_fetches_its_lists_before_it_installs() {
        let commands = Manager::Apt.commands(&["cmake", "nasm"]);
        assert_eq!(commands[0], ["apt-get", "update"]);
        assert_eq!(commands[1].last().unwrap(), "nasm");
        assert!(commands[1].contains(&"--yes".to_owned()));
    }

    #[test]
    fn each_manager_has_its_own_name_for_the_compiler() {
        let [compiler, ..] = &BUILD_TOOLS;
        assert_eq!(Manager::Apt.package(compiler), "g++");
        assert_eq!(Manager::Dnf.package(compiler), "gcc-c++");
    }

    #[test]
    fn sudo_asks_for_a_password_only_at_a_terminal() {
        let command = || vec!["dnf".to_owned()];
        assert_eq!(Rights::Root.prefixed(command()), ["dnf"]);
        assert_eq!(Rights::Sudo { asks: true }.prefixed(command()), ["sudo", "dnf"]);
        assert_eq!(Rights::Sudo { asks: false }.prefixed(command()), ["sudo", "-n", "dnf"]);
    }

    #[test]
    fn what_is_there_is_not_installed_again() {
        let shell = Tool { program: "sh", variable: None, apt: "no-such", dnf: "no-such" };
        install_missing(&[shell]).unwrap();
    }
}
