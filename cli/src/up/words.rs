//! What happens to a run, in words for people.

use cluster::{ExitScores, Ledger, Member, Record};

use crate::up::report::{Summary, Top1};

/// An entry of the log as a line; nothing if it is not worth one. `ledger` has taken it in.
pub(crate) fn describe(record: &Record, ledger: &Ledger) -> Option<String> {
    Some(match record {
        Record::TermStarted { term } if term.0 > 1 => {
            format!("the coordinator is back: term {term}")
        }
        Record::WorkerJoined { name, .. } => format!("{name} is ready"),
        Record::WorkerLost { name, cause, .. } => format!("{name} was lost: {cause}"),
        Record::GenerationFormed { generation, step, repeated, .. } => {
            let names = names(&ledger.members);
            let verb = match (step.0, ledger.members.len()) {
                (0, 1) => "starts",
                (0, _) => "start",
                (_, 1) => "goes on",
                (_, _) => "go on",
            };
            let steps = match repeated {
                0 => String::new(),
                1 => "; 1 step repeated".to_owned(),
                _ => format!("; {repeated} steps repeated"),
            };
            format!("generation {generation}: {names} {verb} from step {step}{steps}")
        }
        Record::Evaluated { evaluation, .. } => {
            let percent = |scores: &ExitScores| {
                let Top1 { early3, att, cnn, merge } = Top1::of(scores);
                format!("early3 {early3:.1}, att {att:.1}, cnn {cnn:.1}, merge {merge:.1}")
            };
            format!(
                "step {}, epoch {}: top-1 in % of the weights: {}; of their average: {}",
                evaluation.step,
                evaluation.epoch,
                percent(&evaluation.weights),
                percent(&evaluation.ema)
            )
        }
        Record::CheckpointCommitted { step } => format!("step {step}: checkpoint kept"),
        Record::NodeMarked { node, reason, .. } => {
            format!("machine {node} is faulty, no worker of it is let in: {reason}")
        }
        Record::NodeReadmitted { node } => format!("machine {node} is whole again, as asked"),
        Record::Resized { workers } => format!("{workers} workers are to take part, as asked"),
        Record::CheckpointAbandoned { step, reason } => {
            format!("step {step}: checkpoint given up: {reason}")
        }
        Record::TermStarted { .. }
        | Record::RunCreated { .. }
        | Record::WorkerRefused { .. } // Its process says so itself.
        | Record::FingerprintFixed { .. }
        | Record::ExchangeLost { .. }
        | Record::GenerationOpened { .. }
        | Record::StepAdopted { .. }
        | Record::RunFinished { .. }
        | Record::RunFailed { .. } => return None,
    })
}

fn names(members: &[Member]) -> String {
    members.iter().map(|member| member.name.as_str()).collect::<Vec<_>>().join(", ")
}

/// The end of a run, for people.
pub(crate) fn sum_up(summary: &Summary) -> Vec<String> {
    let mut lines = vec![String::new(), format!("run {} is finished", summary.run)];
    let mut row = |name: &str, value: String| lines.push(format!("  {name:<20} {value}"));
    if let (Some(weights), Some(average)) = (summary.top1, summary.ema_top1) {
        row("top-1 in %", "early3      att      cnn    merge".to_owned());
        for (name, Top1 { early3, att, cnn, merge }) in
            [("  of the weights", weights), ("  of their average", average)]
        {
            row(name, format!("{early3:>6.2}   {att:>6.2}   {cnn:>6.2}   {merge:>6.2}"));
        }
    }
    row("state sha256", summary.state_sha256.clone());
    row("steps", format!("{}, of which repeated: {}", summary.steps, summary.repeated_steps));
    row("generations", summary.generations.to_string());
    if !summary.recovery_ms.is_empty() {
        row(
            "recovery",
            format!("{} ms from each loss to the next step", joined(&summary.recovery_ms)),
        );
    }
    if !summary.abort_ms.is_empty() {
        row("abort", format!("{} ms until the survivors had stopped", joined(&summary.abort_ms)));
    }
    if let (Some(speed), Some(step_ms)) = (summary.images_per_s, summary.step_ms_median) {
        row("speed", format!("{speed:.1} images/s; median step {step_ms:.0} ms"));
    }
    if summary.worker_rss_bytes_max > 0 {
        let mebibytes = summary.worker_rss_bytes_max >> 20;
        row("memory", format!("{mebibytes} MiB at most in a worker"));
    }
    row("kept in", summary.run_dir.clone());
    lines
}

fn joined(values: &[u64]) -> String {
    values.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use cluster::{Generation, Step, Term, WorkerId};

    use super::*;

    #[test]
    fn events_are_told_in_plain_words() {
        let member = |number: u64| Member {
            worker: WorkerId(number),
            name: format!("worker-{number}"),
            address: String::new(),
            block: 0..1,
        };
        let ledger = Ledger { members: vec![member(0), member(2)], ..Ledger::default() };
        let lost = Record::WorkerLost {
            worker: WorkerId(1),
            name: "worker-1".to_owned(),
            cause: "killed by signal 9".to_owned(),
        };
        let formed = |step, repeated| Record::GenerationFormed {
            generation: Generation(3),
            step: Step(step),
            digest: String::new(),
            repeated,
            stopped_at: None,
        };
        let told = |record: &Record| describe(record, &ledger);
        assert_eq!(told(&lost).unwrap(), "worker-1 was lost: killed by signal 9");
        assert_eq!(
            told(&formed(61, 1)).unwrap(),
            "generation 3: worker-0, worker-2 go on from step 61; 1 step repeated"
        );
        assert_eq!(
            told(&formed(0, 0)).unwrap(),
            "generation 3: worker-0, worker-2 start from step 0"
        );
        assert_eq!(told(&Record::TermStarted { term: Term(1) }), None);
    }
}
