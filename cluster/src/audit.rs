//! Proves from the event log that a run did what it was meant to do, or names the first record that
//! says otherwise.
//!
//! What is proved: every step was adopted exactly once and in order; so, by the data plan, every sample
//! of every epoch was consumed exactly once (but for those that `drop_last` leaves out, which are
//! named); terms and generations only grow; who trains had joined and was not lost; states that were
//! compared at one step were equal; each committed checkpoint belongs to a step that was adopted.

mod consumption;

use std::{collections::BTreeMap, fmt};

use self::consumption::Consumption;
pub use self::consumption::{EpochProof, Samples};
use crate::{
    Evaluation, Ledger, Member, Outcome, Record, RunConfig, Step, Term, Timestamp, WorkerId,
};

/// What the log proves.
#[derive(Debug, Clone, PartialEq)]
pub struct Proof {
    /// Records read.
    pub records: u64,
    /// The ledger after the last of them.
    pub ledger: Ledger,
    /// Steps that the run is to make.
    pub steps_total: Step,
    /// What each epoch consumed, in order; the last may not be complete.
    pub epochs: Vec<EpochProof>,
    /// Workers that were lost.
    pub losses: u64,
    /// Checkpoints committed, those since given up included.
    pub committed: u64,
    /// Of those, the ones whose step the run has not adopted yet.
    pub awaiting: Vec<Step>,
    /// Steps at which the members of a generation compared their states.
    pub compared: u64,
}

/// The first record that cannot be true.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("record {sequence}: {found}; expected {expected}")]
pub struct Contradiction {
    /// Its place in the log, from 1.
    pub sequence: u64,
    /// What it says.
    pub found: String,
    /// What the records before it, or the plan, ask for.
    pub expected: String,
}

/// The records, with their places and times, against the plan and the data it was made for.
///
/// `planned` is what the recipe makes of the data as it is now.
///
/// # Errors
/// The first [`Contradiction`].
pub fn audit<'a>(
    planned: &RunConfig,
    samples: &dyn Samples,
    records: impl IntoIterator<Item = (u64, Timestamp, &'a Record)>,
) -> Result<Proof, Contradiction> {
    let mut auditor = Auditor::new(planned, samples);
    let mut next = 1;
    let mut newest = Timestamp(0);
    for (sequence, at, record) in records {
        auditor.sequence = next;
        auditor.require(sequence == next, || {
            (format!("the log goes on with record {sequence}"), format!("record {next}"))
        })?;
        auditor.require(at >= newest, || {
            (format!("it was written at {} ms", at.0), format!("no time before {} ms", newest.0))
        })?;
        auditor.read(record)?;
        auditor.ledger.apply(record);
        (next, newest) = (next + 1, at);
    }
    auditor.sequence = next;
    auditor.conclude(next - 1)
}

/// A claim that does not hold: what was found, and what should have been.
type Claim = (String, String);

struct Auditor<'a> {
    planned: &'a RunConfig,
    ledger: Ledger,
    sequence: u64,
    /// Workers that have joined and were not lost, whom records may speak of: name, and the term in
    /// which they joined. One that has no part in the run is forgotten when a new term starts.
    present: BTreeMap<WorkerId, (String, Term)>,
    consumption: Consumption<'a>,
    /// Digest of the state after a step, where one was compared.
    digests: BTreeMap<Step, String>,
    /// Checkpoints of steps that are not adopted yet, with the place of their record.
    awaiting: BTreeMap<Step, u64>,
    losses: u64,
    committed: u64,
}

impl<'a> Auditor<'a> {
    fn new(planned: &'a RunConfig, samples: &'a dyn Samples) -> Self {
        Self {
            planned,
            ledger: Ledger::default(),
            sequence: 0,
            present: BTreeMap::new(),
            consumption: Consumption::new(samples),
            digests: BTreeMap::new(),
            awaiting: BTreeMap::new(),
            losses: 0,
            committed: 0,
        }
    }

    fn require(&self, holds: bool, claim: impl FnOnce() -> Claim) -> Result<(), Contradiction> {
        if holds {
            return Ok(());
        }
        let (found, expected) = claim();
        Err(Contradiction { sequence: self.sequence, found, expected })
    }

