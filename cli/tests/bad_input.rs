//! Input that cannot work: one line that names the place, a non-zero exit, and nothing is changed.
#![expect(clippy::unwrap_used, reason = "helpers of tests are tests too")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use bytes::Bytes;
use checkpoint::{Layout, Manifest, Section, Store, commit, part_name, save_part};
use cluster::{Epoch, Generation, Record, RunId, Step, Term, Timestamp};
use coordinator::EventLog;
use shards::{
    PackOptions,
    jpeg::{self, Pixels},
    pack,
};
use tempfile::TempDir;

/// A folder to work in, and the program.
struct Bench {
    folder: TempDir,
}

/// Every file below a folder, with its bytes.
type Snapshot = BTreeMap<PathBuf, Vec<u8>>;

impl Bench {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn write(&self, name: &str, text: &str) {
        fs::create_dir_all(self.path(name).parent().unwrap()).unwrap();
        fs::write(self.path(name), text).unwrap();
    }

    fn snapshot(&self) -> Snapshot {
        let mut files = Snapshot::new();
        let mut folders = vec![self.folder.path().to_owned()];
        while let Some(folder) = folders.pop() {
            files.insert(folder.clone(), Vec::new());
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else {
                    files.insert(path.clone(), fs::read(path).unwrap());
                }
            }
        }
        files
    }

    fn run(&self, arguments: &[&str]) -> Output {
        let mut percheron = Command::new(env!("CARGO_BIN_EXE_percheron"));
        percheron.current_dir(self.folder.path()).args(arguments).output().unwrap()
    }

    /// Runs it; it must refuse in one line, which is returned, and change nothing.
    fn refusal(&self, arguments: &[&str]) -> String {
        self.refusal_keeping(arguments, Self::snapshot)
    }

    /// As `refusal`, where there is an event log: opening it moves bytes of the database, and no record.
    fn refusal_with_log(&self, name: &str, arguments: &[&str]) -> String {
        let log = self.path(&format!("{name}/log"));
        let records = || EventLog::open(&log).unwrap().read_from(1).unwrap();
        let before = records();
        let refusal = self.refusal_keeping(arguments, |bench| {
            let mut files = bench.snapshot();
            files.remove(&log).unwrap();
            files
        });
        assert_eq!(records(), before);
        refusal
    }

    fn refusal_keeping(&self, arguments: &[&str], kept: impl Fn(&Self) -> Snapshot) -> String {
        let before = kept(self);
        let output = self.run(arguments);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert_eq!(output.stdout, b"", "{output:?}");
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
        assert!(kept(self) == before, "files were changed");
        stderr.strip_prefix("error: ").unwrap().trim_end().to_owned()
    }

    fn up(&self, arguments: &[&str]) -> String {
        self.refusal(&[&["up"], arguments].concat())
    }

    /// A dataset of two classes in both splits.
    fn pack_dataset(&self) {
        for split in ["train", "val"] {
            for class in ["ash", "oak"] {
                for number in 0..4 {
                    let name = format!("images/{split}/{class}/{number}.jpg");
                    fs::create_dir_all(self.path(&name).parent().unwrap()).unwrap();
                    let pixels = vec![number * 20; 16 * 16 * 3];
                    let image = jpeg::encode(&pixels, 16, 16, Pixels::Rgb, 90).unwrap();
                    fs::write(self.path(&name), image).unwrap();
                }
            }
            let options = PackOptions { split: split.to_owned(), ..PackOptions::default() };
            let source = self.path(&format!("images/{split}"));
            pack(&source, &self.text("dataset"), &options, &mut |_| ()).unwrap();
        }
    }

    /// A folder as `up` leaves it, with the built-in digits.
    fn make_run(&self, name: &str) {
        let recipe = recipe::built_in("digits", &[]).unwrap();
        self.write(&format!("{name}/recipe.toml"), &recipe.to_toml());
    }

    /// An event log that tells of checkpoints at these steps, from entry 2 on.
    fn log(&self, name: &str, steps: &[u64]) {
        let mut log = EventLog::open(&self.path(&format!("{name}/log"))).unwrap();
        let mut records = vec![Record::TermStarted { term: Term(1) }];
        let kept = |&step: &u64| Record::CheckpointCommitted { step: Step(step) };
        records.extend(steps.iter().map(kept));
        log.append(Timestamp(1), &records).unwrap();
    }

    /// Keeps a state of two parts at each of `steps`.
    async fn keep(&self, name: &str, steps: &[u64]) {
        let store = Store::create(&self.text(name)).unwrap();
        let sections = vec![Section { name: "params".to_owned(), bytes: 150 }];
        let layout = Layout::new(sections.clone(), 100).unwrap();
        for step in steps.iter().copied().map(Step) {
            let mut parts = Vec::new();
            for (part, bytes) in [(0, 100), (1, 50)] {
                let bytes = Bytes::from(vec![7; bytes]);
                parts.push(save_part(&store, &layout, step, part, bytes).await.unwrap());
            }
            let manifest = Manifest {
                run: RunId::try_from(name.to_owned()).unwrap(),
                step,
                epoch: Epoch(0),
                term: Term(1),
                generation: Generation(1),
                sections: sections.clone(),
                part_bytes: 100,
                parts,
                state_sha256: None,
                recipe: String::new(),
                fingerprint: BTreeMap::new(),
                software: "test".to_owned(),
                created: Timestamp(1),
                nonce: "nonce".to_owned(),
            };
            commit(&store, &manifest).await.unwrap();
        }
    }
}

