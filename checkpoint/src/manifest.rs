//! What a checkpoint contains, with checksums.
//!
//! Its file is strict JSON, `{"format": 1, "blake3": …, "manifest": {…}}`: an unknown or missing field,
//! values that contradict each other, and any flipped bit are refused. The digest is over the manifest
//! as compact JSON in the order of its fields.

use std::{collections::BTreeMap, fmt};

use cluster::{Epoch, Generation, RunId, Step, Term, Timestamp};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::layout::{Layout, LayoutError, Section};

/// The version of the manifest's format that this build writes and reads.
pub const FORMAT: u32 = 1;

/// The description of one checkpoint. See [`Manifest::parse`] for what its values must satisfy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The run.
    pub run: RunId,
    /// Updates applied to the state.
    pub step: Step,
    /// The epoch that the next update belongs to.
    pub epoch: Epoch,
    /// The term under which it was committed.
    pub term: Term,
    /// The generation under which it was committed.
    pub generation: Generation,
    /// The state's sections in their order.
    pub sections: Vec<Section>,
    /// The size of a part; see [`Layout`].
    pub part_bytes: u64,
    /// All parts, in order.
    pub parts: Vec<PartRecord>,
    /// SHA-256 over the canonical state, in hexadecimal, if it was computed.
    pub state_sha256: Option<String>,
    /// The recipe, as TOML text.
    pub recipe: String,
    /// What can change bits; see `Fingerprint` in the glossary.
    pub fingerprint: BTreeMap<String, String>,
    /// Name and version of the software that wrote it.
    pub software: String,
    /// When it was committed, in milliseconds since the Unix epoch.
    pub created: Timestamp,
    /// Drawn at random for each attempt to commit: tells one's own write from another's.
    pub nonce: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File<Content> {
    format: u32,
    blake3: Digest,
    manifest: Content,
}

/// One part of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartRecord {
    /// Its place.
    pub index: u32,
    /// Its size.
    pub bytes: u64,
    /// The digest of its bytes.
    pub blake3: Digest,
}

/// A BLAKE3 digest; as text, 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(blake3::Hash);

impl Digest {
    /// The digest of `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(blake3::hash(bytes))
    }
}

impl From<[u8; 32]> for Digest {
    fn from(bytes: [u8; 32]) -> Self {
        Self(blake3::Hash::from_bytes(bytes))
    }
}

impl From<Digest> for [u8; 32] {
    fn from(digest: Digest) -> Self {
        *digest.0.as_bytes()
    }
}

impl TryFrom<String> for Digest {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let digest = blake3::Hash::from_hex(&text).map(Self);
        digest.map_err(|_| format!("{text:?} is not a digest of 64 hexadecimal digits"))
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

/// What is wrong with a manifest.
#[derive(Debug, Error)]
pub enum ManifestFault {
    /// It is not JSON, or a field is missing, unknown or of the wrong kind.
    #[error("it is not a manifest: {0}")]
    Syntax(serde_json::Error),
    /// It is of a format that this build does not know.
    #[error("its format is {found}; this build reads format {FORMAT}")]
    Format {
        /// The format it has.
        found: u64,
    },
    /// Its values are not those that were written.
    #[error("its BLAKE3 digest is {found}, expected {expected}")]
    Digest {
        /// The digest it carries.
        expected: Digest,
        /// The digest of its values.
        found: Digest,
    },
    /// Its sections and its part size do not fit.
    #[error("field sections or part_bytes: {0}")]
    Layout(LayoutError),
    /// The list of parts does not follow from the sections.
    #[error("field parts: it lists {found} parts, its sections make {expected}")]
    PartCount {
        /// What the sections make.
        expected: u32,
        /// What is listed.
        found: usize,
    },
    /// A part is not the one that belongs in its place.
    #[error(
        "field parts: entry {place} is part {} of {} bytes, expected part {place} of {expected_bytes} bytes",
        found.index, found.bytes
    )]
    Part {
        /// The place in the list.
        place: u32,
        /// The size of the part that belongs there.
        expected_bytes: u64,
        /// What is there.
        found: PartRecord,
    },
    /// The digest of the state is no digest.
    #[error("field state_sha256: {found:?} is not 64 lower-case hexadecimal digits")]
    StateDigest {
        /// What is there.
        found: String,
    },
    /// There is no nonce.
    #[error("field nonce: it is empty")]
    NoNonce,
}

