//! Whatever happens, in whatever order: the ledger is the fold of the records.

use cluster::{Event, Generation, Ledger, Report, Step, StepPhase, WorkerId};
use proptest::prelude::*;

use crate::table::*;

fn reports() -> impl Strategy<Value = Report> {
    let (generation, step) = (1u64..6, 0u64..101);
    (0..10u32, generation, step, prop::option::of(0u32..4)).prop_map(|(kind, g, step, peer)| {
        let generation = Generation(g);
        match kind {
            0 => beat(generation, StepPhase::Form),
            1 => beat(generation, StepPhase::Compute),
            2 | 3 => formed(generation, step % 3),
            4 => form_failed(generation, peer),
            5 => lost(generation, peer),
            6 => applied(generation, step),
            7 => evaluated(generation, step),
            8 => share(generation, 100, &[peer.unwrap_or(0)]),
            _ => Report::Finished { generation, step: Step(100), state_sha256: "f00d".to_owned() },
        }
    })
}

fn events() -> impl Strategy<Value = Event> {
    let worker = (0xAu64..0xE).prop_map(WorkerId);
    (0..18u32, worker, reports(), 0u64..101).prop_map(|(kind, worker, report, step)| match kind {
        0 | 1 => Event::WorkerJoined { worker, hello: hello(worker) },
        2 => Event::SessionClosed { worker },
        3 => Event::ProcessExited { worker, how: "signal 9".to_owned() },
        4 => Event::DrainRequested { worker },
        5 => Event::CheckpointCommitted { step: Step(step) },
        6 => Event::DeadlineReached,
        7 => Event::ResizeRequested { workers: u32::try_from(step % 10).expect("it is small") },
        8 => Event::CheckpointRequested,
        _ => Event::Reported { worker, report },
    })
}

proptest! {
    #[test]
    fn the_ledger_is_the_fold_of_the_records(
        history in prop::collection::vec((0u64..1_500, events()), 0..80),
        restarts in prop::collection::btree_set(0usize..80, 0..3),
    ) {
        let mut table = Table::new(config(2));
        for (at, (wait, event)) in history.into_iter().enumerate() {
            if restarts.contains(&at) {
                table = table.restart();
            }
            let before = table.coordinator.ledger().clone();
            table.wait_ms(wait);
            table.handle(event);
            let mut fold = Ledger::default();
            table.log.iter().for_each(|record| fold.apply(record));
            let ledger = table.coordinator.ledger();
            prop_assert_eq!(ledger, &fold);
            prop_assert!(ledger.generation >= before.generation);
            prop_assert!(ledger.canonical >= before.canonical);
        }
    }
}
