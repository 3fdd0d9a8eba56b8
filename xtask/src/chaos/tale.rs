//! What the event log of a run says about the faults that were done to it. Pure: figures from records.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;
use serde_json::Value;

/// After a fault, steps belong to it for so long at most, in milliseconds.
const SETTLED_MS: u64 = 12_000;
/// With fewer steps between two faults, what is usual is taken from the whole run.
const STEPS_MIN: usize = 10;

/// A line of `percheron log --json`.
#[derive(Debug, Deserialize)]
pub(super) struct Line {
    at_ms: u64,
    record: Value,
}

/// What was done to a run, by the clock that the log has as well.
#[derive(Debug, Clone)]
pub(super) struct Fault {
    pub(super) kind: &'static str,
    pub(super) at_ms: u64,
    /// The worker that was hurt, if it was one.
    pub(super) victim: Option<String>,
    /// Whether the run has to go on without it.
    pub(super) is_fatal: bool,
}

/// The log, sorted out.
#[derive(Debug, Default)]
pub(crate) struct Tale {
    /// When each step was applied, in order.
    steps: Vec<u64>,
    /// Generations that were opened: when, and their members.
    opened: Vec<(u64, BTreeSet<String>)>,
    /// Generations that formed: when, the members, and when the last had stopped in the one before.
    formed: Vec<Formed>,
    /// Who was lost, and when.
    lost: Vec<(u64, String, String)>,
    /// When the first generation with each worker was opened: then its process could train.
    taken: BTreeMap<String, u64>,
    pub(super) state_sha256: Option<String>,
    pub(super) repeated: u64,
}

#[derive(Debug)]
struct Formed {
    at_ms: u64,
    members: BTreeSet<String>,
    stopped_ms: Option<u64>,
}

/// What a fault cost.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Cost {
    /// Until the last of the others had stopped, in milliseconds.
    pub(super) abort_ms: Option<u64>,
    /// Until a step of a generation without the victim was applied.
    pub(super) next_step_ms: Option<u64>,
}

impl Tale {
    pub(super) fn of(lines: &[Line]) -> Self {
        let mut tale = Self::default();
        let mut members = BTreeSet::new();
        for Line { at_ms, record } in lines {
            let text = |field: &str| record[field].as_str().unwrap_or_default().to_owned();
            match record["kind"].as_str().unwrap_or_default() {
                "step_adopted" => tale.steps.push(record["applied_at"].as_u64().unwrap_or(*at_ms)),
                "generation_opened" => {
                    let of = record["members"].as_array().into_iter().flatten();
                    members = of.filter_map(|m| m["name"].as_str().map(str::to_owned)).collect();
                    for name in &members {
                        tale.taken.entry(name.clone()).or_insert(*at_ms);
                    }
                    tale.opened.push((*at_ms, members.clone()));
                }
                "generation_formed" => {
                    tale.repeated += record["repeated"].as_u64().unwrap_or(0);
                    let stopped_ms = record["stopped_at"].as_u64();
                    let members = members.clone();
                    tale.formed.push(Formed { at_ms: *at_ms, members, stopped_ms });
                }
                "worker_lost" => tale.lost.push((*at_ms, text("name"), text("cause"))),
                "run_finished" => tale.state_sha256 = Some(text("state_sha256")),
                _ => {} // Other records say nothing about faults.
            }
        }
        tale
    }

    /// What a fault that took its victim from the run cost.
    pub(super) fn cost(&self, fault: &Fault) -> Cost {
        let Some(victim) = &fault.victim else { return Cost::default() };
        if !self.is_member(victim, fault.at_ms) {
            return Cost::default(); // Nobody trained with it yet.
        }
        let is_without = |f: &&Formed| f.at_ms >= fault.at_ms && !f.members.contains(victim);
        let Some(formed) = self.formed.iter().find(is_without) else { return Cost::default() };
        let next = self.steps.iter().find(|&&at| at >= formed.at_ms);
        let since = |at: u64| at.saturating_sub(fault.at_ms);
        Cost { abort_ms: formed.stopped_ms.map(since), next_step_ms: next.copied().map(since) }
    }

    fn is_member(&self, name: &str, at: u64) -> bool {
        let newest = self.opened.iter().rfind(|(opened, _)| *opened <= at);
        newest.is_some_and(|(_, members)| members.contains(name))
    }

