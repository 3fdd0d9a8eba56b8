//! Groups on the wire. A small one is told whole; of one with thousands of members each session is told
//! what is new to it, so that a change costs bytes for the change and not for the square of the members.
//!
//! What a place means is agreed by the order of messages in a session: first come the members of the
//! group that it was told last, then those that [`v1::Roster`]s have brought since.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    ops::Range,
    sync::Arc,
};

use cluster::{Generation, Group, Member, Order, Step, Term, WorkerId};
use flate2::{Compression, read::DeflateDecoder, write::DeflateEncoder};
use prost::Message as _;

use crate::{
    Malformed,
    convert::order_from_response,
    v1::{self, session_response::Kind},
};

/// Groups of up to so many members are told whole.
const WHOLE_MAX: usize = 64;
/// Members in a roster: a few KB, so that no session holds a large message.
const PAGE: usize = 256;
/// A roster that is longer, unpacked, is none of ours.
const ROSTER_BYTES_MAX: u64 = 1 << 20;

/// What a session has been told: the newest group and its members. It begins with nothing.
#[derive(Debug, Clone, Default)]
pub struct Told(Option<(Generation, Arc<[Member]>)>);

/// Says groups: what many sessions are to hear is made once and shared.
#[derive(Debug, Default)]
pub struct Announcer {
    /// The group that `said` is about.
    group: Option<Group>,
    /// What brings a session from what it was told to the group.
    said: Vec<(Told, Arc<[Arc<v1::SessionResponse>]>)>,
}

impl Announcer {
    /// The messages that tell a session of `group`, in order; `told` then holds it.
    ///
    /// `secret` opens the connections between the members.
    pub fn announce(
        &mut self,
        told: &mut Told,
        (run, term): (&str, u64),
        group: &Group,
        secret: impl FnOnce() -> [u8; 32],
    ) -> Arc<[Arc<v1::SessionResponse>]> {
        if self.group.as_ref() != Some(group) {
            self.group = Some(group.clone());
            self.said.clear();
        }
        let before = std::mem::replace(told, Told::of(group));
        if let Some((_, said)) = self.said.iter().find(|(from, _)| from.is(&before)) {
            return Arc::clone(said);
        }
        let response = |kind| {
            let run = run.to_owned();
            Arc::new(v1::SessionResponse { run, term, kind: Some(kind) })
        };
        let (rosters, wire) = to_wire(&before, group, secret());
        let rosters = rosters.into_iter().map(|roster| response(Kind::Roster(roster)));
        let said: Arc<[_]> = rosters.chain([response(Kind::Form(wire))]).collect();
        self.said.push((before, Arc::clone(&said)));
        said
    }
}

impl Told {
    fn of(group: &Group) -> Self {
        Self(Some((group.generation, Arc::clone(&group.members))))
    }

    fn generation(&self) -> Generation {
        self.0.as_ref().map(|(generation, _)| *generation).unwrap_or_default()
    }

    fn members(&self) -> &[Member] {
        self.0.as_ref().map(|(_, members)| &**members).unwrap_or_default()
    }

    fn is(&self, other: &Self) -> bool {
        match (&self.0, &other.0) {
            (None, None) => true,
            (Some((_, one)), Some((_, other))) => Arc::ptr_eq(one, other),
            (None, Some(_)) | (Some(_), None) => false,
        }
    }
}

fn to_wire(before: &Told, group: &Group, secret: [u8; 32]) -> (Vec<v1::Roster>, v1::Group) {
    let Some(blocks) = block_sizes(&group.members).filter(|_| group.members.len() > WHOLE_MAX)
    else {
        return (Vec::new(), group_to_wire(group, secret));
    };
    let known = before.members();
    let places: BTreeMap<_, _> =
        known.iter().zip(0..).map(|(member, place)| (member.worker, (place, member))).collect();
    let mut next = u32::try_from(known.len()).expect("members can be counted");
    let (mut new, mut runs) = (Vec::new(), Vec::<v1::Places>::new());
    for member in &*group.members {
        let is_same =
            |(_, of): &&(u32, &Member)| of.name == member.name && of.address == member.address;
        let place = places.get(&member.worker).filter(is_same).map(|(place, _)| *place);
        let place = place.unwrap_or_else(|| {
            new.push(new_member(member));
            next += 1;
            next - 1
        });
        match runs.last_mut() {
            Some(run) if run.start + run.count == place => run.count += 1,
            Some(_) | None => runs.push(v1::Places { start: place, count: 1 }),
        }
    }
    let rosters = new.chunks(PAGE).map(roster_of).collect();
    let nobody = Group { members: Arc::new([]), ..group.clone() };
    let change = Some(v1::Change { members: runs, blocks, base: before.generation().0 });
    (rosters, v1::Group { change, ..group_to_wire(&nobody, secret) })
}

