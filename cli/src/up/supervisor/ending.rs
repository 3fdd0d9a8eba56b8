//! The end: no process is left behind, and a person learns what to do next.

use tokio::time::{Instant, timeout_at};

use super::{children::Coordinator, *};

/// How long workers and coordinator may take to end by themselves when the run has ended.
const FAREWELL: Duration = Duration::from_secs(8);
/// How long they may take when they are asked to.
const ASKED: Duration = Duration::from_secs(5);
/// A killed process is gone within that.
const KILLED: Duration = Duration::from_secs(5);

impl Supervisor {
    /// Ends all processes, and says how the run ended.
    pub(super) async fn end(
        mut self,
        exit: Exit,
        receiver: &mut mpsc::Receiver<Happening>,
    ) -> Result<Ending> {
        if matches!(exit, Exit::Ended(_)) {
            self.wait_until_gone(receiver, FAREWELL).await;
        } else {
            self.face.line("stopping");
        }
        self.workers.values_mut().for_each(Worker::ask_to_end);
        self.seats
            .iter()
            .filter_map(|seat| seat.coordinator.as_ref())
            .for_each(Coordinator::ask_to_end);
        self.wait_until_gone(receiver, ASKED).await;
        self.workers.values_mut().for_each(Worker::kill);
        self.seats
            .iter_mut()
            .filter_map(|seat| seat.coordinator.as_mut())
            .for_each(Coordinator::kill);
        self.wait_until_gone(receiver, KILLED).await;
        self.tasks.iter().for_each(JoinHandle::abort);
        for number in (0..).take(self.seats.len()) {
            std::fs::remove_file(self.dir.address_of(number)).ok(); // Nobody listens there any more.
        }
        self.face.close();
        self.say_how(exit)
    }

    fn say_how(&self, exit: Exit) -> Result<Ending> {
        let dir = &self.dir;
        match exit {
            Exit::Ended(Outcome::Finished { .. }) => {
                for left in self.chaos.rest() {
                    self.face.line(&format!("chaos {left}: the run never came to it"));
                }
                let summary = self.report.summary(self.plan.run.as_str(), dir.location());
                Ok(Ending::Finished(Box::new(summary.context("the end of the run is unknown")?)))
            }
            Exit::Ended(Outcome::Failed { reason }) => {
                bail!("run {} failed: {reason}", self.plan.run)
            }
            Exit::Interrupted => {
                let step = self.report.ledger().checkpoints.last().copied().unwrap_or_default();
                let workers = self.plan.workers_expected;
                self.face.line(&format!(
                    "stopped; `percheron up --run-dir {dir} --workers {workers}` goes on from step \
                     {step}"
                ));
                Ok(Ending::Interrupted)
            }
            Exit::GaveUp(error) => Err(error),
        }
    }

    /// Takes in what happens until no process is left, `patience` is out, or somebody cannot wait.
    async fn wait_until_gone(
        &mut self,
        receiver: &mut mpsc::Receiver<Happening>,
        patience: Duration,
    ) {
        let end = Instant::now() + patience;
        while self.seats.iter().any(|seat| seat.coordinator.is_some()) || !self.workers.is_empty() {
            let Ok(Some(happening)) = timeout_at(end, receiver.recv()).await else { return };
            match happening {
                Happening::WorkerEnded(number, _) => drop(self.workers.remove(&number)),
                Happening::CoordinatorEnded(number, _) => self.seat(number).coordinator = None,
                Happening::News(News::Entry(entry)) => self.report.apply(&entry),
                Happening::News(News::Liveness(liveness)) => self.report.heard(&liveness),
                Happening::Interrupted => return,
                Happening::News(News::Lost(_))
                | Happening::Serving(..)
                | Happening::CoordinatorDue(_)
                | Happening::WorkersDue
                | Happening::LastKept(_) => {}
            }
        }
    }
}
