//! Sessions: ordered like TCP while they last, and lost with all that is in flight.

use cluster::{Hello, Order, Report, Term, Timestamp, WorkerId};

use crate::{
    host::Inside,
    world::{Happening, World},
};

/// From a worker to the coordinator.
#[derive(Debug, Clone)]
pub(crate) enum Up {
    Hello(Hello),
    /// Heartbeats have sequence 0.
    Report(u64, Report),
}

/// From the coordinator to a worker.
#[derive(Debug, Clone)]
pub(crate) enum Down {
    Order(Term, Order),
    /// All reports up to this one have had their effect.
    Ack(u64),
    End,
}

#[derive(Debug, Clone)]
pub(crate) struct Session {
    pub(crate) worker: WorkerId,
    /// Which life of the coordinator it leads to.
    pub(crate) life: u64,
    /// Nothing passes any more, in either direction.
    cut: bool,
    /// Until when nothing passes, upwards and downwards; it is kept meanwhile.
    held: [Timestamp; 2],
    up_last: Timestamp,
    down_last: Timestamp,
}

impl World {
    pub(crate) fn open_session(&mut self, worker: WorkerId) -> u64 {
        let id = self.sessions.len() as u64 + 1;
        let (life, now) = (self.office.life, self.now);
        let held = [now; 2];
        let session = Session { worker, life, cut: false, held, up_last: now, down_last: now };
        self.sessions.insert(id, session);
        id
    }

    pub(crate) fn send_up(&mut self, session: u64, message: Up) {
        let delay = self.delay();
        let at = Timestamp(self.now.0 + delay);
        let link = self.sessions.get_mut(&session).expect("it was opened");
        link.up_last = link.up_last.max(at).max(link.held[0]);
        let at = link.up_last;
        self.at(at, Happening::Up { session, message });
    }

    pub(crate) fn send_down(&mut self, session: u64, message: Down) {
        let delay = self.delay();
        let at = Timestamp(self.now.0 + delay);
        let link = self.sessions.get_mut(&session).expect("it was opened");
        link.down_last = link.down_last.max(at).max(link.held[1]);
        let at = link.down_last;
        self.at(at, Happening::Down { session, message });
    }

    pub(crate) fn is_cut(&self, session: u64) -> bool {
        self.sessions.get(&session).is_none_or(|session| session.cut)
    }

    pub(crate) fn cut_session_of(&mut self, worker: WorkerId) {
        if let Some(session) = self.workers.get(&worker).and_then(|worker| worker.session) {
            self.tell(|| format!("the session of {worker} breaks"));
            self.cut(session);
            let notice = self.chance.between(0..=300);
            let what = Inside::SessionLost { session };
            self.after(notice, Happening::Inside { worker, what });
            let long = self.chance.percent(20);
            let notice = self.chance.between(if long { 1_000..=10_000 } else { 0..=300 });
            self.after(notice, Happening::SessionEndSeen { session });
        }
    }

    /// One direction of a session is blocked for a while. What was sent is sent again by the transport
    /// until it passes, in order, unless the session breaks first.
    pub(crate) fn block_one_way(&mut self, worker: WorkerId) {
        let Some(session) = self.workers.get(&worker).and_then(|worker| worker.session) else {
            return;
        };
        let way = usize::from(self.chance.percent(50));
        let long = self.chance.percent(40);
        let ms = self.chance.between(if long { 1_000..=15_000 } else { 50..=900 });
        let survives = self.chance.percent(50);
        self.tell(|| format!("way {way} of the session of {worker} is blocked for {ms} ms"));
        let until = Timestamp(self.now.0 + ms);
        self.sessions.get_mut(&session).expect("it was opened").held[way] = until;
        self.at(until, Happening::Healed { session, survives });
    }

    pub(crate) fn heal(&mut self, session: u64, survives: bool) {
        let worker = self.sessions[&session].worker;
        let current = self.workers.get(&worker).and_then(|worker| worker.session);
        if !survives && current == Some(session) {
            self.cut_session_of(worker);
        }
    }

    pub(crate) fn cut(&mut self, session: u64) {
        self.sessions.get_mut(&session).expect("it was opened").cut = true;
    }

    /// A process has died: what it sent may still arrive, then the end of the session.
    pub(crate) fn worker_end_gone(&mut self, session: u64, is_seen: bool) {
        if self.chance.percent(30) {
            self.cut(session);
        }
        if is_seen {
            let delay = self.delay();
            let last = self.sessions[&session].up_last.max(self.now);
            self.at(Timestamp(last.0 + delay), Happening::SessionEndSeen { session });
        }
    }
}