fn roster_of(page: &[v1::Member]) -> v1::Roster {
    let plain = v1::Members { members: page.to_vec() }.encode_to_vec();
    let mut deflated = DeflateEncoder::new(Vec::new(), Compression::default());
    deflated.write_all(&plain).expect("memory takes all that is written");
    v1::Roster { members: deflated.finish().expect("memory takes all that is written").into() }
}

fn roster_members(roster: &v1::Roster) -> Result<v1::Members, Malformed> {
    let wrong = |problem| Malformed { message: "Roster", field: "members", problem };
    let mut plain = Vec::new();
    let read =
        DeflateDecoder::new(&roster.members[..]).take(ROSTER_BYTES_MAX).read_to_end(&mut plain);
    read.map_err(|_| wrong("is not deflated"))?;
    v1::Members::decode(&plain[..]).map_err(|_| wrong("does not hold members, or too many"))
}

/// Its block comes with the group.
fn new_member(member: &Member) -> v1::Member {
    let (name, address) = (member.name.clone(), member.address.clone());
    v1::Member { worker: member.worker.0, name, address, block_start: 0, block_end: 0 }
}

/// The sizes of blocks that follow each other from 0 on; nothing if they do not.
fn block_sizes(members: &[Member]) -> Option<Vec<v1::Blocks>> {
    let (mut end, mut runs) = (0, Vec::<v1::Blocks>::new());
    for Member { block, .. } in members {
        if block.start != end || block.is_empty() {
            return None;
        }
        end = block.end;
        match runs.last_mut() {
            Some(run) if run.size == block.end - block.start => run.count += 1,
            Some(_) | None => {
                runs.push(v1::Blocks { size: block.end - block.start, count: 1 });
            }
        }
    }
    Some(runs)
}

/// The other end: understands what the sessions of a coordinator say, one session after the other.
#[derive(Debug, Default)]
pub struct Listener {
    /// The group told last; 0 if none.
    generation: Generation,
    /// By place; blocks are those of the group told last.
    known: Vec<Member>,
}

impl Listener {
    /// A new session stands, which was told nothing.
    pub fn session_opened(&mut self) {
        *self = Self::default();
    }

    /// An order from the wire; `None` for what is the host's own affair, or is used later.
    ///
    /// # Errors
    /// [`Malformed`] if a field that must be there is not, or names a place that no member has.
    pub fn order(&mut self, response: &v1::SessionResponse) -> Result<Option<Order>, Malformed> {
        match &response.kind {
            Some(Kind::Roster(roster)) => {
                self.known.extend(roster_members(roster)?.members.into_iter().map(member_of));
                Ok(None)
            }
            Some(Kind::Form(group)) => {
                let mut wire = group.clone();
                let members = wire.change.take().map(|change| self.changed(&change)).transpose()?;
                let mut group = group_from_wire(wire)?;
                if let Some(members) = members {
                    group.members = members.into();
                }
                self.generation = group.generation;
                self.known = group.members.to_vec();
                Ok(Some(Order::Form(group)))
            }
            Some(
                Kind::Welcome(_)
                | Kind::CheckpointAt(_)
                | Kind::Hold(_)
                | Kind::Refuse(_)
                | Kind::Finish(_)
                | Kind::Fail(_)
                | Kind::Ack(_),
            )
            | None => order_from_response(response),
        }
    }

    fn changed(&self, change: &v1::Change) -> Result<Vec<Member>, Malformed> {
        let wrong = |field, problem| Malformed { message: "Change", field, problem };
        if change.base != self.generation.0 {
            return Err(wrong("base", "is not the group told last"));
        }
        let mut members = Vec::new();
        for run in &change.members {
            let places = run.start as usize..run.start as usize + run.count as usize;
            let named = self.known.get(places);
            let named = named.ok_or_else(|| wrong("members", "names a place that nobody has"))?;
            members.extend_from_slice(named);
        }
        let sizes = change.blocks.iter().flat_map(|run| (0..run.count).map(|_| run.size));
        let mut end: u32 = 0;
        let mut blocks = sizes.take(members.len() + 1).map(|size| -> Option<Range<u32>> {
            let start = end;
            end = end.checked_add(size).filter(|end| *end > start)?;
            Some(start..end)
        });
        for member in &mut members {
            let block = blocks.next().flatten();
            member.block = block.ok_or_else(|| wrong("blocks", "leaves a member without one"))?;
        }
        if blocks.next().is_some() {
            return Err(wrong("blocks", "has more of them than members"));
        }
        Ok(members)
    }
}