/// In what two manifests of one step differ, apart from who committed them and when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference(Vec<String>);

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join(", "))
    }
}

impl Manifest {
    /// Reads a manifest's file and checks that its values fit together.
    ///
    /// # Errors
    /// [`ManifestFault`], the first one that is found.
    pub fn parse(json: &[u8]) -> Result<Self, ManifestFault> {
        // The format first: another one may have other fields.
        #[derive(Deserialize)]
        struct Version {
            format: u64,
        }
        let version: Version = serde_json::from_slice(json).map_err(ManifestFault::Syntax)?;
        if version.format != u64::from(FORMAT) {
            return Err(ManifestFault::Format { found: version.format });
        }
        let file: File<Self> = serde_json::from_slice(json).map_err(ManifestFault::Syntax)?;
        let (expected, found) = (file.blake3, file.manifest.digest());
        if expected != found {
            return Err(ManifestFault::Digest { expected, found });
        }
        file.manifest.check()?;
        Ok(file.manifest)
    }

    /// The file of this manifest.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        let file = File { format: FORMAT, blake3: self.digest(), manifest: self };
        let mut json = serde_json::to_vec_pretty(&file).expect("all its keys are strings");
        json.push(b'\n');
        json
    }

    fn digest(&self) -> Digest {
        Digest::of(&serde_json::to_vec(self).expect("all its keys are strings"))
    }

    /// How its sections are cut into parts.
    ///
    /// # Errors
    /// [`LayoutError`], never for a manifest that passed [`Manifest::check`].
    pub fn layout(&self) -> Result<Layout, LayoutError> {
        Layout::new(self.sections.clone(), self.part_bytes)
    }

    /// Whether the values fit together.
    ///
    /// # Errors
    /// [`ManifestFault`], the first one that is found.
    pub fn check(&self) -> Result<(), ManifestFault> {
        let layout = self.layout().map_err(ManifestFault::Layout)?;
        if self.parts.len() != layout.parts() as usize {
            let (expected, found) = (layout.parts(), self.parts.len());
            return Err(ManifestFault::PartCount { expected, found });
        }
        for (place, part) in (0..).zip(&self.parts) {
            let range = layout.part_range(place);
            let expected_bytes = range.end - range.start;
            if (part.index, part.bytes) != (place, expected_bytes) {
                return Err(ManifestFault::Part { place, expected_bytes, found: part.clone() });
            }
        }
        if let Some(digest) = &self.state_sha256
            && (digest.len() != 64 || !digest.bytes().all(|c| b"0123456789abcdef".contains(&c)))
        {
            return Err(ManifestFault::StateDigest { found: digest.clone() });
        }
        if self.nonce.is_empty() { Err(ManifestFault::NoNonce) } else { Ok(()) }
    }

    /// In what the content of `other` differs; nothing if it is the same.
    ///
    /// Term, generation, time and nonce are not content: a step that is repeated after a change of
    /// membership has the same bits, and its checkpoint is as good.
    #[must_use]
    pub fn difference(&self, other: &Self) -> Option<Difference> {
        let mut fields = Vec::new();
        let mut note = |same: bool, field: &str| {
            if !same {
                fields.push(field.to_owned());
            }
        };
        note(self.run == other.run, "run");
        note(self.step == other.step, "step");
        note(self.epoch == other.epoch, "epoch");
        note(self.sections == other.sections, "sections");
        note(self.part_bytes == other.part_bytes, "part_bytes");
        note(self.state_sha256 == other.state_sha256, "state_sha256");
        note(self.recipe == other.recipe, "recipe");
        note(self.software == other.software, "software");
        let keys = self.fingerprint.keys().chain(other.fingerprint.keys());
        let keys: std::collections::BTreeSet<_> = keys.collect();
        for key in keys {
            let same = self.fingerprint.get(key) == other.fingerprint.get(key);
            note(same, &format!("fingerprint.{key}"));
        }
        note(self.parts.len() == other.parts.len(), "number of parts");
        for (own, other) in self.parts.iter().zip(&other.parts) {
            note(own == other, &format!("part {}", own.index));
        }
        (!fields.is_empty()).then_some(Difference(fields))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        let part = |index, bytes| PartRecord { index, bytes, blake3: Digest::of(&[7]) };
        Manifest {
            run: RunId::try_from("digits".to_owned()).unwrap(),
            step: Step(176),
            epoch: Epoch(7),
            term: Term(1),
            generation: Generation(2),
            sections: vec![Section { name: "params".to_owned(), bytes: 10 }],
            part_bytes: 8,
            parts: vec![part(0, 8), part(1, 2)],
            state_sha256: Some("ab".repeat(32)),
            recipe: "epochs = 8\n".to_owned(),
            fingerprint: BTreeMap::from([("threads".to_owned(), "1".to_owned())]),
            software: "percheron 0.1.0".to_owned(),
            created: Timestamp(1),
            nonce: "n".to_owned(),
        }
    }

    /// How the file is refused when its manifest is changed and its digest made to fit.
    fn fault(change: impl FnOnce(&mut serde_json::Value)) -> String {
        let mut content = serde_json::to_value(manifest()).unwrap();
        change(&mut content);
        let blake3 = match serde_json::from_value::<Manifest>(content.clone()) {
            Ok(changed) => changed.digest(),
            Err(_) => Digest::of(b"it does not come to that"),
        };
        let file = File { format: FORMAT, blake3, manifest: content };
        Manifest::parse(&serde_json::to_vec(&file).unwrap()).unwrap_err().to_string()
    }

    #[test]
    fn a_manifest_survives_its_file() {
        assert_eq!(Manifest::parse(&manifest().to_json()).unwrap(), manifest());
    }

    #[test]
    fn each_fault_names_its_field() {
        let without_recipe = |content: &mut serde_json::Value| {
            drop(content.as_object_mut().unwrap().remove("recipe"))
        };
        for (found, expected) in [
            (fault(|m| m["stepp"] = 1.into()), "unknown field `stepp`"),
            (fault(|m| m["step"] = "x".into()), "invalid type: string \"x\""),
            (fault(without_recipe), "missing field `recipe`"),
            (fault(|m| m["run"] = "../x".into()), "run name \"../x\" is not usable"),
            (fault(|m| m["part_bytes"] = 0.into()), "part_bytes: the part size is 0"),
            (fault(|m| m["part_bytes"] = 4.into()), "it lists 2 parts, its sections make 3"),
            (
                fault(|m| m["parts"][1]["index"] = 0.into()),
                "entry 1 is part 0 of 2 bytes, expected part 1 of 2 bytes",
            ),
            (fault(|m| m["parts"][0]["bytes"] = 7.into()), "entry 0 is part 0 of 7 bytes"),
            (fault(|m| m["parts"][0]["blake3"] = "xy".into()), "\"xy\" is not a digest"),
            (fault(|m| m["state_sha256"] = "xy".into()), "field state_sha256"),
            (fault(|m| m["nonce"] = "".into()), "field nonce: it is empty"),
        ] {
            assert!(found.contains(expected), "{found:?} does not say {expected:?}");
        }
        assert!(matches!(Manifest::parse(b"garbage"), Err(ManifestFault::Syntax(_))));
        let newer = Manifest::parse(b"{\"format\": 2, \"contents\": []}").unwrap_err();
        assert_eq!(newer.to_string(), "its format is 2; this build reads format 1");
    }

    #[test]
    fn no_flipped_bit_makes_another_manifest() {
        let file = manifest().to_json();
        for bit in 0..file.len() * 8 {
            let mut flipped = file.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            if let Ok(read) = Manifest::parse(&flipped) {
                assert_eq!(read, manifest(), "bit {bit} went unnoticed"); // White space, say.
            }
        }
    }

    #[test]
    fn who_committed_and_when_makes_no_difference_and_all_else_is_named() {
        let own = manifest();
        let mut other = manifest();
        (other.term, other.generation) = (Term(5), Generation(9));
        (other.created, other.nonce) = (Timestamp(99), "m".to_owned());
        assert_eq!(own.difference(&other), None);
        other.parts[1].blake3 = Digest::of(&[8]);
        other.fingerprint.insert("device".to_owned(), "cpu".to_owned());
        let difference = own.difference(&other).unwrap().to_string();
        assert_eq!(difference, "fingerprint.device, part 1");
    }
}
