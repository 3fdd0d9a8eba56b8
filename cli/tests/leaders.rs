//! Several coordinators of one run, whose log they share: real processes are killed, and stopped until
//! another leads. The run ends with the bits of the undisturbed one, and who was replaced wrote nothing.
#![expect(clippy::unwrap_used, reason = "a test: what cannot be unwrapped fails it")]

use std::{
    fs,
    io::{BufRead as _, BufReader},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc::{Receiver, channel},
    time::Duration,
};

use cluster::{Record, Term};
use nix::{sys::signal::Signal, unistd::Pid};
use testing::{Breakage, Proxy, Rule, S3Server};

use crate::short_run::{summary, text};

mod short_run;

/// Enough for a second leader to take over before the end.
const STEPS: &str = "max_steps=90";
/// How long a process may take to say what it is waited for.
const PATIENCE: Duration = Duration::from_secs(100);

/// A process, and the lines that it has written to its standard error.
struct Process {
    child: Child,
    lines: Receiver<String>,
    said: Vec<String>,
}

impl Process {
    fn start(mut command: Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (sender, lines) = channel();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        std::thread::spawn(move || {
            for line in stderr.lines() {
                // A test that has failed listens no more.
                let Ok(()) = sender.send(line.unwrap()) else { return };
            }
        });
        Self { child, lines, said: Vec::new() }
    }

    /// Waits until it says something new that contains `words`.
    fn says(&mut self, words: &str) {
        loop {
            let Ok(line) = self.lines.recv_timeout(PATIENCE) else {
                panic!("it does not say {words:?}: {:#?}", self.said)
            };
            self.said.push(line);
            if self.said.last().unwrap().contains(words) {
                return;
            }
        }
    }

    fn signal(&self, signal: Signal) {
        nix::sys::signal::kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
    }

    /// Waits for its end; returns how, and its last line.
    fn ends(&mut self) -> (ExitStatus, String) {
        while let Ok(line) = self.lines.recv_timeout(PATIENCE) {
            self.said.push(line); // Until it has closed its end.
        }
        let status = self.child.wait().unwrap();
        (status, self.said.last().cloned().unwrap_or_default())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.child.kill().ok(); // It may have ended.
        self.child.wait().ok();
    }
}

/// A run whose log is at a location, in a folder of its own.
struct Run {
    dir: PathBuf,
    log: String,
    variables: Vec<(String, String)>,
    addresses: Vec<String>,
}