fn cut(path: &Path, bytes: u64) {
    fs::OpenOptions::new().write(true).open(path).unwrap().set_len(bytes).unwrap();
}

fn names(refusal: &str, words: &[&str]) {
    for word in words {
        assert!(refusal.contains(word), "{word:?} is missing in: {refusal}");
    }
}

#[test]
fn an_unknown_key_is_named_with_its_file() {
    let bench = Bench::new();
    bench.write("mine.toml", "virtual_rank = 8\n");
    let refusal = bench.up(&["--recipe", "mine.toml", "--run-dir", "run"]);
    names(&refusal, &["mine.toml", "\"virtual_rank\"", "did you mean \"virtual_ranks\"?"]);
    names(&bench.refusal(&["recipe", "show", "mine.toml"]), &["mine.toml", "\"virtual_rank\""]);
}

#[test]
fn an_unknown_key_that_is_set_is_named() {
    let bench = Bench::new();
    let refusal = bench.up(&["--recipe", "digits", "--set", "ema.deca=0.9", "--run-dir", "run"]);
    names(&refusal, &["--set ema.deca=0.9", "\"ema.deca\"", "did you mean \"ema.decay\"?"]);
}

#[test]
fn a_recipe_must_be_given_for_a_new_run() {
    names(&Bench::new().up(&["--run-dir", "run"]), &["--recipe"]);
    names(&Bench::new().up(&["--recipe", "nowhere"]), &["\"nowhere\"", "digits"]);
}

#[test]
fn more_workers_than_virtual_ranks_are_refused() {
    let bench = Bench::new();
    let refusal = bench.up(&["--recipe", "digits", "--workers", "9"]);
    names(&refusal, &["recipe digits", "workers = 9", "virtual_ranks = 8"]);
    names(&bench.up(&["--recipe", "digits", "--workers", "0"]), &["workers = 0"]);
}

#[test]
fn a_missing_dataset_is_named_with_its_key() {
    let bench = Bench::new();
    let refusal = bench.up(&["--recipe", "digits", "--set", "data.location=nowhere"]);
    names(&refusal, &["\"data.train\"", &bench.text("nowhere"), "percheron shards pack"]);
    let refusal = bench.up(&["--recipe", "digits", "--set", "data.validation=test"]);
    names(&refusal, &["\"data.validation\"", "test.json"]);
    bench.write("empty.toml", "epochs = 1\n");
    names(&bench.up(&["--recipe", "empty.toml"]), &["empty.toml", "\"data.location\""]);
}

#[test]
fn a_truncated_shard_is_named_with_both_lengths() {
    let bench = Bench::new();
    bench.pack_dataset();
    cut(&bench.path("dataset/train-000000.tar"), 700);
    let sets = ["--set", "data.location=dataset", "--set", "model.classes=2"];
    let refusal = bench.up(&[&["--recipe", "digits", "--run-dir", "run"], &sets[..]].concat());
    names(&refusal, &[&bench.text("dataset/train-000000.tar"), "700 bytes", "truncated"]);
    let refusal = bench.refusal(&["shards", "verify", "dataset"]);
    names(&refusal, &["dataset/train-000000.tar", "700 bytes", "truncated"]);
}

#[test]
fn a_dataset_with_too_many_classes_is_refused_with_the_key_to_set() {
    let bench = Bench::new();
    let refusal = bench.up(&["--recipe", "digits", "--set", "model.classes=4"]);
    names(&refusal, &["builtin:digits", "10 classes", "set model.classes=10"]);
}

#[test]
fn a_chaos_that_means_nothing_is_refused_with_the_forms_that_do() {
    let bench = Bench::new();
    for (spec, named) in [("crash@5", "\"crash\""), ("kill@soon", "\"soon\""), ("kill", "\"kill\"")]
    {
        let refusal = bench.up(&["--recipe", "digits", "--chaos", spec]);
        names(&refusal, &["--chaos", named, "coordinator-kill@STEP"]);
    }
}

