//! What was said and not yet acknowledged: said again after an interruption.

use std::collections::VecDeque;

use cluster::Report;
use proto::v1;

/// Numbered reports, oldest first.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    unacknowledged: VecDeque<v1::Report>,
    last: u64,
}

impl Outbox {
    /// Numbers a report and keeps it; returns it as it goes on the wire.
    pub(super) fn push(&mut self, report: &Report) -> v1::Report {
        self.last += 1;
        let wire = proto::report_to_wire(self.last, report);
        self.unacknowledged.push_back(wire.clone());
        wire
    }

    /// All up to `sequence` have had their effect.
    pub(super) fn acknowledge(&mut self, sequence: u64) {
        while self.unacknowledged.front().is_some_and(|report| report.sequence <= sequence) {
            self.unacknowledged.pop_front();
        }
    }

    /// What has to be said again in a new session.
    pub(super) fn unacknowledged(&self) -> impl Iterator<Item = &v1::Report> {
        self.unacknowledged.iter()
    }

    /// Whether all that was said has arrived.
    pub(super) fn is_empty(&self) -> bool {
        self.unacknowledged.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_acknowledged_is_kept_in_order() {
        let mut outbox = Outbox::default();
        for reason in ["a", "b", "c"] {
            outbox.push(&Report::Failed { reason: reason.to_owned() });
        }
        outbox.acknowledge(2);
        let left: Vec<u64> = outbox.unacknowledged().map(|report| report.sequence).collect();
        assert_eq!(left, [3]);
        outbox.acknowledge(1);
        assert!(!outbox.is_empty());
        outbox.acknowledge(3);
        assert!(outbox.is_empty());
    }
}
