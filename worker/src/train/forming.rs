//! How the members of a generation come to hold one state.
//!
//! Each says which step its state is at and the state's digest. The highest step wins; whoever holds
//! another state, or none, is given it by those who have it. Where nobody has any, all read the newest
//! checkpoint or, before the first, draw the initial values.

use std::collections::BTreeMap;

use cluster::{Rank, Step};
use collective::{Exchange, ExchangeError};
use tracing::{info, warn};

use super::{
    Interrupted,
    state::{SECTIONS, TrainState},
};

/// What a member says of its state: step and digest. `None`: it has no usable one.
type Held = Option<(Step, [u8; 32])>;

/// Bytes of [`Held`] on the wire: whether there is one, the step, the digest.
const HELD_BYTES: usize = 1 + 8 + 32;

/// Where a generation's state comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Origin {
    /// It is the start of the run.
    Initial,
    /// The checkpoint of this step, which is newer than what any member holds.
    Checkpoint(Step),
    /// Those of the members that hold it.
    Members {
        /// Its step.
        step: Step,
        /// Its digest.
        digest: [u8; 32],
        /// The ranks that hold it, ascending.
        givers: Vec<Rank>,
        /// All other ranks, ascending.
        takers: Vec<Rank>,
    },
}

/// Decides, from what each rank holds. All ranks come to the same answer.
pub(crate) fn origin(held: &[Held], checkpoint: Option<Step>) -> Origin {
    let highest = held.iter().flatten().map(|(step, _)| *step).max();
    match (highest, checkpoint) {
        (None, None) => Origin::Initial,
        (None, Some(step)) => Origin::Checkpoint(step),
        (Some(highest), Some(step)) if step > highest => Origin::Checkpoint(step),
        (Some(step), _) => {
            let digest = most_held(held, step);
            let gives = |rank: &usize| held[*rank] == Some((step, digest));
            let (givers, takers): (Vec<usize>, Vec<usize>) = (0..held.len()).partition(gives);
            Origin::Members { step, digest, givers: ranks(&givers), takers: ranks(&takers) }
        }
    }
}

/// Of the states at `step`, which should be equal, the one that most hold; of several, the one that
/// the lowest rank holds.
fn most_held(held: &[Held], step: Step) -> [u8; 32] {
    let mut votes: BTreeMap<[u8; 32], (usize, std::cmp::Reverse<usize>)> = BTreeMap::new();
    for (rank, digest) in held.iter().enumerate() {
        if let Some((at, digest)) = digest
            && *at == step
        {
            votes.entry(*digest).or_insert((0, std::cmp::Reverse(rank))).0 += 1;
        }
    }
    let most = votes.into_iter().max_by_key(|(_, votes)| *votes);
    most.expect("some rank holds the highest step").0
}

fn ranks(indices: &[usize]) -> Vec<Rank> {
    let rank = |&index| Rank(u32::try_from(index).expect("ranks are counted in u32"));
    indices.iter().map(rank).collect()
}

/// Tells all members what this one holds, and hears what they hold.
pub(crate) fn all_gather(
    peers: &mut dyn Exchange,
    state: &TrainState,
) -> Result<Vec<Held>, ExchangeError> {
    let own = encode(state.step().map(|step| (step, *state.digest().as_bytes())));
    let size = peers.size() as usize;
    let mut heard = vec![[0u8; HELD_BYTES]; size];
    let outgoing = vec![&own[..]; size];
    let mut incoming: Vec<&mut [u8]> = heard.iter_mut().map(|held| &mut held[..]).collect();
    peers.all_to_all(&outgoing, &mut incoming)?;
    Ok(heard.iter().map(decode).collect())
}

