//! Between wire messages and the types of `cluster`. Outward cannot fail; inward names what is missing.

use std::{collections::BTreeMap, time::Duration};

use cluster::{
    Epoch, Evaluation, ExitScores, Fingerprint, Generation, Hello, Order, Part, Progress, Rank,
    Report, Share, Step, StepMetrics, StepPhase, Term, Timestamp, WorkerId,
};

use crate::{
    group::{group_from_wire, group_to_wire},
    v1::{self, report::Kind as ReportKind, session_response::Kind as ResponseKind},
};

/// A message that the sender's software cannot have meant.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("malformed message: {message}.{field} {problem}")]
pub struct Malformed {
    /// The message.
    pub message: &'static str,
    /// Its field.
    pub field: &'static str,
    /// What is wrong with it.
    pub problem: &'static str,
}

fn present<T>(
    value: Option<T>,
    message: &'static str,
    field: &'static str,
) -> Result<T, Malformed> {
    value.ok_or(Malformed { message, field, problem: "is missing" })
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

// ---- Hello ------------------------------------------------------------------------------------

impl v1::Hello {
    /// A greeting for the wire; `software` names the worker's version.
    #[must_use]
    pub fn new(worker: WorkerId, hello: &Hello, software: &str) -> Self {
        Self {
            worker: worker.0,
            name: hello.name.clone(),
            address: hello.address.clone(),
            fingerprint: hello.fingerprint.0.clone().into_iter().collect(),
            generation: hello.generation.map(|g| g.0),
            applied: hello.applied.map(|s| s.0),
            software: software.to_owned(),
            node: hello.node.clone(),
            preparing: hello.preparing,
        }
    }
}

impl From<v1::Hello> for Hello {
    fn from(hello: v1::Hello) -> Self {
        Self {
            name: hello.name,
            address: hello.address,
            node: hello.node,
            fingerprint: Fingerprint(hello.fingerprint.into_iter().collect::<BTreeMap<_, _>>()),
            generation: hello.generation.map(Generation),
            applied: hello.applied.map(Step),
            preparing: hello.preparing,
        }
    }
}

// ---- Reports ----------------------------------------------------------------------------------

/// A report as numbered message; heartbeats carry 0.
#[must_use]
pub fn report_to_wire(sequence: u64, report: &Report) -> v1::Report {
    let kind = match report.clone() {
        Report::Heartbeat(progress) => ReportKind::Heartbeat(heartbeat(&progress)),
        Report::Formed { generation, step, digest, begun, stopped_at, metrics } => {
            ReportKind::Formed(v1::Formed {
                generation: generation.0,
                step: step.0,
                digest,
                begun: begun.0,
                stopped_at_ms: stopped_at.map(|at| at.0),
                metrics: metrics.map(Into::into),
            })
        }
        Report::FormFailed { generation, peer, reason } => ReportKind::FormFailed(v1::FormFailed {
            generation: generation.0,
            peer: peer.map(|rank| rank.0),
            reason,
        }),
        Report::ExchangeLost { generation, applied, peer, reason, at } => {
            ReportKind::ExchangeLost(v1::ExchangeLost {
                generation: generation.0,
                applied: applied.0,
                peer: peer.map(|rank| rank.0),
                reason,
                at_ms: at.0,
            })
        }
        Report::StepApplied { generation, step, metrics, at } => {
            ReportKind::StepApplied(v1::StepApplied {
                generation: generation.0,
                step: step.0,
                metrics: Some(metrics.into()),
                at_ms: at.0,
            })
        }
        Report::Evaluated { generation, evaluation } => {
            ReportKind::Evaluated(evaluated(generation, &evaluation))
        }
        Report::ShareWritten { generation, share } => {
            ReportKind::ShareWritten(share_written(generation, share))
        }
        Report::ShareFailed { generation, step, reason } => {
            ReportKind::ShareFailed(v1::ShareFailed {
                generation: generation.0,
                step: step.0,
                reason,
            })
        }
        Report::CheckpointDamaged { generation, step, reason } => {
            ReportKind::CheckpointDamaged(v1::CheckpointDamaged {
                generation: generation.0,
                step: step.0,
                reason,
            })
        }
        Report::Diverged { generation, step, agreed, odd, reason } => {
            ReportKind::Diverged(v1::Diverged {
                generation: generation.0,
                step: step.0,
                agreed: agreed.0,
                odd: odd.map(|rank| rank.0),
                reason,
            })
        }
        Report::Finished { generation, step, state_sha256 } => ReportKind::Finished(v1::Finished {
            generation: generation.0,
            step: step.0,
            state_sha256,
        }),
        Report::NodeFaulty { reason } => ReportKind::NodeFaulty(v1::NodeFaulty { reason }),
        Report::Ready => ReportKind::Ready(v1::Ready {}),
        Report::Leaving { reason } => ReportKind::Leaving(v1::Leaving { reason }),
        Report::Failed { reason } => ReportKind::Failed(v1::Failed { reason }),
    };
    v1::Report { sequence, kind: Some(kind) }
}

fn evaluated(generation: Generation, evaluation: &Evaluation) -> v1::Evaluated {
    v1::Evaluated {
        generation: generation.0,
        step: evaluation.step.0,
        epoch: evaluation.epoch.0,
        samples: evaluation.samples,
        weights: Some(evaluation.weights.into()),
        ema: Some(evaluation.ema.into()),
    }
}

fn share_written(generation: Generation, share: Share) -> v1::ShareWritten {
    let section = |(name, bytes)| v1::Section { name, bytes };
    v1::ShareWritten {
        generation: generation.0,
        step: share.step.0,
        parts: share.parts.into_iter().map(Into::into).collect(),
        parts_total: share.parts_total,
        part_bytes: share.part_bytes,
        sections: share.sections.into_iter().map(section).collect(),
    }
}

/// A report from the wire.
///
/// # Errors
/// [`Malformed`] if a field that must be there is not.
pub fn report_from_wire(report: v1::Report) -> Result<Report, Malformed> {
    Ok(match present(report.kind, "Report", "kind")? {
        ReportKind::Heartbeat(heartbeat) => Report::Heartbeat(progress(&heartbeat)?),
        ReportKind::Formed(formed) => Report::Formed {
            generation: Generation(formed.generation),
            step: Step(formed.step),
            digest: formed.digest,
            begun: Step(formed.begun),
            stopped_at: formed.stopped_at_ms.map(Timestamp),
            metrics: formed.metrics.map(Into::into),
        },
        ReportKind::FormFailed(failed) => Report::FormFailed {
            generation: Generation(failed.generation),
            peer: failed.peer.map(Rank),
            reason: failed.reason,
        },
        ReportKind::ExchangeLost(lost) => Report::ExchangeLost {
            generation: Generation(lost.generation),
            applied: Step(lost.applied),
            peer: lost.peer.map(Rank),
            reason: lost.reason,
            at: Timestamp(lost.at_ms),
        },
        ReportKind::StepApplied(applied) => Report::StepApplied {
            generation: Generation(applied.generation),
            step: Step(applied.step),
            metrics: present(applied.metrics, "StepApplied", "metrics")?.into(),
            at: Timestamp(applied.at_ms),
        },
        ReportKind::Evaluated(evaluated) => Report::Evaluated {
            generation: Generation(evaluated.generation),
            evaluation: Evaluation {
                step: Step(evaluated.step),
                epoch: Epoch(evaluated.epoch),
                samples: evaluated.samples,
                weights: present(evaluated.weights, "Evaluated", "weights")?.try_into()?,
                ema: present(evaluated.ema, "Evaluated", "ema")?.try_into()?,
            },
        },
        ReportKind::ShareWritten(written) => Report::ShareWritten {
            generation: Generation(written.generation),
            share: Share {
                step: Step(written.step),
                parts: written.parts.into_iter().map(Into::into).collect(),
                parts_total: written.parts_total,
                part_bytes: written.part_bytes,
                sections: written.sections.into_iter().map(|s| (s.name, s.bytes)).collect(),
            },
        },
        ReportKind::ShareFailed(failed) => Report::ShareFailed {
            generation: Generation(failed.generation),
            step: Step(failed.step),
            reason: failed.reason,
        },
        ReportKind::CheckpointDamaged(damaged) => Report::CheckpointDamaged {
            generation: Generation(damaged.generation),
            step: Step(damaged.step),
            reason: damaged.reason,
        },
        ReportKind::Diverged(diverged) => Report::Diverged {
            generation: Generation(diverged.generation),
            step: Step(diverged.step),
            agreed: Step(diverged.agreed),
            odd: diverged.odd.map(Rank),
            reason: diverged.reason,
        },
        ReportKind::Finished(finished) => Report::Finished {
            generation: Generation(finished.generation),
            step: Step(finished.step),
            state_sha256: finished.state_sha256,
        },
        ReportKind::NodeFaulty(faulty) => Report::NodeFaulty { reason: faulty.reason },
        ReportKind::Ready(v1::Ready {}) => Report::Ready,
        ReportKind::Leaving(leaving) => Report::Leaving { reason: leaving.reason },
        ReportKind::Failed(failed) => Report::Failed { reason: failed.reason },
    })
}

/// A worker's progress for the wire.
#[must_use]
pub fn heartbeat(progress: &Progress) -> v1::Heartbeat {
    v1::Heartbeat {
        generation: progress.generation.0,
        applied: progress.applied.map(|step| step.0),
        phase: match progress.phase {
            StepPhase::Idle => v1::StepPhase::Idle,
            StepPhase::Form => v1::StepPhase::Form,
            StepPhase::Load => v1::StepPhase::Load,
            StepPhase::Compute => v1::StepPhase::Compute,
            StepPhase::Reduce => v1::StepPhase::Reduce,
            StepPhase::Update => v1::StepPhase::Update,
            StepPhase::Evaluate => v1::StepPhase::Evaluate,
            StepPhase::Checkpoint => v1::StepPhase::Checkpoint,
        }
        .into(),
        in_phase_ms: millis(progress.in_phase),
        resident_bytes: progress.resident_bytes,
        device: None,
    }
}

/// A worker's progress from the wire.
///
/// # Errors
/// [`Malformed`] if the phase is not one of ours.
pub fn progress(heartbeat: &v1::Heartbeat) -> Result<Progress, Malformed> {
    let phase = match heartbeat.phase() {
        v1::StepPhase::Unspecified => {
            return Err(Malformed {
                message: "Heartbeat",
                field: "phase",
                problem: "is not a known phase",
            });
        }
        v1::StepPhase::Idle => StepPhase::Idle,
        v1::StepPhase::Form => StepPhase::Form,
        v1::StepPhase::Load => StepPhase::Load,
        v1::StepPhase::Compute => StepPhase::Compute,
        v1::StepPhase::Reduce => StepPhase::Reduce,
        v1::StepPhase::Update => StepPhase::Update,
        v1::StepPhase::Evaluate => StepPhase::Evaluate,
        v1::StepPhase::Checkpoint => StepPhase::Checkpoint,
    };
    Ok(Progress {
        generation: Generation(heartbeat.generation),
        applied: heartbeat.applied.map(Step),
        phase,
        in_phase: Duration::from_millis(heartbeat.in_phase_ms),
        resident_bytes: heartbeat.resident_bytes,
    })
}

impl From<StepMetrics> for v1::StepMetrics {
    fn from(m: StepMetrics) -> Self {
        let StepMetrics {
            loss,
            gradient_norm,
            learning_rate,
            images,
            step_ms,
            load_ms,
            compute_ms,
            reduce_ms,
            update_ms,
        } = m;
        Self {
            loss,
            gradient_norm,
            learning_rate,
            images,
            step_ms,
            load_ms,
            compute_ms,
            reduce_ms,
            update_ms,
        }
    }
}

impl From<v1::StepMetrics> for StepMetrics {
    fn from(m: v1::StepMetrics) -> Self {
        let v1::StepMetrics {
            loss,
            gradient_norm,
            learning_rate,
            images,
            step_ms,
            load_ms,
            compute_ms,
            reduce_ms,
            update_ms,
        } = m;
        Self {
            loss,
            gradient_norm,
            learning_rate,
            images,
            step_ms,
            load_ms,
            compute_ms,
            reduce_ms,
            update_ms,
        }
    }
}

impl From<ExitScores> for v1::ExitScores {
    fn from(scores: ExitScores) -> Self {
        Self { top1: scores.top1.to_vec(), loss: scores.loss }
    }
}

impl TryFrom<v1::ExitScores> for ExitScores {
    type Error = Malformed;

    fn try_from(scores: v1::ExitScores) -> Result<Self, Malformed> {
        let problem = "needs one value an exit";
        let top1 = scores.top1.try_into().map_err(|_| Malformed {
            message: "ExitScores",
            field: "top1",
            problem,
        })?;
        Ok(Self { top1, loss: scores.loss })
    }
}

impl From<Part> for v1::Part {
    fn from(part: Part) -> Self {
        Self { index: part.index, bytes: part.bytes, digest: part.digest }
    }
}

impl From<v1::Part> for Part {
    fn from(part: v1::Part) -> Self {
        Self { index: part.index, bytes: part.bytes, digest: part.digest }
    }
}

// ---- Orders -----------------------------------------------------------------------------------

/// An order for the wire.
///
/// `welcome` and `secret` are what the host adds: what a worker needs to take part, and what opens
/// the connections between the members of a new generation.
#[must_use]
pub fn order_to_response(
    run: &str,
    term: Term,
    order: Order,
    welcome: &v1::Welcome,
    secret: impl Fn(Generation) -> [u8; 32],
) -> v1::SessionResponse {
    let kind = match order {
        Order::Welcome { .. } => ResponseKind::Welcome(welcome.clone()),
        Order::Form(group) => ResponseKind::Form(group_to_wire(&group, secret(group.generation))),
        Order::CheckpointAt { generation, step } => {
            ResponseKind::CheckpointAt(v1::CheckpointAt { generation: generation.0, step: step.0 })
        }
        Order::Hold { generation } => ResponseKind::Hold(v1::Hold { generation: generation.0 }),
        Order::Refuse { reason } => ResponseKind::Refuse(v1::Refuse { reason }),
        Order::Finish { step, state_sha256 } => {
            ResponseKind::Finish(v1::Finish { step: step.0, state_sha256 })
        }
        Order::Fail { reason } => ResponseKind::Fail(v1::Fail { reason }),
    };
    v1::SessionResponse { run: run.to_owned(), term: term.0, kind: Some(kind) }
}

/// An order from the wire; `None` for an acknowledgement, which is the host's own affair. A group must
/// be whole: [`Listener`](crate::Listener) understands all of them.
///
/// # Errors
/// [`Malformed`] if a field that must be there is not.
pub fn order_from_response(response: &v1::SessionResponse) -> Result<Option<Order>, Malformed> {
    let term = Term(response.term);
    let kind = present(response.kind.clone(), "SessionResponse", "kind")?;
    Ok(Some(match kind {
        ResponseKind::Welcome(_) => Order::Welcome { term },
        ResponseKind::Form(group) => Order::Form(group_from_wire(group)?),
        ResponseKind::CheckpointAt(at) => {
            Order::CheckpointAt { generation: Generation(at.generation), step: Step(at.step) }
        }
        ResponseKind::Hold(hold) => Order::Hold { generation: Generation(hold.generation) },
        ResponseKind::Refuse(refuse) => Order::Refuse { reason: refuse.reason },
        ResponseKind::Finish(finish) => {
            Order::Finish { step: Step(finish.step), state_sha256: finish.state_sha256 }
        }
        ResponseKind::Fail(fail) => Order::Fail { reason: fail.reason },
        ResponseKind::Ack(_) | ResponseKind::Roster(_) => return Ok(None),
    }))
}

#[cfg(test)]
mod tests {
    use cluster::{Group, Member};

    use super::*;

    fn reports() -> Vec<Report> {
        let generation = Generation(3);
        let step = Step(41);
        let metrics = StepMetrics { loss: 1.5, images: 64, step_ms: 12.5, ..Default::default() };
        let scores = ExitScores { top1: [0.1, 0.2, 0.3, 0.4], loss: 2.0 };
        let part = Part { index: 1, bytes: 7, digest: "ab".to_owned() };
        vec![
            Report::Heartbeat(Progress {
                generation,
                applied: Some(step),
                phase: StepPhase::Reduce,
                in_phase: Duration::from_millis(5),
                resident_bytes: 9,
            }),
            Report::Formed {
                generation,
                step,
                digest: "d".to_owned(),
                begun: Step(42),
                stopped_at: Some(Timestamp(8)),
                metrics: Some(metrics),
            },
            Report::FormFailed { generation, peer: Some(Rank(0)), reason: "r".to_owned() },
            Report::ExchangeLost {
                generation,
                applied: step,
                peer: None,
                reason: "r".to_owned(),
                at: Timestamp(5),
            },
            Report::StepApplied { generation, step, metrics, at: Timestamp(6) },
            Report::Evaluated {
                generation,
                evaluation: Evaluation {
                    step,
                    epoch: Epoch(2),
                    samples: 360,
                    weights: scores,
                    ema: scores,
                },
            },
            Report::ShareWritten {
                generation,
                share: Share {
                    step,
                    parts: vec![part],
                    parts_total: 4,
                    part_bytes: 100,
                    sections: vec![("params".to_owned(), 350)],
                },
            },
            Report::ShareFailed { generation, step, reason: "full".to_owned() },
            Report::CheckpointDamaged { generation, step, reason: "torn".to_owned() },
            Report::Diverged {
                generation,
                step,
                agreed: Step(40),
                odd: Some(Rank(2)),
                reason: "a bit".to_owned(),
            },
            Report::Finished { generation, step, state_sha256: "e".to_owned() },
            Report::NodeFaulty { reason: "Xid 79".to_owned() },
            Report::Ready,
            Report::Leaving { reason: "sigterm".to_owned() },
            Report::Failed { reason: "nan".to_owned() },
        ]
    }

    #[test]
    fn every_report_survives_the_wire() {
        for report in reports() {
            assert_eq!(report_from_wire(report_to_wire(1, &report)).unwrap(), report);
        }
    }

    #[test]
    fn every_order_survives_the_wire() {
        let member = Member {
            worker: WorkerId(u64::MAX),
            name: "worker-0".to_owned(),
            address: "127.0.0.1:9".to_owned(),
            block: 0..8,
        };
        let orders = [
            Order::Welcome { term: Term(4) },
            Order::Form(Group {
                generation: Generation(7),
                term: Term(3),
                members: [member].into(),
                planned: true,
                checkpoint: Some(Step(0)),
                checkpoint_at: None,
                evaluated: Some(Step(3)),
                last: true,
            }),
            Order::CheckpointAt { generation: Generation(7), step: Step(9) },
            Order::Hold { generation: Generation(7) },
            Order::Refuse { reason: "no".to_owned() },
            Order::Finish { step: Step(9), state_sha256: "f".to_owned() },
            Order::Fail { reason: "nan".to_owned() },
        ];
        for order in orders {
            let welcome = v1::Welcome::default();
            let sent = order_to_response("toy", Term(4), order.clone(), &welcome, |_| [7; 32]);
            assert_eq!(order_from_response(&sent).unwrap(), Some(order));
        }
    }

    #[test]
    fn a_message_without_its_kind_is_named() {
        let error = report_from_wire(v1::Report { sequence: 1, kind: None }).unwrap_err();
        assert_eq!(error.to_string(), "malformed message: Report.kind is missing");
        let empty = v1::Heartbeat::default();
        assert!(progress(&empty).unwrap_err().to_string().contains("Heartbeat.phase"));
    }
}