impl Run {
    /// Writes what makes `dir` a run, for two coordinators.
    fn new(dir: PathBuf, log: String, variables: Vec<(String, String)>) -> Self {
        let mut show = Command::new(env!("CARGO_BIN_EXE_percheron"));
        show.args(["recipe", "show", "digits"]);
        short_run::set(&mut show);
        let recipe = show.args(["--set", STEPS]).output().unwrap();
        assert!(recipe.status.success(), "{}", text(&recipe.stderr));
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("recipe.toml"), recipe.stdout).unwrap();
        fs::write(dir.join("token"), "open sesame").unwrap();
        fs::write(dir.join("run.toml"), format!("run = \"led\"\nlog = {log:?}\n")).unwrap();
        let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let addresses = listeners.map(|at| at.local_addr().unwrap().to_string()).into();
        Self { dir, log, variables, addresses }
    }

    fn command(&self, program: &str) -> Command {
        let beside = Path::new(env!("CARGO_BIN_EXE_percheron")).with_file_name(program);
        let mut command = Command::new(beside);
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        command
    }

    /// A coordinator that leads, or stands by.
    fn coordinator(&self, number: usize) -> Process {
        let mut command = self.command("percheron");
        command.args(["coordinator", "--exit-with-stdin", "--workers", "2", "--standby"]);
        command.args(["--log", &self.log, "--listen", &self.addresses[number]]);
        command.arg("--recipe").arg(self.dir.join("recipe.toml")).arg("--run-dir").arg(&self.dir);
        Process::start(command)
    }

    /// One that leads, one that stands by, and two workers that know both.
    fn start(&self) -> (Process, Process, [Process; 2]) {
        let mut first = self.coordinator(0);
        first.says("coordinating");
        let mut second = self.coordinator(1);
        second.says("another coordinator leads");
        let workers = ["worker-0", "worker-1"].map(|name| {
            let mut worker = self.command("percheron-worker");
            let addresses = self.addresses.iter().map(|address| format!("http://{address}"));
            let addresses = addresses.collect::<Vec<_>>().join(",");
            worker.args(["--coordinator", &addresses, "--run", "led", "--name", name]);
            worker.arg("--exit-with-stdin").arg("--token-file").arg(self.dir.join("token"));
            Process::start(worker)
        });
        (first, second, workers)
    }

    /// Waits for the end of the run, which `leader` leads; returns its state.
    fn state_at_the_end(&self, leader: &mut Process, workers: [Process; 2]) -> String {
        let (status, _) = leader.ends();
        assert!(status.success(), "{:#?}", leader.said);
        for mut worker in workers {
            let (status, last) = worker.ends();
            assert!(status.success(), "{last}");
        }
        let mut audit = self.command("percheron");
        let output = audit.arg("audit").arg(&self.dir).output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        match self.records().pop() {
            Some(Record::RunFinished { state_sha256, .. }) => state_sha256,
            last => panic!("{last:?}"),
        }
    }

    fn records(&self) -> Vec<Record> {
        let mut show = self.command("percheron");
        let output = show.arg("log").arg(&self.dir).arg("--json").output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        let record = |line: &str| {
            let mut line: serde_json::Value = serde_json::from_str(line).unwrap();
            serde_json::from_value(line["record"].take()).unwrap()
        };
        text(&output.stdout).lines().map(record).collect()
    }
}

fn terms(records: &[Record]) -> Vec<Term> {
    let term = |record: &Record| {
        if let Record::TermStarted { term } = record { Some(*term) } else { None }
    };
    records.iter().filter_map(term).collect()
}

/// The state after the steps in one worker that nobody disturbs.
fn undisturbed(folder: &Path) -> String {
    let mut up = short_run::command(&folder.join("undisturbed"), 1);
    let output = up.args(["--set", STEPS]).output().unwrap();
    summary(&output, "undisturbed")["state_sha256"].as_str().unwrap().to_owned()
}

/// The term of each object of the log, in order, as its first line says.
fn written_by(log: &Path) -> Vec<u64> {
    let mut files: Vec<_> = fs::read_dir(log.join("log/entries"))
        .unwrap()
        .map(|file| file.unwrap().path())
        .filter(|path| path.file_name().unwrap().to_str().unwrap().parse::<u64>().is_ok())
        .collect();
    files.sort();
    let term = |file: &PathBuf| {
        let text = fs::read_to_string(file).unwrap();
        let header: serde_json::Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        header["term"].as_u64().unwrap()
    };
    files.iter().map(term).collect()
}

#[test]
fn a_leader_is_killed_and_who_stands_by_ends_the_run_with_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log").display().to_string();
    let run = Run::new(folder.path().join("run"), log, Vec::new());
    let (mut first, mut second, workers) = run.start();
    first.says("checkpoint committed");
    first.signal(Signal::SIGKILL);
    second.says("coordinating");
    let state = run.state_at_the_end(&mut second, workers);
    assert_eq!(state, undisturbed(folder.path()));
    assert_eq!(terms(&run.records()), [Term(1), Term(2)]);
}

#[test]
fn a_leader_that_slept_while_another_led_ends_with_one_line_and_writes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    let run = Run::new(folder.path().join("run"), log.display().to_string(), Vec::new());
    let (mut first, mut second, workers) = run.start();
    first.says("checkpoint committed");
    first.signal(Signal::SIGSTOP);
    second.says("coordinating");
    second.says("checkpoint committed");
    first.signal(Signal::SIGCONT);
    let (status, last) = first.ends();
    assert_eq!(status.code(), Some(1), "{:#?}", first.said);
    let words = "error: another coordinator has taken the lead (term 2): this one has been replaced and ends";
    assert_eq!(last, words, "{:#?}", first.said);
    let state = run.state_at_the_end(&mut second, workers);
    assert_eq!(state, undisturbed(folder.path()));
    assert_eq!(terms(&run.records()), [Term(1), Term(2)]);
    let writers = written_by(&log);
    assert!(writers.is_sorted() && writers.last() == Some(&2), "{writers:?}");
}

