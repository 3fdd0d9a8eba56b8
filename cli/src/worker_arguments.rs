//! A worker's arguments, as those read them that start it and hand them on: its guard, and the supervisor of a machine.

use std::ffi::{OsStr, OsString};

use anyhow::{Context as _, Result};

/// If a word is the flag: the value that it holds behind `=`, if there is one.
#[expect(clippy::option_option, reason = "not the flag, the flag alone, the flag with its value")]
pub(crate) fn splits_as(word: &OsStr, flag: &str) -> Option<Option<OsString>> {
    let text = word.to_str()?;
    match text.strip_prefix(flag)? {
        "" => Some(None),
        rest => rest.strip_prefix('=').map(|value| Some(value.into())),
    }
}

/// The value that a flag has among the arguments.
pub(crate) fn value_of(arguments: &[OsString], flag: &str) -> Result<String> {
    let mut words = arguments.iter();
    let value = words
        .find_map(|word| splits_as(word, flag))
        .and_then(|inline| inline.or_else(|| words.next().cloned()));
    let value = value.with_context(|| format!("{flag}: it is missing among the arguments"))?;
    value.into_string().ok().with_context(|| format!("{flag}: not UTF-8"))
}

/// HOST:PORT of each coordinator that a value of `--coordinator` names.
pub(crate) fn coordinators(value: &str) -> Result<Vec<String>> {
    let address = |url: &str| {
        let (_, rest) = url
            .split_once("://")
            .with_context(|| format!("--coordinator: {url:?} is not http://HOST:PORT"))?;
        anyhow::Ok(rest.trim_end_matches('/').to_owned())
    };
    value.split(',').map(address).collect()
}