#[test]
fn a_folder_of_something_else_is_left_alone() {
    let bench = Bench::new();
    bench.write("thesis/chapter-1.tex", "It was a dark and stormy night.");
    let refusal = bench.up(&["--recipe", "digits", "--run-dir", "thesis"]);
    names(&refusal, &[&bench.text("thesis"), "chapter-1.tex", "choose another --run-dir"]);
    let refusal = bench.refusal(&["status", "--run-dir", "thesis"]);
    names(&refusal, &[&bench.text("thesis"), "holds no run"]);
}

#[test]
fn a_run_of_another_recipe_is_left_alone_and_the_keys_are_named() {
    let bench = Bench::new();
    bench.make_run("run");
    let sets = ["--set", "seed=7", "--set", "schedule.lr=0.5", "--set", "elastic.workers_min=1"];
    let refusal = bench.up(&[&["--recipe", "digits", "--run-dir", "run"], &sets[..]].concat());
    names(&refusal, &[&bench.text("run/recipe.toml"), "seed: 1, 7", "schedule.lr: 0.003, 0.5"]);
    assert!(!refusal.contains("workers_min"), "{refusal}");
}

#[test]
fn a_damaged_recipe_of_a_run_is_named() {
    let bench = Bench::new();
    bench.write("run/recipe.toml", "seed = \"x");
    let refusal = bench.up(&["--recipe", "digits", "--run-dir", "run"]);
    names(&refusal, &[&bench.text("run/recipe.toml")]);
}

#[tokio::test]
async fn a_truncated_part_of_the_newest_checkpoint_is_named_with_what_to_do() {
    let bench = Bench::new();
    bench.make_run("run");
    bench.keep("run", &[10, 20]).await;
    let part = format!("run/{}", part_name(Step(20), 1));
    cut(&bench.path(&part), 49);
    let refusal = bench.up(&["--run-dir", "run"]);
    names(&refusal, &[&bench.text(&part), "49 bytes, expected 50", "restore", "step 10"]);
}

#[tokio::test]
async fn checkpoints_without_their_log_are_no_new_run() {
    let bench = Bench::new();
    bench.make_run("run");
    bench.keep("run", &[10, 20]).await;
    let refusal = bench.up(&["--run-dir", "run"]);
    names(&refusal, &["checkpoints up to step 20", &bench.text("run/log"), "put it back"]);
}

#[tokio::test]
async fn a_run_whose_checkpoints_are_all_gone_does_not_begin_anew() {
    let bench = Bench::new();
    bench.make_run("run");
    bench.log("run", &[10, 20]);
    let refusal = bench.refusal_with_log("run", &["up", "--run-dir", "run"]);
    names(&refusal, &["checkpoint of step 20", "put it back"]);
}

#[tokio::test]
async fn damaged_checkpoints_are_set_aside_on_request_and_nothing_of_them_is_deleted() {
    let bench = Bench::new();
    bench.make_run("run");
    bench.keep("run", &[10, 20, 30]).await;
    bench.log("run", &[10, 20, 30]);
    let parts = [20, 30].map(|step| format!("run/{}", part_name(Step(step), 1)));
    for part in &parts {
        cut(&bench.path(part), 49);
    }
    let refusal = bench.refusal_with_log("run", &["up", "--run-dir", "run"]);
    names(&refusal, &[&bench.text(&parts[1]), "--quarantine", "go on from step 10"]);

    // Stopped before the worker program is looked for, which is not beside this copy.
    let alone = bench.path("percheron");
    fs::copy(env!("CARGO_BIN_EXE_percheron"), &alone).unwrap();
    let mut percheron = Command::new(&alone);
    percheron.current_dir(bench.folder.path()).args(["up", "--run-dir", "run", "--quarantine"]);
    let stderr = String::from_utf8(percheron.output().unwrap().stderr).unwrap();
    for part in &parts {
        names(&stderr, &["warning: the checkpoint of step", &bench.text(part), "quarantined"]);
        assert_eq!(fs::metadata(bench.path(part)).unwrap().len(), 49);
    }
    let log = EventLog::open(&bench.path("run/log")).unwrap();
    let told: Vec<_> = log.read_from(5).unwrap().into_iter().map(|entry| entry.record).collect();
    for (record, step) in told.iter().zip([30, 20]) {
        let Record::CheckpointAbandoned { step: said, reason } = record else { panic!("{told:?}") };
        assert_eq!(*said, Step(step));
        names(reason, &["quarantined, for ", "part-00001 has 49 bytes, expected 50"]);
    }
    let store = Store::open(&bench.text("run")).unwrap();
    assert_eq!(checkpoint::committed_steps(&store).await.unwrap(), [Step(10)]);
}