/// The process of `up` whose address is written into this file.
fn coordinator_of(address_file: &Path) -> Pid {
    let file = address_file.to_str().unwrap();
    let has_it = |pid: &i32| {
        let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        words.split(|&byte| byte == 0).any(|word| word == file.as_bytes())
    };
    let entries = fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().file_name());
    let pids = entries.filter_map(|name| name.to_str()?.parse().ok());
    Pid::from_raw(pids.into_iter().find(has_it).expect("the coordinator is there"))
}

#[test]
fn up_starts_who_stands_by_and_the_run_outlives_a_leader_that_hangs() {
    let folder = tempfile::tempdir().unwrap();
    let run_dir = folder.path().join("run");
    let log = folder.path().join("log").display().to_string();
    let mut up = short_run::command(&run_dir, 2);
    let refused = up.args(["--set", STEPS, "--standbys", "1"]).output().unwrap();
    assert!(text(&refused.stderr).contains("say --log LOCATION"), "{}", text(&refused.stderr));
    assert!(!run_dir.exists(), "nothing is begun");

    let mut up = up.args(["--log", &log]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let up = up.as_mut().unwrap();
    let mut lines = BufReader::new(up.stderr.take().unwrap()).lines().map(Result::unwrap);
    lines.find(|line| line.contains("checkpoint kept")).expect("it keeps step 3");
    let reading = std::thread::spawn(move || lines.count());
    let leads = |name: &&str| {
        let said = fs::read_to_string(run_dir.join(format!("logs/{name}.log"))).unwrap();
        said.contains("coordinating")
    };
    let leader = ["coordinator", "coordinator-1"].into_iter().find(leads).expect("one leads");
    let pid = coordinator_of(&run_dir.join(format!("{leader}.address")));
    nix::sys::signal::kill(pid, Signal::SIGSTOP).unwrap();
    let mut said = String::new();
    std::io::Read::read_to_string(&mut up.stdout.take().unwrap(), &mut said).unwrap();
    assert!(up.wait().unwrap().success(), "{said}");
    reading.join().unwrap();
    let ended: serde_json::Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
    assert_eq!(ended["state_sha256"], undisturbed(folder.path()));
    assert!(["coordinator", "coordinator-1"].iter().all(leads), "both have led");
    let mut audit = Command::new(env!("CARGO_BIN_EXE_percheron"));
    let output = audit.arg("audit").arg(&run_dir).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_in_s3_is_taken_over_while_its_store_fails() {
    let server = S3Server::start().await;
    let proxy = Proxy::before(server.port()).await;
    let mut variables = server.variables();
    variables.push(("AWS_ENDPOINT_URL".to_owned(), format!("http://127.0.0.1:{}", proxy.port())));
    let folder = tempfile::tempdir().unwrap();
    let run = Run::new(folder.path().join("run"), server.location("runs/led"), variables);
    let (mut first, mut second, workers) = run.start();
    let breakages = [Breakage::ResetBefore, Breakage::ResetAfter, Breakage::SlowDownAfter];
    for breakage in breakages {
        proxy.add(Rule { method: "PUT", path: "/log/entries/", breakage, times: 3 });
        proxy.add(Rule { method: "PUT", path: "/lease/", breakage, times: 1 });
    }
    first.says("checkpoint committed");
    first.signal(Signal::SIGKILL);
    second.says("coordinating");
    for breakage in breakages {
        proxy.add(Rule { method: "PUT", path: "/log/entries/", breakage, times: 2 });
    }
    let state = run.state_at_the_end(&mut second, workers);
    assert_eq!(proxy.left(), 0, "everything that was to break has broken");
    assert_eq!(state, undisturbed(folder.path()));
}
