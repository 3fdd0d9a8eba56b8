//! What libtorch refuses in the middle of many operations, as an error.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use crate::sys::ShimError;

/// Runs `work`, in which an operation may find no memory on a device: tch then panics with libtorch's words, and
/// they are returned. Any other panic goes on.
///
/// What `work` changed stays changed, so it should change nothing that is used after an error.
///
/// # Errors
/// [`ShimError`] with the first line of libtorch's words.
pub fn refusals<T>(work: impl FnOnce() -> T) -> Result<T, ShimError> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned().unwrap_or_default();
        if !text.contains("out of memory") {
            resume_unwind(panic);
        }
        let words = text.split_once("Torch(\"").map_or(text.as_str(), |(_, words)| words);
        let words = words
            .split("\\n")
            .next()
            .and_then(|words| words.split(" GPU ").next())
            .unwrap_or_default();
        ShimError(words.trim_end_matches("\")").to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_memory_is_an_error_of_one_line_and_other_panics_stay_panics() {
        assert_eq!(refusals(|| 3), Ok(3));
        let refused = || {
            let error = tch::TchError::Torch("CUDA out of memory. Tried 2 GiB.\nmore".to_owned());
            std::hint::black_box(Err::<(), _>(error)).unwrap();
        };
        let error = refusals(refused).unwrap_err();
        assert_eq!(error.0, "CUDA out of memory. Tried 2 GiB.");
        assert!(catch_unwind(|| refusals(|| panic!("on purpose"))).is_err());
    }
}
