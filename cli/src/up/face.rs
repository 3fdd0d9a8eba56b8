//! What a person sees while a run goes on: a bar on a terminal, plain lines elsewhere.

use std::{
    io::IsTerminal as _,
    time::{Duration, Instant},
};

use cluster::{Step, StepMetrics};
use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::print;

/// A line about progress is due after so much of the run …
const LINES: u64 = 20;
/// … or after so long.
const LINE_INTERVAL: Duration = Duration::from_secs(30);
/// How much of the known pace is kept at each step.
const PACE_KEPT: f64 = 0.9;

#[derive(Debug)]
pub(crate) struct Face {
    kind: Kind,
    steps_total: u64,
    steps_per_epoch: u64,
    step_ms: Option<f64>,
}

#[derive(Debug)]
enum Kind {
    Bar(ProgressBar),
    Lines { to_stderr: bool, said: u64, at: Instant },
}

/// How far the run is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Position {
    pub(crate) step: Step,
    pub(crate) generation: u64,
    pub(crate) workers: usize,
    pub(crate) metrics: Option<StepMetrics>,
}

impl Face {
    /// With `json` the standard output is left to the result.
    pub(crate) fn new(json: bool, steps_total: u64, steps_per_epoch: u64) -> Self {
        let kind = if !json && std::io::stdout().is_terminal() {
            let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {wide_msg}")
                .expect("the template is fixed");
            let target = ProgressDrawTarget::stdout();
            Kind::Bar(ProgressBar::with_draw_target(Some(steps_total), target).with_style(style))
        } else {
            Kind::Lines { to_stderr: json, said: 0, at: Instant::now() }
        };
        Self { kind, steps_total, steps_per_epoch, step_ms: None }
    }

    /// Something happened.
    pub(crate) fn line(&self, line: &str) {
        match &self.kind {
            Kind::Bar(bar) => bar.suspend(|| print::out(line)),
            Kind::Lines { to_stderr: true, .. } => print::err(line),
            Kind::Lines { to_stderr: false, .. } => print::out(line),
        }
    }

    /// The run is here.
    pub(crate) fn step(&mut self, position: &Position) {
        let step = position.step.0;
        if let Some(metrics) = position.metrics {
            let taken = f64::from(metrics.step_ms);
            let pace = self.step_ms.unwrap_or(taken);
            self.step_ms = Some(pace * PACE_KEPT + taken * (1.0 - PACE_KEPT));
        }
        let text = self.text(position);
        match &mut self.kind {
            Kind::Bar(bar) => {
                bar.set_position(step);
                bar.set_message(text);
            }
            Kind::Lines { to_stderr, said, at } => {
                let far = self.steps_total.div_ceil(LINES);
                if step >= *said + far || step == self.steps_total || at.elapsed() >= LINE_INTERVAL
                {
                    (*said, *at) = (step, Instant::now());
                    let line = format!("step {step}/{} {text}", self.steps_total);
                    if *to_stderr { print::err(&line) } else { print::out(&line) }
                }
            }
        }
    }

    /// No more progress will be shown.
    pub(crate) fn close(&self) {
        if let Kind::Bar(bar) = &self.kind {
            bar.finish_and_clear();
        }
    }

    fn text(&self, position: &Position) -> String {
        let step = position.step.0;
        let epoch = step.saturating_sub(1) / self.steps_per_epoch + 1;
        let epochs = self.steps_total.div_ceil(self.steps_per_epoch);
        let mut text = format!("epoch {epoch}/{epochs}");
        if let Some(metrics) = position.metrics {
            let pace = self.step_ms.unwrap_or_default();
            if pace > 0.0 {
                let images = f64::from(u32::try_from(metrics.images).unwrap_or(u32::MAX));
                text += &format!("  {:.1} img/s", images * 1e3 / pace);
            }
            text += &format!("  loss {:.4}", metrics.loss);
        }
        if let Some(left) = self.time_left(step) {
            text += &format!("  {} left", HumanDuration(left));
        }
        let workers = if position.workers == 1 { "worker" } else { "workers" };
        text + &format!("  generation {} of {} {workers}", position.generation, position.workers)
    }

    fn time_left(&self, step: u64) -> Option<Duration> {
        let steps = u32::try_from(self.steps_total.saturating_sub(step)).ok()?;
        Duration::try_from_secs_f64(self.step_ms? * f64::from(steps) / 1e3).ok()
    }
}