fn member_of(wire: v1::Member) -> Member {
    let v1::Member { worker, name, address, block_start, block_end } = wire;
    Member { worker: WorkerId(worker), name, address, block: block_start..block_end }
}

pub(crate) fn group_to_wire(group: &Group, secret: [u8; 32]) -> v1::Group {
    let members = group.members.iter().map(|member| v1::Member {
        worker: member.worker.0,
        name: member.name.clone(),
        address: member.address.clone(),
        block_start: member.block.start,
        block_end: member.block.end,
    });
    v1::Group {
        generation: group.generation.0,
        term: group.term.0,
        members: members.collect(),
        planned: group.planned,
        checkpoint: group.checkpoint.map(|step| step.0),
        checkpoint_at: group.checkpoint_at.map(|step| step.0),
        evaluated: group.evaluated.map(|step| step.0),
        secret: secret.to_vec(),
        change: None,
        last: group.last,
    }
}

pub(crate) fn group_from_wire(group: v1::Group) -> Result<Group, Malformed> {
    let mut members = Vec::with_capacity(group.members.len());
    for member in group.members {
        if member.block_start >= member.block_end {
            let problem = "must lie above block_start";
            return Err(Malformed { message: "Member", field: "block_end", problem });
        }
        members.push(Member {
            worker: WorkerId(member.worker),
            name: member.name,
            address: member.address,
            block: member.block_start..member.block_end,
        });
    }
    Ok(Group {
        generation: Generation(group.generation),
        term: Term(group.term),
        members: members.into(),
        planned: group.planned,
        checkpoint: group.checkpoint.map(Step),
        checkpoint_at: group.checkpoint_at.map(Step),
        evaluated: group.evaluated.map(Step),
        last: group.last,
    })
}

#[cfg(test)]
mod tests {
    use cluster::{Step, Term, blocks::balanced_blocks};
    use proptest::prelude::*;

    use super::*;

    fn group(generation: u64, virtual_ranks: u32, workers: &[u64]) -> Group {
        let count = u32::try_from(workers.len()).unwrap();
        let members = workers.iter().zip(balanced_blocks(virtual_ranks, count));
        let members = members.map(|(&worker, block)| Member {
            worker: WorkerId(worker),
            name: format!("worker-{worker}"),
            address: format!("10.0.0.1:{worker}"),
            block,
        });
        Group {
            generation: Generation(generation),
            term: Term(3),
            members: members.collect(),
            planned: generation.is_multiple_of(2),
            checkpoint: Some(Step(4)),
            checkpoint_at: None,
            evaluated: None,
            last: generation.is_multiple_of(3),
        }
    }

    /// Tells a session of a group; returns what it understood, and the bytes that took.
    fn tell(
        announcer: &mut Announcer,
        told: &mut Told,
        listener: &mut Listener,
        group: &Group,
    ) -> (Group, usize) {
        let said = announcer.announce(told, ("toy", 3), group, || [7; 32]);
        let bytes = said.iter().map(|response| response.encoded_len()).sum();
        let (last, rosters) = said.split_last().unwrap();
        for roster in rosters {
            assert_eq!(listener.order(roster).unwrap(), None);
        }
        let Some(Order::Form(heard)) = listener.order(last).unwrap() else { panic!("no group") };
        (heard, bytes)
    }

    #[test]
    fn thousands_of_members_are_told_once_and_a_change_costs_a_few_bytes() {
        let all: Vec<u64> = (0..4_096).collect();
        let fewer: Vec<u64> = (0..4_096).filter(|&worker| worker != 77).collect();
        let more: Vec<u64> = fewer.iter().copied().chain([9_000]).collect();
        let (mut announcer, mut told, mut listener) =
            (Announcer::default(), Told::default(), Listener::default());
        for (generation, workers, bytes_max) in
            [(1, &all, 60_000), (2, &fewer, 200), (3, &more, 300)]
        {
            let group = group(generation, 4_096, workers);
            let (heard, bytes) = tell(&mut announcer, &mut told, &mut listener, &group);
            assert_eq!(heard, group);
            assert!(bytes <= bytes_max, "generation {generation} took {bytes} bytes");
        }
    }