/// Compares the states of all members after a step, which should be equal: silent corruption is found, and not
/// trained on. Costs a digest of the state.
///
/// # Errors
/// [`Interrupted::Diverged`] on every member if the states differ; [`Interrupted::Exchange`] if a peer is lost.
pub(crate) fn vote(
    peers: &mut dyn Exchange,
    state: &mut TrainState,
    agreed_before: impl Fn(Step) -> Step,
) -> Result<(), Interrupted> {
    let held = all_gather(peers, state)?;
    check_equal(&held, state, agreed_before)
}

/// Finds out whether those who are at the highest step hold different states.
///
/// If so, gradients of a wrong state may be in all of them, back to the step after which they were compared last, which
/// `agreed_before` knows. So nobody has a usable state any more: all go on from what was kept until then. Whoever differs from most,
/// if most agree, is named.
///
/// # Errors
/// [`Interrupted::Diverged`], the same on every member but for those that hold no state.
pub(crate) fn check_equal(
    held: &[Held],
    state: &mut TrainState,
    agreed_before: impl Fn(Step) -> Step,
) -> Result<(), Interrupted> {
    let Some((step, odd)) = divergence(held) else { return Ok(()) };
    let agreed = agreed_before(step);
    state.tear();
    let whose = match odd {
        Some(rank) => format!("that of rank {rank} differs from that of most, so its machine's"),
        None => "none is that of most, so one machine's".to_owned(),
    };
    let reason = format!(
        "the states differ after step {step}: {whose} memory or arithmetic has failed; what was computed after step \
         {agreed} is computed again"
    );
    Err(Interrupted::Diverged { step, agreed, odd, reason })
}

/// The highest step, if those who are there hold different states, and the one rank that differs from most of them.
fn divergence(held: &[Held]) -> Option<(Step, Option<Rank>)> {
    let step = held.iter().flatten().map(|(step, _)| *step).max()?;
    let there = || held.iter().flatten().filter(|(at, _)| *at == step).map(|(_, digest)| *digest);
    let most = most_held(held, step);
    let (all, agree) = (there().count(), there().filter(|digest| *digest == most).count());
    if agree == all {
        return None;
    }
    let is_odd = |held: &Held| held.is_some_and(|(at, digest)| at == step && digest != most);
    let odd = held.iter().position(is_odd).filter(|_| agree * 2 > all);
    Some((step, odd.map(|rank| Rank(u32::try_from(rank).expect("ranks are counted in u32")))))
}

fn encode(held: Held) -> [u8; HELD_BYTES] {
    let mut bytes = [0; HELD_BYTES];
    if let Some((step, digest)) = held {
        bytes[0] = 1;
        bytes[1..9].copy_from_slice(&step.0.to_le_bytes());
        bytes[9..].copy_from_slice(&digest);
    }
    bytes
}

fn decode(bytes: &[u8; HELD_BYTES]) -> Held {
    let (step, digest) = bytes[1..].split_first_chunk::<8>().expect("the length is fixed");
    let digest = digest.try_into().expect("the length is fixed");
    (bytes[0] == 1).then_some((Step(u64::from_le_bytes(*step)), digest))
}