    /// Whether the victim of a fault was lost, and by itself, within so many milliseconds.
    pub(super) fn is_named(&self, fault: &Fault, within: u64) -> bool {
        let Some(victim) = &fault.victim else { return false };
        let times = fault.at_ms..=fault.at_ms + within;
        self.lost.iter().any(|(at, name, _)| times.contains(at) && name == victim)
    }

    /// Workers that were lost although nothing was done to them at the time: name and cause.
    ///
    /// `let_go` are those whose process ended by order.
    pub(super) fn evicted_wrongly(
        &self,
        faults: &[Fault],
        let_go: &BTreeSet<String>,
    ) -> Vec<(String, String)> {
        let is_hurt = |name: &str, at: u64| {
            let is_victim = |f: &&Fault| f.is_fatal && f.victim.as_deref() == Some(name);
            faults.iter().filter(is_victim).any(|f| f.at_ms <= at)
        };
        let wrong = self.lost.iter().filter(|(at, name, cause)| {
            !is_hurt(name, *at) && !let_go.contains(name) && !cause.contains("left as asked")
        });
        wrong.map(|(_, name, cause)| (name.clone(), cause.clone())).collect()
    }

    /// Steps made, as a share of those that the usual pace would have made in the same time.
    ///
    /// The usual pace around a fault is the median time between two steps from 12 s after it to the next
    /// fault: on a machine that others use as well it changes within minutes. Time in which a process
    /// of ours was starting is left out, until it could train: `starts` has when each was started.
    pub(super) fn throughput(&self, faults: &[Fault], starts: &BTreeMap<String, u64>) -> f64 {
        let usual_of = |from: u64, to: u64| {
            let mut gaps: Vec<_> = self.gaps().filter(|&(a, b)| a >= from && b < to).collect();
            gaps.sort_by_key(|(a, b)| b - a);
            (gaps.len() >= STEPS_MIN).then(|| gaps[gaps.len() / 2]).map(|(a, b)| (b - a) as f64)
        };
        let Some(everywhere) = usual_of(0, u64::MAX) else { return f64::NAN };
        let starting: Vec<_> = starts
            .iter()
            .filter_map(|(name, &from)| Some((from, *self.taken.get(name)?)))
            .collect();
        let is_starting = |a: u64, b: u64| starting.iter().any(|&(from, to)| a < to && b > from);
        let (mut took, mut lost) = (0.0, 0.0);
        for (number, fault) in faults.iter().enumerate() {
            let next = faults.get(number + 1).map_or(u64::MAX, |next| next.at_ms);
            let usual = usual_of(fault.at_ms + SETTLED_MS, next).unwrap_or(everywhere);
            for (a, b) in self.gaps().filter(|&(a, b)| b > fault.at_ms && a < next) {
                let is_hit = a <= fault.at_ms || !is_starting(a, b);
                let is_settled = a >= fault.at_ms + SETTLED_MS;
                let gap = (b - a) as f64;
                if is_settled {
                    took += usual;
                } else if is_hit {
                    took += gap;
                    lost += gap - usual;
                }
            }
        }
        if took > 0.0 { 1.0 - lost / took } else { f64::NAN }
    }

    fn gaps(&self) -> impl Iterator<Item = (u64, u64)> {
        // What one generation adopted late was applied earlier: time does not run backwards.
        self.steps.windows(2).map(|two| (two[0], two[1].max(two[0])))
    }

    /// The median time between two steps, in milliseconds.
    pub(super) fn step_ms(&self) -> Option<u64> {
        let mut gaps: Vec<_> = self.gaps().map(|(a, b)| b - a).collect();
        gaps.sort_unstable();
        gaps.get(gaps.len() / 2).copied()
    }

    /// The time between two steps that 99 of 100 do not exceed.
    pub(super) fn step_ms_p99(&self) -> Option<u64> {
        percentile(self.gaps().map(|(a, b)| b - a).collect(), 99)
    }

    /// When each step was applied, in milliseconds since 1970.
    pub(crate) fn step_times(&self) -> &[u64] {
        &self.steps
    }

    pub(super) fn steps(&self) -> usize {
        self.steps.len()
    }
}