    fn read(&mut self, record: &Record) -> Result<(), Contradiction> {
        if let Record::RunCreated { config } = record {
            return self.run_created(config);
        }
        let found = || name(record).to_owned();
        self.require(self.sequence > 1, || (found(), "the run's creation first".to_owned()))?;
        let is_led = self.ledger.term.0 > 0 || matches!(record, Record::TermStarted { .. });
        self.require(is_led, || (found(), "a term first".to_owned()))?;
        match record {
            Record::TermStarted { term } => {
                // It expects all back that held the state, even those that had been given up.
                let (before, next) = (self.ledger.term, self.ledger.term.next());
                for Member { worker, name, .. } in &self.ledger.intact_members {
                    self.present.entry(*worker).or_insert_with(|| (name.clone(), before));
                }
                self.require(*term == next, || (format!("term {term}"), format!("term {next}")))
            }
            Record::FingerprintFixed { .. } => {
                let is_first = self.ledger.fingerprint.is_none();
                self.require(is_first, || (found(), "one fingerprint only".to_owned()))
            }
            Record::WorkerJoined { worker, name, .. } => {
                let term = self.ledger.term;
                let before = self.present.insert(*worker, (name.clone(), term));
                let is_new = before.is_none_or(|(_, joined)| joined < term);
                self.require(is_new, || {
                    (format!("{name} joins"), "it to be lost before it joins again".to_owned())
                })
            }
            Record::WorkerLost { worker, name, .. } => {
                self.losses += 1;
                let known = self.present.remove(worker);
                self.require(known.is_some_and(|(known, _)| known == *name), || {
                    (format!("{name} is lost"), "a worker that had joined".to_owned())
                })
            }
            Record::ExchangeLost { worker, generation, .. } => {
                let holds = *generation == self.ledger.generation && self.is_member(*worker);
                self.require(holds, || {
                    (
                        format!("a worker's exchange broke in generation {generation}"),
                        format!("a member of generation {}", self.ledger.generation),
                    )
                })
            }
            Record::GenerationOpened { .. } => self.generation_opened(record),
            Record::GenerationFormed { .. } => self.generation_formed(record),
            Record::StepAdopted { .. } => self.step_adopted(record),
            Record::Evaluated { evaluation, .. } => self.evaluated(evaluation),
            Record::CheckpointCommitted { step } => self.checkpoint_committed(*step),
            Record::RunFinished { step, .. } => self.run_finished(*step),
            Record::RunFailed { .. } => self.goes_on("the run fails"),
            Record::CheckpointAbandoned { step, .. } => {
                self.awaiting.remove(step);
                Ok(())
            }
            Record::NodeReadmitted { node } => {
                let is_marked = self.ledger.faulty.contains_key(node);
                self.require(is_marked, || {
                    (format!("machine {node} is whole again"), "a machine marked before".to_owned())
                })
            }
            Record::RunCreated { .. }
            | Record::WorkerRefused { .. }
            | Record::NodeMarked { .. }
            | Record::Resized { .. } => Ok(()),
        }
    }

    fn run_created(&self, config: &RunConfig) -> Result<(), Contradiction> {
        self.require(self.sequence == 1, || {
            ("the run is created again".to_owned(), "one creation, as record 1".to_owned())
        })?;
        let facts = |config: &RunConfig| {
            [
                ("virtual ranks", u64::from(config.virtual_ranks)),
                ("steps an epoch", config.steps_per_epoch),
                ("steps in all", config.steps_total.0),
            ]
        };
        for ((fact, found), (_, expected)) in facts(config).into_iter().zip(facts(self.planned)) {
            self.require(found == expected, || {
                (
                    format!("the run was planned with {found} {fact}"),
                    format!("{expected}, which follows from the recipe and the data"),
                )
            })?;
        }
        let found = self.consumption.steps_per_epoch();
        self.require(found == config.steps_per_epoch, || {
            (
                format!("the run was planned with {} steps an epoch", config.steps_per_epoch),
                format!("{found}, as the order of the samples has it"),
            )
        })
    }

