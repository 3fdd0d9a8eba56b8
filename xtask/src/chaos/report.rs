//! What a run under faults came to: printed, and held to the promise.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::tale::{Tale, percentile};
use super::{Done, HANG, Kind, Options};

/// What the promise is held against.
#[derive(Debug)]
pub(super) struct Oracle {
    /// The state in which the undisturbed run ended.
    pub(super) state_sha256: String,
    /// What `percheron audit` says of the disturbed one.
    pub(super) audit: String,
}

/// Prints what came out, and fails if the bits are others or somebody was evicted wrongly.
pub(super) fn print(options: &Options, done: &Done, tale: &Tale, oracle: &Oracle) -> Result<()> {
    let Done { faults, starts, let_go } = done;
    let mut by_kind = serde_json::Map::new();
    println!("\nkind         faults  abort p50, p99, most     next step p50, p99, most (ms)");
    for kind in Kind::ALL {
        if let Some((line, figures)) = of_kind(kind, done, tale) {
            println!("{line}");
            by_kind.insert(kind.name().to_owned(), figures);
        }
    }
    let p99_of_kills = |figure: &str| by_kind.get("kill").map_or(&Value::Null, |k| &k[figure][1]);
    let hang = u64::try_from(HANG.as_millis()).expect("it is short");
    let stops = faults.iter().filter(|fault| fault.kind == Kind::Stop.name());
    let stopped: Vec<_> = stops.filter(|stop| tale.cost(stop).next_step_ms.is_some()).collect();
    let named = stopped.iter().filter(|stop| tale.is_named(stop, hang)).count();
    let wrong = tale.evicted_wrongly(faults, let_go);
    let undisturbed = &oracle.state_sha256;
    let same_hash = tale.state_sha256.as_ref() == Some(undisturbed);
    let (steps, repeated, ratio) = (tale.steps(), tale.repeated, tale.throughput(faults, starts));
    println!("throughput {ratio:.4} of the usual pace; {steps} steps, {repeated} repeated");
    println!("of {} stopped workers {named} were named; evicted wrongly: {wrong:?}", stopped.len());
    println!("audit: {}", oracle.audit);
    println!("state {undisturbed}: {}", if same_hash { "the same" } else { "ANOTHER" });
    if options.json {
        let figures = json!({
            "faults": faults.len(), "throughput_ratio": ratio, "same_hash": same_hash,
            "abort_p99_ms": p99_of_kills("abort_ms"),
            "next_step_p99_ms": p99_of_kills("next_step_ms"), "by_kind": by_kind,
            "stopped": stopped.len(), "stopped_named": named, "false_evictions": wrong.len(),
            "steps": steps, "repeated_steps": repeated, "workers": options.workers,
            "step_ms_p50": tale.step_ms(), "step_ms_p99": tale.step_ms_p99(),
            "state_sha256": tale.state_sha256, "audit": oracle.audit,
        });
        println!("{figures}");
    }
    let ended = &tale.state_sha256;
    ensure!(same_hash, "the disturbed run ended in {ended:?} and not in {undisturbed}");
    ensure!(wrong.is_empty(), "{} workers were evicted although nothing was wrong", wrong.len());
    ensure!(named == stopped.len(), "a stopped worker was not the one that was lost");
    Ok(())
}

/// What the faults of a kind cost, as a line and as JSON; nothing if there were none.
fn of_kind(kind: Kind, done: &Done, tale: &Tale) -> Option<(String, Value)> {
    let of_it = || done.faults.iter().filter(|fault| fault.kind == kind.name());
    let count = of_it().count();
    if count == 0 {
        return None;
    }
    let costs: Vec<_> = of_it().filter(|f| f.is_fatal).map(|fault| tale.cost(fault)).collect();
    let aborts: Vec<_> = costs.iter().filter_map(|cost| cost.abort_ms).collect();
    let nexts: Vec<_> = costs.iter().filter_map(|cost| cost.next_step_ms).collect();
    let three = |of: &[u64]| [50, 99, 100].map(|part| percentile(of.to_vec(), part));
    let shown = |of: &[u64]| match three(of) {
        [Some(p50), Some(p99), Some(most)] => format!("{p50}, {p99}, {most}"),
        _ => "-".to_owned(),
    };
    let line = format!("{:<12} {count:>6}  {:<24} {}", kind.name(), shown(&aborts), shown(&nexts));
    let figures = json!({
        "faults": count, "measured": nexts.len(),
        "abort_ms": three(&aborts), "next_step_ms": three(&nexts),
    });
    Some((line, figures))
}