    #[test]
    fn a_small_group_is_whole_in_its_message() {
        let group = group(1, 8, &[5, 6, 7]);
        let said =
            Announcer::default().announce(&mut Told::default(), ("toy", 3), &group, || [7; 32]);
        assert_eq!(said.len(), 1);
        assert_eq!(order_from_response(&said[0]).unwrap(), Some(Order::Form(group)));
    }

    #[test]
    fn who_has_heard_the_same_shares_what_is_said() {
        let workers: Vec<u64> = (0..100).collect();
        let group = group(1, 100, &workers);
        let (mut announcer, mut one, mut other) =
            (Announcer::default(), Told::default(), Told::default());
        let mut secrets = 0;
        let mut secret = || {
            secrets += 1;
            [7; 32]
        };
        let first = announcer.announce(&mut one, ("toy", 3), &group, &mut secret);
        let second = announcer.announce(&mut other, ("toy", 3), &group, &mut secret);
        assert!(Arc::ptr_eq(&first, &second) && secrets == 1);
    }

    #[test]
    fn a_change_to_what_was_never_told_is_malformed() {
        let workers: Vec<u64> = (0..100).collect();
        let (mut announcer, mut told) = (Announcer::default(), Told::default());
        announcer.announce(&mut told, ("toy", 3), &group(1, 100, &workers), || [7; 32]);
        let said = announcer.announce(&mut told, ("toy", 3), &group(2, 100, &workers), || [7; 32]);
        let error = Listener::default().order(&said[0]).unwrap_err();
        assert_eq!(error.to_string(), "malformed message: Change.base is not the group told last");
        let known = group(1, 100, &workers).members.to_vec();
        let mut listener = Listener { generation: Generation(1), known: known[1..].to_vec() };
        let error = listener.order(&said[0]).unwrap_err().to_string();
        assert!(error.contains("names a place that nobody has"), "{error}");
        listener.known = known;
        for (size, count, problem) in
            [(1, 99, "without one"), (0, 100, "without one"), (1, 101, "more")]
        {
            let mut wrong = (*said[0]).clone();
            let Some(Kind::Form(group)) = &mut wrong.kind else { panic!("no group") };
            group.change.as_mut().unwrap().blocks = vec![v1::Blocks { size, count }];
            let error = listener.order(&wrong).unwrap_err().to_string();
            assert!(error.contains(problem), "{error}");
        }
    }

    #[test]
    fn a_damaged_roster_is_malformed() {
        let workers: Vec<u64> = (0..100).collect();
        let (mut announcer, mut told) = (Announcer::default(), Told::default());
        let said = announcer.announce(&mut told, ("toy", 3), &group(1, 100, &workers), || [7; 32]);
        let Some(Kind::Roster(roster)) = &said[0].kind else { panic!("no roster") };
        let half = v1::Roster { members: roster.members.slice(..roster.members.len() / 2) };
        let bomb =
            roster_of(&vec![v1::Member { name: "x".repeat(1 << 20), ..v1::Member::default() }; 3]);
        for damaged in [half, v1::Roster { members: vec![0xff; 9].into() }, bomb] {
            let response = v1::SessionResponse {
                kind: Some(Kind::Roster(damaged)),
                ..v1::SessionResponse::default()
            };
            let error = Listener::default().order(&response).unwrap_err().to_string();
            assert!(error.starts_with("malformed message: Roster.members"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn any_history_of_groups_is_understood(
            groups in prop::collection::vec(prop::collection::btree_set(0u64..200, 1..150), 1..8),
            is_reversed: bool,
            opened_again in 0usize..8,
        ) {
            let (mut announcer, mut told, mut listener) =
                (Announcer::default(), Told::default(), Listener::default());
            for (number, workers) in groups.into_iter().enumerate() {
                let mut workers: Vec<_> = workers.into_iter().collect();
                if is_reversed {
                    workers.reverse();
                }
                if number == opened_again {
                    told = Told::default();
                    listener.session_opened();
                }
                let group = group(number as u64 + 1, 256, &workers);
                let (heard, _) = tell(&mut announcer, &mut told, &mut listener, &group);
                prop_assert_eq!(heard, group);
            }
        }
    }
}