    fn generation_opened(&self, record: &Record) -> Result<(), Contradiction> {
        let Record::GenerationOpened { generation, members, .. } = record else { return Ok(()) };
        self.goes_on(&format!("generation {generation} is opened"))?;
        let next = self.ledger.generation.next();
        self.require(*generation == next, || {
            (format!("generation {generation}"), format!("generation {next}"))
        })?;
        for Member { worker, name, .. } in members {
            self.require(self.present.contains_key(worker), || {
                (
                    format!("{name} is a member of generation {generation}"),
                    "members that have joined and are not lost".to_owned(),
                )
            })?;
        }
        let mut hosted = 0;
        for member in members {
            let holds = member.block.start == hosted && !member.block.is_empty();
            self.require(holds, || {
                (
                    format!("{} hosts virtual ranks {:?}", member.name, member.block),
                    format!("the next one, {hosted}"),
                )
            })?;
            hosted = member.block.end;
        }
        let wanted = self.planned.virtual_ranks;
        self.require(hosted == wanted, || {
            (
                format!("generation {generation} hosts {hosted} virtual ranks"),
                format!("all {wanted}"),
            )
        })
    }

    fn generation_formed(&mut self, record: &Record) -> Result<(), Contradiction> {
        let Record::GenerationFormed { generation, step, digest, repeated, .. } = record else {
            return Ok(());
        };
        self.goes_on(&format!("generation {generation} forms"))?;
        let Ledger { generation: newest, formed, canonical, inherited, .. } = &self.ledger;
        self.require(generation == newest && !formed, || {
            (format!("generation {generation} forms"), format!("generation {newest}, once"))
        })?;
        self.require(step <= canonical, || {
            (
                format!("generation {generation} resumes from step {step}"),
                format!("a step that was adopted, up to {canonical}"),
            )
        })?;
        let lost = inherited.0.saturating_sub(step.0);
        self.require(*repeated >= lost, || {
            (format!("{repeated} steps are repeated"), format!("at least {lost}"))
        })?;
        let agreed = self.digests.entry(*step).or_insert_with(|| digest.clone()).clone();
        self.require(agreed == *digest, || {
            (
                format!("the state after step {step} has the digest {digest}"),
                format!("{agreed}, as an earlier generation found"),
            )
        })
    }

    fn step_adopted(&mut self, record: &Record) -> Result<(), Contradiction> {
        let Record::StepAdopted { step, generation, metrics, .. } = record else { return Ok(()) };
        self.goes_on(&format!("step {step} is adopted"))?;
        let next = self.ledger.canonical.next();
        self.require(*step == next, || {
            (format!("step {step} is adopted"), format!("step {next}: each once, in order"))
        })?;
        let Ledger { generation: newest, intact, .. } = &self.ledger;
        let is_current = generation == newest || Some(*generation) == *intact;
        self.require(is_current && generation.0 > 0, || {
            (
                format!("step {step} is adopted from generation {generation}"),
                format!("generation {newest}, or the intact one before it"),
            )
        })?;
        let total = self.planned.steps_total;
        self.require(*step <= total, || {
            (format!("step {step} is adopted"), format!("{total} steps in all"))
        })?;
        if let Some(metrics) = metrics {
            let batch = self.consumption.global_batch();
            self.require(metrics.images == batch, || {
                (format!("step {step} saw {} images", metrics.images), format!("{batch}"))
            })?;
        }
        self.awaiting.remove(step);
        let consumed = self.consumption.consume(*step);
        consumed.map_err(|(found, expected)| Contradiction {
            sequence: self.sequence,
            found,
            expected,
        })
    }

    fn evaluated(&self, evaluation: &Evaluation) -> Result<(), Contradiction> {
        let Evaluation { step, epoch, .. } = evaluation;
        self.goes_on(&format!("step {step} is evaluated"))?;
        let before = self.ledger.evaluated;
        let is_news = before < Some(*step) && *step <= self.planned.steps_total;
        self.require(is_news, || {
            (
                format!("step {step} is evaluated"),
                format!("a step after {}", before.unwrap_or_default()),
            )
        })?;
        let expected = step.0 / self.planned.steps_per_epoch;
        self.require(epoch.0 == expected, || {
            (format!("step {step} ends epoch {epoch}"), format!("epoch {expected}"))
        })
    }

    fn checkpoint_committed(&mut self, step: Step) -> Result<(), Contradiction> {
        self.committed += 1;
        let found = || format!("the checkpoint of step {step} is committed");
        let is_new = self.ledger.checkpoints.binary_search(&step).is_err();
        self.require(is_new, || (found(), "one commit of a step".to_owned()))?;
        let total = self.planned.steps_total;
        self.require(step <= total, || (found(), format!("{total} steps in all")))?;
        if step > self.ledger.canonical {
            // The news of the step may still be on its way; it must come.
            self.awaiting.insert(step, self.sequence);
        }
        Ok(())
    }

