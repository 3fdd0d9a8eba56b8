//! How a GPU is, asked of a library that answers as the driver's does.
#![expect(clippy::unwrap_used, reason = "helpers of tests are tests too")]

use std::{
    path::PathBuf,
    process::Command,
    sync::mpsc::{Receiver, channel},
    time::{Duration, Instant},
};

use worker::health::Watch;

const PERIOD: Duration = Duration::from_millis(20);
const PATIENCE: Duration = Duration::from_secs(30);

fn library(test: &str) -> PathBuf {
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fake_nvml.cpp");
    let name = format!("libfakenvml-{test}-{}.so", std::process::id());
    let built = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let compiler = Command::new("c++")
        .args(["-std=c++17", "-O1", "-shared", "-fPIC", "-o"])
        .arg(&built)
        .arg(source)
        .status()
        .unwrap();
    assert!(compiler.success());
    built
}

fn watch(test: &str, bus_id: &str) -> (Watch, Receiver<String>) {
    let (said, broken) = channel();
    let watch = Watch::start(Some(&library(test)), bus_id, PERIOD, move |what| {
        said.send(what).unwrap();
    });
    (watch.unwrap(), broken)
}

fn until(what: &str, is_so: impl Fn() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < PATIENCE, "{what}");
        std::thread::yield_now();
    }
}

#[test]
fn a_whole_device_is_sampled() {
    let (watch, broken) = watch("whole", "0000:00:00.0");
    let found = watch.latest();
    assert_eq!(found.name, "Fake GPU");
    assert_eq!((found.memory_used_bytes, found.memory_total_bytes), (250, 1000));
    assert!((found.utilization - 0.87).abs() < 1e-9);
    assert_eq!((found.temperature_celsius, found.power_watts), (Some(61), Some(412.5)));
    assert_eq!((found.ecc_corrected, found.ecc_uncorrected), (Some(5), None));
    assert_eq!((found.nvlinks_active, found.nvlink_errors), (2, 4));
    assert_eq!(found.throttled_by, ["power_cap", "hardware_thermal"]);
    drop(watch);
    assert!(broken.recv_timeout(PATIENCE).is_err(), "it says nothing before it ends");
}

#[test]
fn broken_hardware_is_said_once_and_counted() {
    let (watch, broken) = watch("xid79", "0000:4f:00.0");
    let said = broken.recv_timeout(PATIENCE).unwrap();
    assert_eq!(said, "the GPU has Xid 79, which has fallen off the bus");
    until("it is counted", || watch.latest().xids.get(&79) == Some(&1));
    assert!(broken.recv().is_err(), "nothing more can be said");
}

#[test]
fn what_a_program_did_is_counted_and_blames_nobody() {
    let (watch, broken) = watch("xid31", "0000:1f:00.0");
    until("it is counted", || watch.latest().xids.get(&31) == Some(&1));
    drop(watch);
    assert!(broken.recv_timeout(PATIENCE).is_err());
}

#[test]
fn a_device_that_the_driver_has_lost_is_broken() {
    let (_watch, broken) = watch("lost", "0000:00:1f.0");
    assert_eq!(broken.recv_timeout(PATIENCE).unwrap(), "the driver has lost the GPU");
}

#[test]
fn a_device_that_is_not_there_is_named() {
    let error = Watch::start(Some(&library("none")), "ffff:00:00.0", PERIOD, drop).unwrap_err();
    let said = "the driver does not know the GPU at PCI address ffff:00:00.0";
    assert_eq!(error.to_string(), said);
}
