//! Starting the coordinator and the workers, and laying hands on them.

use std::{path::PathBuf, time::Duration};

use nix::sys::signal::Signal;
use tokio::process::Command;

use super::*;
use crate::{
    command::coordinator::host_name,
    up::{
        process::{Process, spawn},
        rules::CoordinatorRules,
    },
};

/// How long a coordinator may take until it listens.
const START_MAX: Duration = Duration::from_secs(30);
/// Its address comes as a file, which is looked for so often.
const ADDRESS_INTERVAL: Duration = Duration::from_millis(10);

/// A place for a coordinator, which stays at its address.
#[derive(Debug, Default)]
pub(super) struct Seat {
    pub(super) coordinator: Option<Coordinator>,
    pub(super) rules: CoordinatorRules,
    address: Option<String>,
}

/// A coordinator's process.
#[derive(Debug)]
pub(super) struct Coordinator {
    process: Process,
    /// Whether it was killed on request.
    pub(super) staged: bool,
    address_watch: JoinHandle<()>,
}

/// The process of a worker.
#[derive(Debug)]
pub(super) struct Worker {
    process: Process,
    /// Whether it hangs on request.
    pub(super) stopped: bool,
    /// Whether it was killed on request.
    pub(super) staged: bool,
}

impl Coordinator {
    pub(super) fn kill(&mut self) {
        self.staged = true;
        self.process.signal(Signal::SIGKILL);
    }

    pub(super) fn ask_to_end(&self) {
        self.process.close_input();
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        self.address_watch.abort();
    }
}

impl Worker {
    pub(super) fn kill(&mut self) {
        self.staged = true;
        self.process.signal(Signal::SIGKILL);
    }

    pub(super) fn stop(&mut self) {
        self.stopped = true;
        self.process.signal(Signal::SIGSTOP);
    }

    /// One that hangs cannot be asked.
    pub(super) fn ask_to_end(&mut self) {
        if self.stopped { self.kill() } else { self.process.close_input() }
    }
}

impl Supervisor {
    pub(super) fn seat(&mut self, number: u32) -> &mut Seat {
        &mut self.seats[number as usize]
    }

    /// The seat of the coordinator that was heard of last, if its process is there.
    pub(super) fn leader(&self) -> Option<u32> {
        let number = self.client.as_ref().map_or(0, Client::leader);
        self.seats[number]
            .coordinator
            .as_ref()
            .map(|_| u32::try_from(number).expect("they are few"))
    }

    /// Starts a coordinator: at a free port, or where it was before.
    pub(super) fn start_coordinator(&mut self, number: u32) -> Result<()> {
        let file = self.dir.address_of(number);
        match std::fs::remove_file(&file) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                let what = format!("{} cannot be removed", file.display());
                return Err(anyhow!(error).context(what));
            }
            Ok(()) | Err(_) => {}
        }
        let this = std::env::current_exe().context("this program cannot tell where it lies")?;
        let mut command = Command::new(this);
        command
            .arg("coordinator")
            .args(["--workers", &self.plan.workers_expected.to_string()])
            .args(["--listen", self.seat(number).address.as_deref().unwrap_or("127.0.0.1:0")])
            .arg("--recipe")
            .arg(self.dir.recipe())
            .arg("--run-dir")
            .arg(self.dir.location())
            .arg("--addr-file")
            .arg(&file)
            .arg("--exit-with-stdin")
            // There is one at a time in a seat: each need not wait for the lease of the one before.
            .args([
                "--holder",
                &format!("{} {} of {}", host_name(), coordinator_name(number), self.dir),
            ]);
        if self.seats.len() > 1 {
            command.arg("--standby");
        }
        let log = self.dir.process_log(&coordinator_name(number));
        let ended = move |end| Happening::CoordinatorEnded(number, end);
        let process = spawn(command, &log, self.happenings.clone(), ended)?;
        let happenings = self.happenings.clone();
        let address_watch = tokio::spawn(wait_for_address(number, file, log, happenings));
        self.seat(number).coordinator = Some(Coordinator { process, staged: false, address_watch });
        Ok(())
    }

    /// A coordinator has its address: when all have theirs for the first time, all the rest is started.
    pub(super) fn serving(&mut self, number: u32, address: String) -> Result<()> {
        self.seat(number).address = Some(address);
        if self.client.is_some() || self.seats.iter().any(|seat| seat.address.is_none()) {
            return Ok(());
        }
        let addresses = self.addresses("");
        let client = Client::new(&addresses, self.plan.run.clone(), &self.token)?;
        let (last, happenings) = (self.report.last(), self.happenings.clone());
        self.tasks.push(tokio::spawn(watch::follow(
            client.clone(),
            last,
            happenings,
            Happening::News,
        )));
        self.client = Some(client);
        self.report_former_workers();
        let resized = self.report.ledger().workers_wanted;
        for _ in 0..resized.unwrap_or(self.plan.workers_expected) {
            self.start_worker()?;
        }
        Ok(())
    }

    /// The workers of an `up` before this one ended with it. It holds the folder no more, so they are
    /// gone, and nobody needs to wait until their leases are out.
    fn report_former_workers(&mut self) {
        let ledger = self.report.ledger();
        let members = ledger.members.iter().chain(&ledger.intact_members);
        let former: std::collections::BTreeSet<_> = members.map(|member| member.worker).collect();
        let left: Vec<_> = former.into_iter().filter(|id| !ledger.lost.contains(id)).collect();
        for worker in left {
            self.report_exit(worker, "it ended with the `percheron up` before this one".to_owned());
        }
    }

    /// Where coordinators listen, each with a word before it, separated by commas.
    fn addresses(&self, before: &str) -> String {
        let addresses = self.seats.iter().filter_map(|seat| seat.address.as_deref());
        addresses.map(|address| format!("{before}{address}")).collect::<Vec<_>>().join(",")
    }

    /// Starts a worker under the next number.
    pub(super) fn start_worker(&mut self) -> Result<u32> {
        let number = self.workers_next;
        let name = format!("worker-{number}");
        let mut command = Command::new(&self.worker_program);
        command
            .args(["--coordinator", &self.addresses("http://")])
            .args(["--run", self.plan.run.as_str()])
            .arg("--token-file")
            .arg(self.dir.token())
            .args(["--name", &name])
            .arg("--exit-with-stdin");
        self.means.apply(number, &mut command);
        let log = self.dir.process_log(&name);
        let process = spawn(command, &log, self.happenings.clone(), move |end| {
            Happening::WorkerEnded(number, end)
        })?;
        self.workers.insert(number, Worker { process, stopped: false, staged: false });
        self.workers_next += 1;
        Ok(number)
    }
}

/// The file appears in one piece, so what is in it is complete.
async fn wait_for_address(
    number: u32,
    file: PathBuf,
    log: PathBuf,
    happenings: mpsc::Sender<Happening>,
) {
    let look = async {
        loop {
            if let Ok(address) = std::fs::read_to_string(&file) {
                return address;
            }
            tokio::time::sleep(ADDRESS_INTERVAL).await;
        }
    };
    let happening = match tokio::time::timeout(START_MAX, look).await {
        Ok(address) => Happening::Serving(number, address),
        Err(_) => {
            let (seconds, log) = (START_MAX.as_secs(), log.display());
            let error = anyhow!("the coordinator did not listen within {seconds} s; see {log}");
            Happening::News(News::Lost(error))
        }
    };
    happenings.send(happening).await.ok(); // The run may have been given up meanwhile.
}