/// The smallest figure that so many of a hundred do not exceed (nearest rank).
pub(super) fn percentile(mut figures: Vec<u64>, hundredths: usize) -> Option<u64> {
    figures.sort_unstable();
    let rank = (figures.len() * hundredths).div_ceil(100).max(1);
    figures.get(rank - 1).copied()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn line(at_ms: u64, record: Value) -> Line {
        Line { at_ms, record }
    }

    fn opened(at_ms: u64, names: &[&str]) -> Line {
        let members: Vec<_> = names.iter().map(|name| json!({ "name": name })).collect();
        line(at_ms, json!({ "kind": "generation_opened", "members": members }))
    }

    fn formed(at_ms: u64, stopped_at: Option<u64>) -> Line {
        line(at_ms, json!({ "kind": "generation_formed", "repeated": 1, "stopped_at": stopped_at }))
    }

    fn step(at_ms: u64) -> Line {
        line(at_ms, json!({ "kind": "step_adopted", "applied_at": at_ms }))
    }

    fn kill(at_ms: u64, victim: &str) -> Fault {
        Fault { kind: "kill", at_ms, victim: Some(victim.to_owned()), is_fatal: true }
    }

    /// Steps every 100 ms, a kill at 20 s that costs half a second, and nothing more until 60 s.
    fn one_kill() -> Tale {
        let mut lines = vec![opened(0, &["worker-0", "worker-1"]), formed(10, None)];
        lines.extend((1..=200).map(|number| step(number * 100)));
        let lost = json!({ "kind": "worker_lost", "name": "worker-1", "cause": "killed" });
        lines.extend([
            line(20_050, lost),
            opened(20_060, &["worker-0"]),
            formed(20_300, Some(20_120)),
        ]);
        lines.extend((0..400).map(|number| step(20_600 + number * 100)));
        Tale::of(&lines)
    }

    #[test]
    fn a_kill_costs_from_the_kill_to_the_abort_and_to_the_next_step() {
        let cost = one_kill().cost(&kill(20_010, "worker-1"));
        assert_eq!(cost, Cost { abort_ms: Some(110), next_step_ms: Some(590) });
        assert_eq!(one_kill().cost(&kill(20_010, "worker-0")), Cost::default(), "it never left");
    }

    #[test]
    fn throughput_is_what_was_lost_of_the_time_since_the_first_fault() {
        let tale = one_kill();
        let ratio = tale.throughput(&[kill(20_010, "worker-1")], &BTreeMap::new());
        let expected = 1.0 - 500.0 / 40_500.0;
        assert!((ratio - expected).abs() < 1e-3, "{ratio} is not {expected}");
    }

    #[test]
    fn time_in_which_a_process_starts_does_not_count_and_the_fault_itself_does() {
        let mut tale = one_kill();
        tale.taken.insert("worker-2".to_owned(), 21_000);
        let starts = BTreeMap::from([("worker-2".to_owned(), 20_020)]);
        let ratio = tale.throughput(&[kill(20_010, "worker-1")], &starts);
        assert!((0.98..0.99).contains(&ratio), "{ratio}");
    }

    #[test]
    fn only_who_was_hurt_or_let_go_may_be_lost() {
        let tale = one_kill();
        let nobody = BTreeSet::new();
        assert_eq!(tale.evicted_wrongly(&[kill(20_010, "worker-1")], &nobody), []);
        let wrong = tale.evicted_wrongly(&[kill(20_010, "worker-0")], &nobody);
        assert_eq!(wrong, [("worker-1".to_owned(), "killed".to_owned())]);
        assert_eq!(tale.evicted_wrongly(&[], &BTreeSet::from(["worker-1".to_owned()])), []);
    }

    #[test]
    fn who_was_hurt_a_little_may_not_be_lost() {
        let freeze = Fault { is_fatal: false, ..kill(20_010, "worker-1") };
        assert_eq!(one_kill().evicted_wrongly(&[freeze], &BTreeSet::new()).len(), 1);
    }

    #[test]
    fn a_victim_is_named_if_it_is_lost_soon_after() {
        let tale = one_kill();
        assert!(tale.is_named(&kill(20_010, "worker-1"), 7_000));
        assert!(!tale.is_named(&kill(20_010, "worker-0"), 7_000), "another was lost");
        assert!(!tale.is_named(&kill(10_000, "worker-1"), 7_000), "it was lost for another reason");
    }

    #[test]
    fn the_death_of_one_who_had_not_joined_costs_nothing() {
        assert_eq!(one_kill().cost(&kill(20_010, "worker-7")), Cost::default());
    }

    #[test]
    fn a_percentile_is_one_of_the_figures() {
        assert_eq!(percentile((1..=200).collect(), 99), Some(198));
        assert_eq!(percentile(vec![], 50), None);
    }
}
