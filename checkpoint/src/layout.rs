//! Object names, and how the state is cut into parts.
//!
//! The sections are thought of as one long byte string; part `i` is its `i`-th piece of `part_bytes`.
//! So a part has the same bytes however many ranks there are, and any rank can write it.

use std::{collections::BTreeSet, ops::Range};

use cluster::{Rank, Step};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Parts are numbered with five digits.
const PARTS_MAX: u64 = 100_000;

/// The folder of all checkpoints, below the run's prefix.
pub(crate) const CHECKPOINTS: &str = "checkpoints";

const STEP_PREFIX: &str = "step-";

/// A named piece of the state, such as the parameters or a moment of the optimizer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Section {
    /// Unique in its layout.
    pub name: String,
    /// Its size.
    pub bytes: u64,
}

/// The sections of a state in their order, and the size of the parts they are cut into.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    sections: Vec<Section>,
    part_bytes: u64,
    total_bytes: u64,
    parts: u32,
}

/// The bytes of one section that lie in a range of the state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece<'a> {
    /// The section's name.
    pub section: &'a str,
    /// Where in the section.
    pub range: Range<u64>,
}

/// Why sections and a part size make no layout.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum LayoutError {
    /// The parts would have no size.
    #[error("the part size is 0")]
    NoPartSize,
    /// There is nothing to store.
    #[error("the sections have no bytes")]
    Empty,
    /// A section's name is empty.
    #[error("section {index} has no name")]
    Unnamed {
        /// Its place.
        index: usize,
    },
    /// Two sections have one name.
    #[error("section {name:?} is there twice")]
    Duplicate {
        /// The name.
        name: String,
    },
    /// The parts are too small for the state.
    #[error(
        "{total_bytes} bytes in parts of {part_bytes} are more than {PARTS_MAX} parts: take larger \
         parts"
    )]
    TooManyParts {
        /// The size of all sections.
        total_bytes: u64,
        /// The size of a part.
        part_bytes: u64,
    },
    /// The sections are larger than can be counted.
    #[error("the sections have more than 2^64 bytes")]
    TooLarge,
}

impl Layout {
    /// Cuts `sections` into parts of `part_bytes`; the last one may be smaller.
    ///
    /// # Errors
    /// [`LayoutError`].
    pub fn new(sections: Vec<Section>, part_bytes: u64) -> Result<Self, LayoutError> {
        let mut names = BTreeSet::new();
        let mut total_bytes = 0u64;
        for (index, section) in sections.iter().enumerate() {
            if section.name.is_empty() {
                return Err(LayoutError::Unnamed { index });
            }
            if !names.insert(section.name.as_str()) {
                return Err(LayoutError::Duplicate { name: section.name.clone() });
            }
            total_bytes = total_bytes.checked_add(section.bytes).ok_or(LayoutError::TooLarge)?;
        }
        if part_bytes == 0 {
            return Err(LayoutError::NoPartSize);
        }
        if total_bytes == 0 {
            return Err(LayoutError::Empty);
        }
        let parts = total_bytes.div_ceil(part_bytes);
        if parts > PARTS_MAX {
            return Err(LayoutError::TooManyParts { total_bytes, part_bytes });
        }
        let parts = u32::try_from(parts).expect("it is at most PARTS_MAX");
        Ok(Self { sections, part_bytes, total_bytes, parts })
    }

    /// The sections in their order.
    #[must_use]
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// The size of a part, except that the last may be smaller.
    #[must_use]
    pub fn part_bytes(&self) -> u64 {
        self.part_bytes
    }

    /// The size of all sections.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// How many parts there are.
    #[must_use]
    pub fn parts(&self) -> u32 {
        self.parts
    }

    /// The bytes of the state that part `index` holds.
    ///
    /// # Panics
    /// If there is no such part.
    #[must_use]
    pub fn part_range(&self, index: u32) -> Range<u64> {
        assert!(index < self.parts, "part {index} of {}", self.parts);
        let start = u64::from(index) * self.part_bytes;
        start..self.total_bytes.min(start.saturating_add(self.part_bytes))
    }

    /// The sections' bytes that make up a range of the state, in order.
    pub fn pieces(&self, range: Range<u64>) -> impl Iterator<Item = Piece<'_>> {
        let mut section_start = 0;
        self.sections.iter().filter_map(move |section| {
            let start = section_start;
            section_start += section.bytes;
            let (from, to) = (range.start.max(start), range.end.min(section_start));
            (from < to).then(|| Piece { section: &section.name, range: from - start..to - start })
        })
    }

    /// The parts that `rank` of `size` writes: consecutive, and balanced to one part.
    ///
    /// # Panics
    /// If there is no such rank.
    #[must_use]
    pub fn share(&self, rank: Rank, size: u32) -> Range<u32> {
        assert!(rank.0 < size, "rank {rank} of {size}");
        let cut = |at: u32| {
            let parts = u64::from(self.parts) * u64::from(at) / u64::from(size);
            u32::try_from(parts).expect("it is at most the number of parts")
        };
        cut(rank.0)..cut(rank.0 + 1)
    }
}