    fn run_finished(&mut self, step: Step) -> Result<(), Contradiction> {
        self.goes_on("the run finishes")?;
        let Ledger { canonical, checkpoints, .. } = &self.ledger;
        let total = self.planned.steps_total;
        self.require(step == total && *canonical == total, || {
            (
                format!("the run finishes at step {step}, and step {canonical} was adopted last"),
                format!("step {total}"),
            )
        })?;
        self.require(checkpoints.last() == Some(&total), || {
            let last = checkpoints.last().copied().unwrap_or_default();
            (
                format!("the run finishes with step {last} as its last checkpoint"),
                format!("a checkpoint of step {total}"),
            )
        })
    }

    fn goes_on(&self, found: &str) -> Result<(), Contradiction> {
        self.require(self.ledger.outcome.is_none(), || {
            (found.to_owned(), "nothing more: the run had ended".to_owned())
        })
    }

    fn is_member(&self, worker: WorkerId) -> bool {
        self.ledger.members.iter().any(|member| member.worker == worker)
    }

    fn conclude(self, records: u64) -> Result<Proof, Contradiction> {
        self.require(records > 0, || {
            ("the log is empty".to_owned(), "the run's creation".to_owned())
        })?;
        let is_over = matches!(self.ledger.outcome, Some(Outcome::Finished { .. }));
        if let Some((&step, &sequence)) = self.awaiting.first_key_value()
            && is_over
        {
            let found = format!("the checkpoint of step {step} is committed");
            let expected = "a step that the run adopted".to_owned();
            return Err(Contradiction { sequence, found, expected });
        }
        Ok(Proof {
            records,
            steps_total: self.planned.steps_total,
            epochs: self.consumption.into_epochs(),
            losses: self.losses,
            committed: self.committed,
            awaiting: self.awaiting.into_keys().collect(),
            compared: self.digests.len() as u64,
            ledger: self.ledger,
        })
    }
}

impl fmt::Display for Proof {
    /// One sentence that says what is proved.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Ledger { canonical, generation, term, repeated, .. } = &self.ledger;
        let complete: Vec<_> = self.epochs.iter().filter(|epoch| epoch.is_complete).collect();
        let consumed: u64 = self.epochs.iter().map(|epoch| epoch.consumed).sum();
        let left_out: usize = complete.iter().map(|epoch| epoch.left_out.len()).sum();
        write!(
            f,
            "proved from {} records: steps 1 to {canonical} of {} adopted once each, in order; {consumed} \
             samples of {} complete epochs and {} begun consumed exactly once each ({left_out} left out \
             by drop_last); {generation} generations and {term} terms, each after the other; {} losses, \
             {repeated} steps repeated; states equal wherever compared ({} steps); {} checkpoints of \
             adopted steps",
            self.records,
            self.steps_total,
            complete.len(),
            self.epochs.len() - complete.len(),
            self.losses,
            self.compared,
            self.committed - self.awaiting.len() as u64,
        )?;
        match self.awaiting.as_slice() {
            [] => Ok(()),
            steps => write!(f, ", {} of steps still to be adopted", steps.len()),
        }
    }
}

/// What a record says, in two words.
fn name(record: &Record) -> &'static str {
    match record {
        Record::RunCreated { .. } => "the run is created",
        Record::TermStarted { .. } => "a term starts",
        Record::FingerprintFixed { .. } => "the fingerprint is fixed",
        Record::WorkerJoined { .. } => "a worker joins",
        Record::WorkerRefused { .. } => "a worker is refused",
        Record::WorkerLost { .. } => "a worker is lost",
        Record::ExchangeLost { .. } => "an exchange breaks",
        Record::NodeMarked { .. } => "a machine is marked as faulty",
        Record::NodeReadmitted { .. } => "a machine is readmitted",
        Record::Resized { .. } => "the run is resized",
        Record::GenerationOpened { .. } => "a generation is opened",
        Record::GenerationFormed { .. } => "a generation forms",
        Record::StepAdopted { .. } => "a step is adopted",
        Record::Evaluated { .. } => "a step is evaluated",
        Record::CheckpointCommitted { .. } => "a checkpoint is committed",
        Record::CheckpointAbandoned { .. } => "a checkpoint is given up",
        Record::RunFinished { .. } => "the run finishes",
        Record::RunFailed { .. } => "the run fails",
    }
}
