//! The only place that prints. That whoever reads is gone is no error: the work goes on.

use std::io::{self, Write as _};

/// A line on the standard output.
pub(crate) fn out(line: &str) {
    writeln!(io::stdout().lock(), "{line}").ok(); // The reader may be gone.
}

/// Text on the standard output, as it is.
pub(crate) fn out_text(text: &str) {
    write!(io::stdout().lock(), "{text}").ok(); // The reader may be gone.
}

/// A line on the standard error.
pub(crate) fn err(line: &str) {
    writeln!(io::stderr().lock(), "{line}").ok(); // The reader may be gone.
}

/// An error with all its causes, as one line on the standard error.
pub(crate) fn error(error: &anyhow::Error) {
    err(&format!("error: {}", in_one_line(&format!("{error:#}"))));
}

/// Several problems are reported at once on a line each; here they share one.
pub(crate) fn in_one_line(text: &str) -> String {
    text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ")
}

/// Whole digits in groups of three.
pub(crate) fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let mut grouped = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_problems_share_one_line() {
        assert_eq!(in_one_line("one\n two\n\n"), "one; two");
    }

    #[test]
    fn digits_are_grouped() {
        let numbers = [7, 999, 1000, 1_234_567];
        assert_eq!(numbers.map(grouped), ["7", "999", "1,000", "1,234,567"]);
    }
}
