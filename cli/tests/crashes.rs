//! Real processes, killed while they keep checkpoints and write the log: `percheron bench crashes`, a few.

use std::process::Command;

#[test]
fn killed_processes_leave_whole_checkpoints_and_every_record_that_had_taken_effect() {
    let folder = tempfile::tempdir().unwrap();
    let mut percheron = Command::new(env!("CARGO_BIN_EXE_percheron"));
    percheron.args(["bench", "crashes", "--count", "24", "--json", "--folder"]).arg(folder.path());
    let output = percheron.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let figures: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(figures["crashes"], 24, "{figures}");
    assert!(figures["records"].as_u64() > Some(24), "too little was written: {figures}");
    assert!(figures["checkpoints"].as_u64() > Some(12), "too little was kept: {figures}");
}
