//! Virtual time, the contenders, what goes wrong, and what must hold.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
    fmt,
    time::Duration,
};

use cluster::{
    Action, Claim, Due, Found, Generation, Group, Leadership, Member, Notice, Order, Participant,
    Term, Timestamp, WorkerId,
};

use crate::{
    chance::Chance,
    store::{Entry, Life, Object, Store},
};

const LEASE: Duration = Duration::from_millis(1_200);
/// After this nothing goes wrong any more.
const TROUBLE_MS: u64 = 6_000;
const END_MS: u64 = 14_000;
/// A request without an answer is given up after so long; it may still be carried out.
const TIMEOUT_MS: u64 = 400;
const WORKERS: usize = 2;

/// A bug that is put in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tamper {
    Nothing,
    /// Whoever claims a term has it.
    ClaimsWithoutCompare,
    /// Whoever appends at a place has it.
    AppendsWithoutCompare,
    /// Old entries are deleted after they were copied elsewhere.
    FreesNames,
}

/// What is shown of a seed in which all was well.
#[derive(Debug, Default)]
pub(crate) struct Summary {
    pub(crate) records: u64,
    pub(crate) terms: u64,
    pub(crate) fenced: u64,
}

#[derive(Debug)]
pub(crate) struct Failure {
    seed: u64,
    pub(crate) invariant: &'static str,
    what: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, invariant, what } = self;
        write!(f, "seed {seed}: {invariant}: {what}; replay it with PERCHERON_SIM_SEED={seed}")
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    /// What a node does by itself.
    Tick(Life),
    Decide(Life),
    /// A request reaches the store.
    Put(usize),
    Read(usize),
    /// An answer, or that none came, reaches who asked.
    Answered(usize),
    /// Faults.
    Kill(usize),
    Start(usize),
    Release(Life),
    Stop(Life, u64),
    /// An order reaches a worker.
    Ordered(usize, usize),
}

/// What was asked of the store.
#[derive(Debug, Clone)]
struct Request {
    by: Life,
    began: Timestamp,
    what: Asked,
    answer: Answer,
}

#[derive(Debug, Clone, Copy)]
enum Asked {
    Look,
    Renew { term: Term, beat: u64 },
    Create(Object),
    ReadLog,
}

#[derive(Debug, Clone, Default)]
enum Answer {
    #[default]
    Unknown,
    Newest(Option<Claim>),
    Newer(Option<Term>),
    Ours(bool),
    Last(u64, Option<Entry>),
}

/// How far a leader is with the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Log {
    Closed,
    Reading,
    Appending { place: u64, entry: Entry, opens: bool },
    Open { last: u64 },
}

#[derive(Debug)]
struct Node {
    life: Life,
    alive: bool,
    stopped_until: u64,
    lead: Leadership,
    lease_request: Option<usize>,
    log: Log,
    log_request: Option<usize>,
    /// How its clock differs: an offset, and its rate in thousandths.
    clock: (u64, u64),
    nonce: u64,
}

struct World {
    seed: u64,
    tamper: Tamper,
    chance: Chance,
    now: u64,
    queue: BinaryHeap<Reverse<(u64, u64, Step)>>,
    order: u64,
    store: Store,
    nodes: Vec<Node>,
    requests: Vec<Request>,
    workers: Vec<Participant>,
    orders: Vec<(u64, Entry)>,
    effects: BTreeMap<u64, Entry>,
    leaders: BTreeMap<Term, Life>,
    /// What a bug has deleted from the log, as it was copied before.
    copied: BTreeMap<u64, Entry>,
    summary: Summary,
}