#[tokio::test]
async fn checkpoints_are_listed_verified_and_deleted_as_far_as_two_intact_ones_stay() {
    let bench = Bench::new();
    bench.make_run("run");
    bench.keep("run", &[10, 20, 30, 40, 50]).await;
    let shown = |arguments: &[&str]| {
        let output = bench.run(&[&["checkpoints"], arguments].concat());
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(shown(&["list", "run"])[1], "step 20: committed, epoch 0, 150 bytes in 2 parts");
    assert_eq!(shown(&["verify", "run"]).last().unwrap(), "5 checkpoints, all intact");

    cut(&bench.path(&format!("run/{}", part_name(Step(50), 1))), 49);
    let output = bench.run(&["checkpoints", "verify", "run"]);
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stdout).unwrap();
    names(&said, &["step 40: intact", "step 50: damaged: ", "49 bytes, expected 50"]);

    // The damaged one counts for none of the three that stay.
    let before = bench.snapshot();
    let dry = shown(&["prune", "run", "--dry-run"]);
    assert_eq!(dry, ["step 10 would be deleted: its checkpoint is not kept", "1 in all"]);
    assert!(bench.snapshot() == before, "a dry run deletes nothing");
    assert_eq!(shown(&["prune", "run"])[0], "step 10 is deleted: its checkpoint is not kept");
    assert!(!bench.path("run/checkpoints/step-0000000010").exists());

    shown(&["rm", "run", "30"]);
    for step in ["20", "40", "50"] {
        if step == "50" {
            shown(&["rm", "run", step]); // It is damaged: two intact ones are left without it.
            continue;
        }
        let refusal = bench.refusal(&["checkpoints", "rm", "run", step]);
        names(&refusal, &[step, "stays", "1 intact ones would be left"]);
    }
    let refusal = bench.refusal(&["checkpoints", "rm", "run", "30"]);
    names(&refusal, &["no checkpoint of step 30"]);
    assert_eq!(shown(&["list", "run", "--json"]).len(), 2);
}

#[tokio::test]
async fn a_damaged_checkpoint_without_another_is_named() {
    let bench = Bench::new();
    bench.make_run("run");
    bench.keep("run", &[10]).await;
    let part = part_name(Step(10), 0);
    fs::write(bench.path(&format!("run/{part}")), vec![8; 100]).unwrap();
    for choice in [&[][..], &["--quarantine"]] {
        let refusal = bench.up(&[&["--recipe", "digits", "--run-dir", "run"], choice].concat());
        names(&refusal, &[&bench.text("run"), &part, "BLAKE3", "no other checkpoint"]);
    }
}

#[test]
fn a_log_that_is_none_is_named() {
    let bench = Bench::new();
    bench.make_run("run");
    bench.write("run/log", "this is not a database");
    let refusal = bench.up(&["--recipe", "digits", "--run-dir", "run"]);
    names(&refusal, &[&bench.text("run/log")]);
}

#[test]
fn without_the_worker_program_nothing_is_begun() {
    let bench = Bench::new();
    let alone = bench.path("percheron");
    fs::copy(env!("CARGO_BIN_EXE_percheron"), &alone).unwrap();
    for arguments in [&["up", "--recipe", "digits"][..], &["worker", "--name", "x"]] {
        let mut percheron = Command::new(&alone);
        let output = percheron.current_dir(bench.folder.path()).args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        let stderr = String::from_utf8(output.stderr).unwrap();
        names(&stderr, &["error: there is no ", "percheron-worker", "cargo build"]);
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
    }
    assert!(!bench.path("runs").exists());
}

#[test]
fn recipes_are_shown_with_what_is_set() {
    let bench = Bench::new();
    let output = bench.run(&["recipe", "show", "digits", "--set", "seed=99"]);
    let shown = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && shown.contains("seed = 99"), "{shown}");
    let output = bench.run(&["recipe", "list"]);
    assert!(String::from_utf8(output.stdout).unwrap().starts_with("digits "));
}

#[test]
fn a_dataset_is_packed_verified_and_inspected() {
    let bench = Bench::new();
    bench.pack_dataset();
    fs::remove_dir_all(bench.path("dataset")).unwrap();
    let output = bench.run(&["shards", "pack", "images/train", "--out", "dataset"]);
    let shown = String::from_utf8(output.stdout).unwrap();
    assert!(shown.contains("packed split train") && shown.contains("8 samples"), "{shown}");
    let output = bench.run(&["shards", "verify", "dataset"]);
    assert!(String::from_utf8(output.stdout).unwrap().contains("is intact: 8 samples"));
    let output = bench.run(&["shards", "inspect", "dataset"]);
    assert!(String::from_utf8(output.stdout).unwrap().contains("2 (ash, oak)"));
    let refusal = bench.refusal(&["shards", "pack", "images/train", "--out", "dataset"]);
    names(&refusal, &["train.json", "not overwritten"]);
}
