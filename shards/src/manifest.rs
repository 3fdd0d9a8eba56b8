//! The manifest of a split, `DIR/SPLIT.json`: what the dataset is and which files it has.
//!
//! It is written last, so a split whose manifest exists is complete.

use serde::{Deserialize, Serialize};

use crate::{digest::Sha256, format};

/// The only layout so far.
pub const VERSION: u32 = 1;

/// The key of the manifest's own checksum: the crc32c of all other fields as compact JSON.
const CHECKSUM: &str = "crc32c";

/// What a split is and where its samples are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Layout of this file, [`VERSION`].
    pub version: u32,
    /// Name of the split, which the file names start with.
    pub split: String,
    /// Number of samples.
    pub samples: u64,
    /// Class names; a label is a place in this list.
    pub classes: Vec<String>,
    /// Where the samples come from.
    pub provenance: Provenance,
    /// The shards, in the order of their samples.
    pub shards: Vec<Shard>,
}

/// Where samples come from and what was done to them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Provenance {
    /// What was packed, in the packer's words.
    pub source: String,
    /// Seed of the order in which the samples were packed.
    pub seed: u64,
    /// What packing does to the bytes of an image.
    pub policy: Policy,
    /// How many images were not JPEG and were encoded anew under that policy.
    pub converted: u64,
    /// How many images have four channels, CMYK or YCCK. They are kept, and converted when decoded.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub cmyk: u64,
    /// How many images were PNG files of 16 bits a channel, of which the upper eight were kept.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub deep: u64,
    /// Corrupt source files that were left out on request.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub skipped: Vec<String>,
    /// Who is to be named when the data is used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attribution: Option<String>,
    /// Terms under which the data may be used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub licence: Option<String>,
}

/// What packing does to the bytes of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// JPEG files are kept byte for byte. PNG files and raw pixels become JPEG of quality 100 without chroma
    /// subsampling (4:4:4; grey stays grey), which is close to the source but not lossless.
    KeepJpegConvertPngQuality100,
    /// The archives are somebody else's and were indexed where they lie.
    KeepTars,
}

/// The files of one shard, `NAME.tar` and `NAME.idx`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shard {
    /// File name without extension.
    pub name: String,
    /// Id of its first sample.
    pub first: u64,
    /// Number of its samples.
    pub samples: u64,
    /// Digest of the tar.
    pub tar_sha256: Sha256,
    /// Digest of the index.
    pub idx_sha256: Sha256,
}

impl Shard {
    /// File name of the archive.
    #[must_use]
    pub fn tar(&self) -> String {
        format!("{}.tar", self.name)
    }

    /// File name of the index.
    #[must_use]
    pub fn idx(&self) -> String {
        format!("{}.idx", self.name)
    }
}

/// What is wrong with the bytes of a manifest.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Not JSON, or not these fields; the source names line and column.
    #[error("it is not a manifest")]
    Json(#[from] serde_json::Error),
    /// Something in it has changed since it was written.
    #[error(
        "field `crc32c`: is {stated}, the other fields give {found}: a byte of them has changed"
    )]
    Checksum {
        /// By the manifest.
        stated: String,
        /// Of the fields.
        found: u32,
    },
    /// A field contradicts the others.
    #[error("field `{field}`: {problem}")]
    Field {
        /// Path of the field.
        field: String,
        /// What is wrong.
        problem: String,
    },
}

/// Whether a file name stays in its folder and is visible there.
pub(crate) fn is_plain_name(name: &str) -> bool {
    let plain = |c: u8| c.is_ascii_alphanumeric() || b"-_.".contains(&c);
    !name.is_empty() && name.len() <= 200 && !name.starts_with('.') && name.bytes().all(plain)
}

fn is_zero(count: &u64) -> bool {
    *count == 0
}