type Checked = Result<(), (&'static str, String)>;

/// # Errors
/// The first invariant that does not hold.
pub(crate) fn simulate(seed: u64, tamper: Tamper) -> Result<Summary, Failure> {
    let mut world = World::new(seed, tamper);
    let checked = world.run();
    let summary = std::mem::take(&mut world.summary);
    checked.map(|()| summary).map_err(|(invariant, what)| Failure { seed, invariant, what })
}

fn name(life: Life) -> String {
    format!("node-{}", life.node)
}

impl World {
    fn new(seed: u64, tamper: Tamper) -> Self {
        let mut chance = Chance::new(seed);
        let mut store = Store::default();
        store.overwrites =
            (tamper == Tamper::ClaimsWithoutCompare, tamper == Tamper::AppendsWithoutCompare);
        let mut world = Self {
            seed,
            tamper,
            now: 0,
            queue: BinaryHeap::new(),
            order: 0,
            store,
            nodes: Vec::new(),
            requests: Vec::new(),
            workers: (0..WORKERS).map(|w| Participant::new(WorkerId(w as u64))).collect(),
            orders: Vec::new(),
            effects: BTreeMap::new(),
            leaders: BTreeMap::new(),
            copied: BTreeMap::new(),
            summary: Summary::default(),
            chance: chance.clone(),
        };
        for node in 0..usize::try_from(chance.between(2..=3)).expect("it is small") {
            let clock = (chance.between(0..=1_000_000), chance.between(970..=1_030));
            let life = Life { node, number: 0 };
            world.nodes.push(Node {
                life,
                alive: false,
                stopped_until: 0,
                lead: Leadership::new(Timestamp(0), "", LEASE),
                lease_request: None,
                log: Log::Closed,
                log_request: None,
                clock,
                nonce: 0,
            });
            world.at(chance.between(0..=500), Step::Start(node));
            for _ in 0..chance.between(0..=2) {
                world.at(chance.between(500..=TROUBLE_MS), Step::Kill(node));
            }
        }
        world.chance = chance;
        world
    }

    fn at(&mut self, when: u64, step: Step) {
        self.order += 1;
        self.queue.push(Reverse((when.max(self.now), self.order, step)));
    }

    fn after(&mut self, delay: u64, step: Step) {
        self.at(self.now + delay, step);
    }

    fn run(&mut self) -> Checked {
        while let Some(Reverse((when, _, step))) = self.queue.pop() {
            if when > END_MS {
                break;
            }
            self.now = when;
            self.take(step)?;
        }
        self.check_end()
    }

    fn take(&mut self, step: Step) -> Checked {
        // What happens to a stopped process, it notices when it goes on.
        let life = match step {
            Step::Tick(life) | Step::Decide(life) | Step::Release(life) | Step::Stop(life, _) => {
                Some(life)
            }
            Step::Answered(request) => Some(self.requests[request].by),
            Step::Put(_) | Step::Read(_) | Step::Kill(_) | Step::Start(_) | Step::Ordered(..) => {
                None
            }
        };
        if let Some(life) = life {
            let node = &self.nodes[life.node];
            if node.life != life || !node.alive {
                return Ok(());
            }
            if node.stopped_until > self.now {
                self.at(node.stopped_until, step);
                return Ok(());
            }
        }
        match step {
            Step::Tick(life) => self.tick(life.node),
            Step::Decide(life) => self.decide(life.node),
            Step::Put(request) => self.put(request),
            Step::Read(request) => self.read(request),
            Step::Answered(request) => return self.answered(request),
            Step::Kill(node) => self.kill(node),
            Step::Start(node) => self.start(node),
            Step::Release(life) => self.release(life.node),
            Step::Stop(life, lasts) => self.nodes[life.node].stopped_until = self.now + lasts,
            Step::Ordered(worker, order) => return self.ordered(worker, order),
        }
        Ok(())
    }

    // ---- Nodes -----------------------------------------------------------------------------

    fn clock(&self, node: usize) -> Timestamp {
        let (offset, rate) = self.nodes[node].clock;
        Timestamp(offset + self.now * rate / 1_000)
    }

    fn start(&mut self, node: usize) {
        let now = self.clock(node);
        let it = &mut self.nodes[node];
        if it.alive {
            return;
        }
        it.life.number += 1;
        it.alive = true;
        it.lead = Leadership::new(now, &name(it.life), LEASE);
        (it.lease_request, it.log, it.log_request) = (None, Log::Closed, None);
        let life = it.life;
        self.after(0, Step::Tick(life));
        if self.now < TROUBLE_MS && self.chance.percent(40) {
            let (begins, lasts) = (self.chance.between(0..=3_000), self.chance.between(1..=4_000));
            self.after(begins, Step::Stop(life, lasts));
        }
        if self.now < TROUBLE_MS && self.chance.percent(20) {
            let ends = self.chance.between(500..=5_000);
            self.after(ends, Step::Release(life));
        }
    }

    fn kill(&mut self, node: usize) {
        self.nodes[node].alive = false;
        let rest = self.chance.between(50..=2_000);
        self.after(rest, Step::Start(node));
    }

    /// It lays the lease down and ends in order.
    fn release(&mut self, node: usize) {
        if let Some(term) = self.nodes[node].lead.term() {
            self.store.beat(term, u64::MAX, true);
            self.kill(node);
        }
    }

    /// Does what the lease asks for.
    fn tick(&mut self, node: usize) {
        let now = self.clock(node);
        let it = &self.nodes[node];
        let life = it.life;
        if it.lease_request.is_some() {
            return; // One thing at a time.
        }
        let asked = match it.lead.due(now) {
            Due::Wait(until) => {
                let wait = u64::try_from(until.since(now).as_millis()).expect("it is short");
                return self.after(wait * 1_000 / it.clock.1 + 1, Step::Tick(life));
            }
            Due::Look => Asked::Look,
            Due::Claim(term) => Asked::Create(Object::Claim { term, holder: life }),
            Due::Renew { term, beat } => Asked::Renew { term, beat },
            Due::Stop { .. } => return self.kill(node),
        };
        let request = self.ask(life, asked);
        self.nodes[node].lease_request = Some(request);
    }

    /// A leader decides something, if it is sure enough that it leads.
    fn decide(&mut self, node: usize) {
        let now = self.clock(node);
        let life = self.nodes[node].life;
        let Some(term) = self.nodes[node].lead.term() else { return };
        let pause = self.chance.between(20..=400);
        self.after(pause, Step::Decide(life));
        let is_sure = self.nodes[node].lead.assured_until().is_some_and(|until| now < until);
        let Log::Open { last } = self.nodes[node].log else { return };
        if is_sure {
            self.append(node, term, last + 1, false);
        }
        if self.now < TROUBLE_MS && self.chance.percent(4) {
            // Stopped between the decision and what follows.
            self.nodes[node].stopped_until = self.now + self.chance.between(1..=5_000);
        }
    }

    fn append(&mut self, node: usize, term: Term, place: u64, opens: bool) {
        let it = &mut self.nodes[node];
        it.nonce += 1;
        let entry = Entry { term, writer: it.life, nonce: it.nonce };
        it.log = Log::Appending { place, entry, opens };
        self.ask_log(node, Asked::Create(Object::Log { place, entry }));
    }

    fn ask_log(&mut self, node: usize, asked: Asked) {
        let request = self.ask(self.nodes[node].life, asked);
        self.nodes[node].log_request = Some(request);
    }

    // ---- Requests --------------------------------------------------------------------------

    fn delay(&mut self) -> u64 {
        if self.now < TROUBLE_MS && self.chance.percent(4) {
            self.chance.between(50..=5_000)
        } else {
            self.chance.between(1..=15)
        }
    }

    /// Sends a request: what changes something first, then what reads it back.
    fn ask(&mut self, by: Life, what: Asked) -> usize {
        let began = self.clock(by.node);
        let request = self.requests.len();
        self.requests.push(Request { by, began, what, answer: Answer::Unknown });
        let mut wait = 0;
        if matches!(what, Asked::Renew { .. } | Asked::Create(_)) {
            let is_troubled = self.now < TROUBLE_MS;
            let arrives = self.delay();
            if !is_troubled || !self.chance.percent(3) {
                self.after(arrives, Step::Put(request));
            }
            if is_troubled && self.chance.percent(5) {
                let again = arrives + self.delay();
                self.after(again, Step::Put(request)); // A retry below us, or in the network.
            }
            wait = (arrives + self.delay()).min(TIMEOUT_MS);
        }
        let reads = wait + self.delay();
        if reads > wait + TIMEOUT_MS || (self.now < TROUBLE_MS && self.chance.percent(3)) {
            self.after(wait + TIMEOUT_MS, Step::Answered(request)); // Lost: nobody knows.
        } else {
            self.after(reads, Step::Read(request));
        }
        request
    }

    fn put(&mut self, request: usize) {
        match self.requests[request].what {
            Asked::Renew { term, beat } => self.store.beat(term, beat, false),
            Asked::Create(object) => self.store.create(object),
            Asked::Look | Asked::ReadLog => {}
        }
    }

    fn read(&mut self, request: usize) {
        let answer = match self.requests[request].what {
            Asked::Look => Answer::Newest(self.store.newest(name)),
            Asked::Renew { term, .. } => Answer::Newer(self.store.newer_than(term)),
            Asked::Create(object) => match self.store.holds(object) {
                Some(ours) => Answer::Ours(ours),
                None => Answer::Unknown,
            },
            Asked::ReadLog => {
                let last = self.store.log.last_key_value();
                Answer::Last(last.map_or(0, |(&place, _)| place), last.map(|(_, &entry)| entry))
            }
        };
        self.requests[request].answer = answer;
        let back = self.delay().min(TIMEOUT_MS);
        self.after(back, Step::Answered(request));
    }

    fn answered(&mut self, request: usize) -> Checked {
        let Request { by, began, what, answer } = self.requests[request].clone();
        let node = by.node;
        if self.nodes[node].lease_request == Some(request) {
            self.nodes[node].lease_request = None;
            let found = match (answer, what) {
                (Answer::Newest(newest), _) => Found::Newest(newest),
                (Answer::Newer(Some(by)), _) => Found::Superseded { by },
                (Answer::Newer(None), _) => Found::Renewed { began },
                (Answer::Ours(ours), Asked::Create(Object::Claim { term, .. })) => {
                    Found::Claimed { term, ours }
                }
                (Answer::Ours(_) | Answer::Unknown | Answer::Last(..), _) => Found::Unknown,
            };
            let now = self.clock(node);
            self.nodes[node].lead.handle(now, found);
            self.took_the_lead(node)?;
            self.tick(node);
        } else if self.nodes[node].log_request == Some(request) {
            self.nodes[node].log_request = None;
            return self.log_answered(node, answer);
        }
        Ok(())
    }

    fn took_the_lead(&mut self, node: usize) -> Checked {
        let it = &self.nodes[node];
        let (Some(term), life) = (it.lead.term(), it.life) else { return Ok(()) };
        let first = *self.leaders.entry(term).or_insert(life);
        if first != life {
            return Err(("a_term_has_one_leader", format!("{term} of {first:?} and {life:?}")));
        }
        if it.log == Log::Closed {
            self.nodes[node].log = Log::Reading;
            self.ask_log(node, Asked::ReadLog);
        }
        Ok(())
    }

    fn log_answered(&mut self, node: usize, answer: Answer) -> Checked {
        let Some(term) = self.nodes[node].lead.term() else { return Ok(()) };
        match (self.nodes[node].log, answer) {
            (Log::Reading, Answer::Last(last, newest)) => {
                if newest.is_some_and(|entry| entry.term > term) {
                    self.kill(node); // Another has led since.
                } else {
                    self.append(node, term, last + 1, true);
                }
            }
            (Log::Reading, _) => self.ask_log(node, Asked::ReadLog),
            (Log::Appending { place, entry, opens }, Answer::Ours(true)) => {
                self.nodes[node].log = Log::Open { last: place };
                self.took_effect(place, entry)?;
                if opens {
                    let life = self.nodes[node].life;
                    self.after(1, Step::Decide(life));
                }
            }
            (Log::Appending { opens: true, .. }, Answer::Ours(false)) => {
                // Somebody's last word came in between: it counts.
                self.nodes[node].log = Log::Reading;
                self.ask_log(node, Asked::ReadLog);
            }
            (Log::Appending { opens: false, .. }, Answer::Ours(false)) => {
                self.summary.fenced += 1;
                self.kill(node);
            }
            (Log::Appending { place, entry, .. }, _) => {
                self.ask_log(node, Asked::Create(Object::Log { place, entry }));
            }
            (Log::Closed | Log::Open { .. }, _) => {}
        }
        Ok(())
    }

    /// An entry is durable: workers hear of it.
    fn took_effect(&mut self, place: u64, entry: Entry) -> Checked {
        if let Some(before) = self.effects.insert(place, entry) {
            let what = format!("place {place} was {before:?} and is {entry:?}");
            return Err(("what_took_effect_stays", what));
        }
        let order = self.orders.len();
        self.orders.push((place, entry));
        for worker in 0..WORKERS {
            let delay = self.delay();
            self.after(delay, Step::Ordered(worker, order));
        }
        if self.tamper == Tamper::FreesNames {
            let kept = self.store.log.split_off(&place.saturating_sub(1));
            self.copied.append(&mut std::mem::replace(&mut self.store.log, kept));
        }
        Ok(())
    }

    fn ordered(&mut self, worker: usize, order: usize) -> Checked {
        let (place, Entry { term, .. }) = self.orders[order];
        let member = Member {
            worker: WorkerId(worker as u64),
            name: String::new(),
            address: String::new(),
            block: 0..1,
        };
        let group = Group {
            generation: Generation(place),
            term,
            members: [member].into(),
            planned: false,
            checkpoint: None,
            checkpoint_at: None,
            evaluated: None,
            last: false,
        };
        let notice = Notice::Ordered { term, order: Order::Form(group) };
        for action in self.workers[worker].handle(notice) {
            let Action::Form { group, .. } = action else { continue };
            let decided = self.effects.get(&group.generation.0).map(|entry| entry.term);
            if decided != Some(term) {
                let what = format!("{group:?} of term {term}, decided in {decided:?}");
                return Err(("a_worker_forms_only_what_was_decided", what));
            }
        }
        Ok(())
    }

    // ---- The end ---------------------------------------------------------------------------

    fn check_end(&mut self) -> Checked {
        for (place, entry) in &self.effects {
            let found = self.store.log.get(place);
            if self.tamper != Tamper::FreesNames && found != Some(entry) {
                let what = format!("place {place} took effect as {entry:?} and is {found:?}");
                return Err(("what_took_effect_stays", what));
            }
        }
        let mut newest = Term(0);
        let mut all = self.store.log.clone();
        all.append(&mut self.copied);
        for (expected, (&place, entry)) in (1..).zip(&all) {
            if place != expected {
                return Err(("the_log_has_no_gap", format!("{expected} is missing")));
            }
            if entry.term < newest {
                let what = format!("place {place} is of term {}, after {newest}", entry.term);
                return Err(("terms_only_grow_in_the_log", what));
            }
            newest = entry.term;
            self.summary.records += 1;
        }
        self.summary.terms += newest.0;
        let leads = |node: &Node| {
            node.alive && matches!(node.log, Log::Open { .. } | Log::Appending { .. })
        };
        if !self.nodes.iter().any(leads) {
            let what = format!("seed {}: {:?}", self.seed, self.nodes);
            return Err(("somebody_leads_in_the_end", what));
        }
        Ok(())
    }
}