/// Gives the state at `step` to those who lack it. The givers share the work.
///
/// # Errors
/// [`Interrupted`] if a peer is lost; a taker then holds no state. So it does if what came is not what
/// was announced.
pub(crate) fn hand_over(
    peers: &mut dyn Exchange,
    state: &mut TrainState,
    (step, digest): (Step, [u8; 32]),
    givers: &[Rank],
    takers: &[Rank],
) -> Result<(), Interrupted> {
    if takers.is_empty() {
        return Ok(());
    }
    let (me, size) = (peers.rank(), peers.size() as usize);
    let pairs = takers.iter().zip(givers.iter().cycle());
    let own_giver = pairs.clone().find(|(taker, _)| **taker == me).map(|(_, giver)| *giver);
    let own_takers: Vec<Rank> =
        pairs.filter(|(_, giver)| **giver == me).map(|(taker, _)| *taker).collect();
    if let (Some(giver), Some(held)) = (own_giver, state.step()) {
        if held != step {
            info!(step = step.0, held = held.0, %giver, "a newer state is taken from a peer");
        } else {
            warn!(step = step.0, %giver, "this worker's state differs from its peers' and is replaced");
        }
    }
    if own_giver.is_some() {
        state.tear();
    }
    for index in 0..SECTIONS.len() {
        let mut nothing: Vec<&mut [u8]> = (0..size).map(|_| &mut [][..]).collect();
        if let Some(giver) = own_giver {
            nothing[giver.0 as usize] = state.section_mut(index);
            peers.all_to_all(&vec![&[][..]; size], &mut nothing)?;
        } else {
            let section = state.sections()[index];
            let mut outgoing = vec![&[][..]; size];
            for taker in &own_takers {
                outgoing[taker.0 as usize] = section;
            }
            peers.all_to_all(&outgoing, &mut nothing)?;
        }
    }
    if own_giver.is_some() {
        state.mend();
        if state.step() != Some(step) || *state.digest().as_bytes() != digest {
            state.tear();
            return Err(Interrupted::Forming {
                reason: format!(
                    "the state of step {step} that a peer sent is not what it announced"
                ),
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: Held = Some((Step(6), [6; 32]));
    const NEW: Held = Some((Step(7), [7; 32]));
    const ODD: Held = Some((Step(7), [1; 32]));

    fn members(held: &[Held], checkpoint: Option<u64>) -> (u64, u8, Vec<u32>, Vec<u32>) {
        match origin(held, checkpoint.map(Step)) {
            Origin::Members { step, digest, givers, takers } => {
                let plain = |ranks: Vec<Rank>| ranks.into_iter().map(|rank| rank.0).collect();
                (step.0, digest[0], plain(givers), plain(takers))
            }
            other @ (Origin::Initial | Origin::Checkpoint(_)) => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_highest_step_wins_and_all_others_take_it() {
        assert_eq!(members(&[OLD, NEW, None, NEW], None), (7, 7, vec![1, 3], vec![0, 2]));
    }

    #[test]
    fn a_state_that_differs_from_most_is_replaced() {
        assert_eq!(members(&[ODD, NEW, NEW], None), (7, 7, vec![1, 2], vec![0]));
        assert_eq!(members(&[NEW, ODD], None), (7, 7, vec![0], vec![1]), "a tie: the lowest rank");
    }

    #[test]
    fn a_checkpoint_is_taken_only_if_it_is_newer() {
        assert_eq!(members(&[NEW, None], Some(7)), (7, 7, vec![0], vec![1]));
        assert_eq!(origin(&[NEW, None], Some(Step(8))), Origin::Checkpoint(Step(8)));
        assert_eq!(origin(&[None, None], Some(Step(8))), Origin::Checkpoint(Step(8)));
        assert_eq!(origin(&[None], None), Origin::Initial);
    }

    #[test]
    fn whoever_differs_from_most_is_odd_and_without_a_majority_nobody_is() {
        assert_eq!(divergence(&[NEW, NEW, NEW]), None);
        assert_eq!(divergence(&[None, OLD, NEW, NEW]), None, "who is behind has lost nothing");
        assert_eq!(divergence(&[None]), None);
        assert_eq!(divergence(&[NEW, ODD, NEW]), Some((Step(7), Some(Rank(1)))));
        assert_eq!(divergence(&[OLD, ODD, NEW, NEW]), Some((Step(7), Some(Rank(1)))));
        assert_eq!(divergence(&[ODD, NEW]), Some((Step(7), None)));
        assert_eq!(divergence(&[ODD, NEW, NEW, ODD]), Some((Step(7), None)));
    }

    #[test]
    fn what_a_member_holds_survives_the_wire() {
        for held in [None, OLD, Some((Step(0), [0; 32])), Some((Step(u64::MAX), [255; 32]))] {
            assert_eq!(decode(&encode(held)), held);
        }
    }
}