impl Manifest {
    /// Reads a manifest and checks that its fields agree.
    ///
    /// # Errors
    /// [`ManifestError`] names the first field that is wrong.
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        let mut fields: serde_json::Map<_, _> = serde_json::from_slice(bytes)?;
        let checksum = fields.remove(CHECKSUM);
        let manifest: Self = serde_json::from_value(fields.into())?;
        manifest.check()?; // It says more than that something has changed.
        // Manifests had none at first.
        if let Some(stated) = checksum {
            let found = manifest.checksum();
            if stated.as_u64() != Some(found.into()) {
                return Err(ManifestError::Checksum { stated: stated.to_string(), found });
            }
        }
        Ok(manifest)
    }

    /// Of all fields: whatever changes what the manifest says changes it.
    fn checksum(&self) -> u32 {
        crc32c::crc32c(&serde_json::to_vec(self).expect("every field has a JSON form"))
    }

    /// The bytes of the manifest file.
    ///
    /// # Panics
    /// Never: every field has a JSON form.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let text = serde_json::to_string_pretty(self).expect("every field has a JSON form");
        let fields = text.strip_prefix('{').expect("it is an object");
        format!("{{\n  \"{CHECKSUM}\": {},{fields}\n", self.checksum()).into_bytes()
    }

    /// The shard that holds `sample`, by its place in `shards`. `None` if there is no such sample.
    #[must_use]
    pub fn shard_of(&self, sample: u64) -> Option<usize> {
        let after = self.shards.partition_point(|shard| shard.first <= sample);
        (sample < self.samples && after > 0).then(|| after - 1)
    }

    fn check(&self) -> Result<(), ManifestError> {
        let wrong = |field: String, problem: String| Err(ManifestError::Field { field, problem });
        if self.version != VERSION {
            let problem = format!("is {}, this program reads {VERSION}", self.version);
            return wrong("version".to_owned(), problem);
        }
        if self.classes.is_empty() {
            return wrong("classes".to_owned(), "there are none".to_owned());
        }
        let mut first = 0_u64;
        for (number, shard) in self.shards.iter().enumerate() {
            let field = |name| format!("shards[{number}].{name}");
            let name = format::shard_name(&self.split, number);
            match self.provenance.policy {
                Policy::KeepJpegConvertPngQuality100 if shard.name != name => {
                    return wrong(field("name"), format!("is {:?}, expected {name:?}", shard.name));
                }
                Policy::KeepTars if !is_plain_name(&shard.name) => {
                    let problem = format!("is {:?}, which is no plain file name", shard.name);
                    return wrong(field("name"), problem);
                }
                Policy::KeepJpegConvertPngQuality100 | Policy::KeepTars => {}
            }
            if shard.first != first {
                return wrong(field("first"), format!("is {}, expected {first}", shard.first));
            }
            if shard.samples == 0 {
                return wrong(field("samples"), "is 0".to_owned());
            }
            let Some(next) = first.checked_add(shard.samples) else {
                return wrong(field("samples"), "is beyond all counting".to_owned());
            };
            first = next;
        }
        if self.samples != first || first == 0 {
            let problem = format!("is {}, the shards hold {first}", self.samples);
            return wrong("samples".to_owned(), problem);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn manifest() -> Manifest {
        let shard = |number, first, samples| Shard {
            name: format::shard_name("train", number),
            first,
            samples,
            tar_sha256: Sha256::of(b"tar"),
            idx_sha256: Sha256::of(b"idx"),
        };
        Manifest {
            version: VERSION,
            split: "train".to_owned(),
            samples: 15,
            classes: vec!["cat".to_owned(), "dog".to_owned()],
            provenance: Provenance {
                source: "pets".to_owned(),
                seed: 1,
                policy: Policy::KeepJpegConvertPngQuality100,
                converted: 0,
                cmyk: 0,
                deep: 0,
                skipped: Vec::new(),
                attribution: None,
                licence: None,
            },
            shards: vec![shard(0, 0, 10), shard(1, 10, 5)],
        }
    }

    #[test]
    fn a_manifest_reads_back_as_written() {
        assert_eq!(Manifest::parse(&manifest().encode()).unwrap(), manifest());
    }

    #[test]
    fn a_flip_of_any_bit_is_found() {
        let bytes = manifest().encode();
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut damaged = bytes.clone();
                damaged[at] ^= 1 << bit;
                // A digest's digits mean the same in capitals.
                let found = Manifest::parse(&damaged);
                assert!(found.is_err() || found.unwrap() == manifest(), "bit {bit} of byte {at}");
            }
        }
        let text = String::from_utf8(bytes).unwrap().replace("\"dog\"", "\"dug\"");
        let error = Manifest::parse(text.as_bytes()).unwrap_err().to_string();
        assert!(error.starts_with("field `crc32c`"), "{error}");
    }

    #[test]
    fn a_manifest_without_a_checksum_is_of_the_first_ones() {
        let text = serde_json::to_string(&manifest()).unwrap();
        assert_eq!(Manifest::parse(text.as_bytes()).unwrap(), manifest());
    }

    #[test]
    fn a_sample_is_in_the_shard_whose_range_holds_it() {
        let shards: Vec<_> = [0, 9, 10, 14, 15].map(|id| manifest().shard_of(id)).into();
        assert_eq!(shards, [Some(0), Some(0), Some(1), Some(1), None]);
    }

    #[test]
    fn a_contradiction_names_its_field() {
        let mut wrong = manifest();
        wrong.shards[1].first = 9;
        let error = Manifest::parse(&wrong.encode()).unwrap_err();
        assert_eq!(error.to_string(), "field `shards[1].first`: is 9, expected 10");
        let mut wrong = manifest();
        wrong.shards[0].name = "../train".to_owned();
        assert!(
            Manifest::parse(&wrong.encode()).unwrap_err().to_string().contains("shards[0].name")
        );
    }

    #[test]
    fn an_unknown_field_is_refused() {
        let text = String::from_utf8(manifest().encode()).unwrap();
        let text = text.replacen("\"samples\"", "\"sampels\"", 1);
        let error = Manifest::parse(text.as_bytes()).unwrap_err();
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(source.contains("unknown field `sampels`"), "{source}");
    }

    proptest! {
        #[test]
        fn a_damaged_manifest_never_panics(at: prop::sample::Index, byte: u8) {
            let mut bytes = manifest().encode();
            let place = at.index(bytes.len());
            bytes[place] = byte;
            let _outcome = Manifest::parse(&bytes);
        }
    }
}
