//! Every record of the event log as a sentence.

use cluster::{Member, Record};

use crate::up::Top1;

/// What a record says, for people. `up` shows fewer of them and says more about each.
pub(crate) fn of(record: &Record) -> String {
    match record {
        Record::RunCreated { config } => format!(
            "run {} is created: {} steps, {} an epoch, {} virtual ranks",
            config.run, config.steps_total, config.steps_per_epoch, config.virtual_ranks
        ),
        Record::TermStarted { term } => format!("a coordinator takes the lead: term {term}"),
        Record::FingerprintFixed { fingerprint } => {
            format!("the first worker fixes the fingerprint: {} facts", fingerprint.0.len())
        }
        Record::WorkerJoined { name, address, .. } => format!("{name} joins at {address}"),
        Record::WorkerRefused { name, reason, .. } => format!("{name} is refused: {reason}"),
        Record::NodeMarked { node, name, reason } => {
            format!("machine {node} is faulty, as {name} says: {reason}")
        }
        Record::NodeReadmitted { node } => {
            format!("machine {node} is whole again, as somebody says")
        }
        Record::WorkerLost { name, cause, .. } => format!("{name} is lost: {cause}"),
        Record::ExchangeLost { worker, generation, peer, reason, .. } => {
            let peer = peer.as_ref().map(|peer| format!(", which blames {peer}"));
            let peer = peer.unwrap_or_default();
            format!("the exchange of generation {generation} breaks at {worker}{peer}: {reason}")
        }
        Record::Resized { workers } => format!("{workers} workers are to take part, as asked"),
        Record::GenerationOpened { generation, members, planned, reason } => {
            let kind = if *planned { "as planned" } else { "at once" };
            let blocks: Vec<_> = members.iter().map(block).collect();
            let blocks = blocks.join(", ");
            format!("generation {generation} is opened {kind}, because {reason}: {blocks}")
        }
        Record::GenerationFormed { generation, step, repeated, .. } => {
            format!(
                "generation {generation} stands and goes on from step {step}, {repeated} repeated"
            )
        }
        Record::StepAdopted { step, generation, metrics, .. } => match metrics {
            Some(m) => format!("step {step} (generation {generation}): loss {:.4}", m.loss),
            None => format!("step {step} (generation {generation})"),
        },
        Record::Evaluated { evaluation, .. } => {
            let Top1 { early3, att, cnn, merge } = Top1::of(&evaluation.weights);
            format!(
                "step {} is evaluated on {} samples: top-1 {early3:.2} {att:.2} {cnn:.2} {merge:.2} %",
                evaluation.step, evaluation.samples
            )
        }
        Record::CheckpointCommitted { step } => format!("the checkpoint of step {step} is kept"),
        Record::CheckpointAbandoned { step, reason } => {
            format!("the checkpoint of step {step} is given up: {reason}")
        }
        Record::RunFinished { step, state_sha256 } => {
            format!("the run is finished at step {step}, state sha256 {state_sha256}")
        }
        Record::RunFailed { reason } => format!("the run has failed: {reason}"),
    }
}

fn block(member: &Member) -> String {
    format!("{} {}..{}", member.name, member.block.start, member.block.end)
}
