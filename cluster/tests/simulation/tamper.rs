//! Bugs put into the world on purpose: each breaks one invariant, so that no invariant is idle.

/// A bug.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tamper {
    Nothing,
    /// The host announces generations that it has not made durable.
    AnnouncesBeforeDurable,
    /// The host loses the records of steps.
    LosesSteps,
    /// The host writes each step twice.
    AdoptsTwice,
    /// The host leaves a step out.
    SkipsAStep,
    /// The host leaves the number of a generation out.
    SkipsAGeneration,
    /// The host writes that the generation before did a step.
    AdoptsFromThePast,
    /// The host writes a generation after the end.
    OpensAfterTheEnd,
    /// The log has lost its newest step when the coordinator is started again.
    ForgetsTheTail,
    /// The log has lost the terms when the coordinator is started again.
    ForgetsTheTerms,
    /// The host never calls the coordinator at its deadlines.
    MissesDeadlines,
    /// The host's clock stands still.
    StopsTheClock,
    /// The host lets reports of an older generation pass as news.
    PassesOldNews,
    /// The host tells nobody of the end.
    KeepsTheEnd,
    /// A supervisor reports the end of a process that lives.
    ReportsFalseDeaths,
    /// A worker adds wrongly, once in a while.
    AddsWrongly,
    /// A worker writes a wrong part of a checkpoint.
    WritesWrongly,
    /// All workers compute a wrong digest at the end.
    EndsWrongly,
    /// A worker names a wrong digest when it has formed a generation.
    FormsWrongly,
    /// A worker leaves evaluations out.
    SkipsEvaluations,
    /// A worker that is asked to leave after the step leaves at once.
    LeavesAtOnce,
    /// The lowest step wins when a generation forms.
    LowestStepWins,
    /// Members that are ordered into a new generation go on in the old one as well.
    KeepsTraining,
    /// Workers never say for how long they have been in a phase.
    HidesHangs,
    /// The host mistakes the heartbeats of a worker that hangs for those of another.
    BlamesAnother,
    /// Somebody takes a step out of the log of a run that is over.
    EditsTheLog,
}