/// The name of a step's manifest, below the run's prefix.
#[must_use]
pub fn manifest_name(step: Step) -> String {
    format!("{}/manifest.json", folder_name(step))
}

/// The name of a step's part, below the run's prefix.
#[must_use]
pub fn part_name(step: Step, index: u32) -> String {
    format!("{}/part-{index:05}", folder_name(step))
}

pub(crate) fn folder_name(step: Step) -> String {
    format!("{CHECKPOINTS}/{STEP_PREFIX}{:010}", step.0)
}

/// The step of a folder below [`CHECKPOINTS`]; nothing for a name that this crate did not give.
pub(crate) fn step_of_folder(name: &str) -> Option<Step> {
    let step = Step(name.strip_prefix(STEP_PREFIX)?.parse().ok()?);
    folder_name(step).ends_with(name).then_some(step)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sections(sizes: &[u64]) -> Vec<Section> {
        (0..).zip(sizes).map(|(i, &bytes)| Section { name: format!("s{i}"), bytes }).collect()
    }

    #[test]
    fn names_sort_by_step_and_are_read_back() {
        assert_eq!(manifest_name(Step(176)), "checkpoints/step-0000000176/manifest.json");
        assert_eq!(part_name(Step(176), 3), "checkpoints/step-0000000176/part-00003");
        assert_eq!(step_of_folder("step-0000000176"), Some(Step(176)));
        assert_eq!(step_of_folder("step-12345678901"), Some(Step(12_345_678_901)));
        for strange in ["step-176", "step-+000000176", "step-", "0000000176", "step-0000000176#1"] {
            assert_eq!(step_of_folder(strange), None, "{strange}");
        }
    }

    #[test]
    fn what_is_no_layout_is_named() {
        let layout = |sizes: &[u64], part_bytes| Layout::new(sections(sizes), part_bytes);
        assert_eq!(layout(&[1], 0), Err(LayoutError::NoPartSize));
        assert_eq!(layout(&[], 1), Err(LayoutError::Empty));
        assert_eq!(layout(&[0, 0], 1), Err(LayoutError::Empty));
        assert_eq!(layout(&[u64::MAX, 1], 1), Err(LayoutError::TooLarge));
        let too_many = LayoutError::TooManyParts { total_bytes: 100_001, part_bytes: 1 };
        assert_eq!(layout(&[100_001], 1), Err(too_many));
        let twice = vec![Section { name: "a".to_owned(), bytes: 1 }; 2];
        assert_eq!(Layout::new(twice, 1), Err(LayoutError::Duplicate { name: "a".to_owned() }));
        let unnamed = vec![Section { name: String::new(), bytes: 1 }];
        assert_eq!(Layout::new(unnamed, 1), Err(LayoutError::Unnamed { index: 0 }));
    }

    #[test]
    fn a_part_may_span_sections() {
        let layout = Layout::new(sections(&[5, 0, 3, 4]), 6).unwrap();
        let pieces: Vec<_> =
            layout.pieces(layout.part_range(0)).map(|p| (p.section, p.range)).collect();
        assert_eq!(pieces, [("s0", 0..5), ("s2", 0..1)]);
        let pieces: Vec<_> =
            layout.pieces(layout.part_range(1)).map(|p| (p.section, p.range)).collect();
        assert_eq!(pieces, [("s2", 1..3), ("s3", 0..4)]);
    }

    proptest! {
        #[test]
        fn the_shares_of_any_number_of_ranks_cover_every_byte_once(
            sizes in prop::collection::vec(0u64..200, 1..6),
            part_bytes in 1u64..70,
            size in 1u32..40,
        ) {
            prop_assume!(sizes.iter().sum::<u64>() > 0);
            let layout = Layout::new(sections(&sizes), part_bytes).unwrap();
            let (mut part_at, mut byte_at) = (0, 0);
            let mut by_section = vec![0; sizes.len()];
            for rank in (0..size).map(Rank) {
                let share = layout.share(rank, size);
                prop_assert!(share.len() <= (layout.parts().div_ceil(size)) as usize);
                for part in share {
                    prop_assert_eq!(part, part_at);
                    part_at += 1;
                    let range = layout.part_range(part);
                    prop_assert_eq!(range.start, byte_at);
                    prop_assert!(!range.is_empty() && range.end - range.start <= part_bytes);
                    byte_at = range.end;
                    for piece in layout.pieces(range) {
                        let section: usize = piece.section[1..].parse().unwrap();
                        prop_assert_eq!(piece.range.start, by_section[section]);
                        by_section[section] = piece.range.end;
                    }
                }
            }
            prop_assert_eq!(part_at, layout.parts());
            prop_assert_eq!(byte_at, layout.total_bytes());
            prop_assert_eq!(by_section, sizes);
        }
    }
}
