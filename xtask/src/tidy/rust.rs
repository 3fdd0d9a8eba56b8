//! Rules about one Rust file.

use std::path::Path;

use super::{Finding, mask};

const FILE_LINES_MAX: usize = 600;
const FUNCTION_LINES_MAX: usize = 70;
const LONG_FILE: &str = "lines, more than";

/// Where `unsafe` may stand, as the start of a path.
const UNSAFE_HOMES: [&str; 8] = [
    "libtorch/",
    "collective/src/nccl.rs",
    "collective/src/nccl/",
    "collective/tests/suite/nccl.rs",
    "shards/src/jpeg.rs",
    "shards/src/jpeg/kernels.rs",
    "shards/src/simd.rs",
    "shards/src/simd/",
];

/// Names for modules that hold whatever nobody found a place for.
const FORBIDDEN_MODULES: [&str; 8] =
    ["utils", "util", "common", "manager", "managers", "helper", "helpers", "misc"];

pub(super) fn check(path: &str, text: &str) -> Vec<Finding> {
    let code = mask::code(text);
    let mut findings = Vec::new();
    findings.extend(header(path, text));
    findings.extend(length(path, text));
    findings.extend(module_names(path, &code));
    findings.extend(unsafe_code(path, &code));
    findings.extend(function_lengths(path, &code));
    findings
}

/// Whether the finding is one that `tidy.toml` can excuse.
pub(super) fn is_long_file(finding: &Finding) -> bool {
    finding.message.contains(LONG_FILE)
}

fn header(path: &str, text: &str) -> Option<Finding> {
    let starts_well = text.starts_with("//! ");
    (!starts_well).then(|| Finding::error(path, 1, "does not start with a `//!` header"))
}

fn length(path: &str, text: &str) -> Option<Finding> {
    let lines = text.lines().count();
    let message = || {
        let way_out = "split it, or give a reason in xtask/tidy.toml";
        format!("{lines} {LONG_FILE} {FILE_LINES_MAX}: {way_out}")
    };
    (lines > FILE_LINES_MAX).then(|| Finding::error(path, 0, message()))
}

fn module_names(path: &str, code: &str) -> Vec<Finding> {
    let forbidden = |name: &str| FORBIDDEN_MODULES.contains(&name);
    let message = |name: &str| format!("a module named `{name}` says nothing about what it is for");

    let names = path.split('/').map(|name| name.strip_suffix(".rs").unwrap_or(name));
    let mut findings: Vec<Finding> = names
        .filter(|name| forbidden(name))
        .map(|name| Finding::error(path, 0, message(name)))
        .collect();
    for at in mask::words(code, "mod") {
        let name = code[at + "mod".len()..].trim_start();
        let name = name.split(|c: char| c != '_' && !c.is_ascii_alphanumeric()).next();
        if let Some(name) = name.filter(|name| forbidden(name)) {
            findings.push(Finding::error(path, mask::line_at(code, at), message(name)));
        }
    }
    findings
}

fn unsafe_code(path: &str, code: &str) -> Vec<Finding> {
    if UNSAFE_HOMES.iter().any(|home| Path::new(path).starts_with(home)) {
        return Vec::new();
    }
    let message = || format!("`unsafe` outside of its homes ({})", UNSAFE_HOMES.join(", "));
    mask::words(code, "unsafe")
        .map(|at| Finding::error(path, mask::line_at(code, at), message()))
        .collect()
}

fn function_lengths(path: &str, code: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    for at in mask::words(code, "fn") {
        let name: String = code[at + "fn".len()..]
            .trim_start()
            .chars()
            .take_while(|&c| c == '_' || c.is_ascii_alphanumeric())
            .collect();
        if name.is_empty() {
            continue; // The type of a function, not a function.
        }
        let body = mask::item(code, at);
        let lines = code[body].lines().count();
        if lines > FUNCTION_LINES_MAX {
            let message = format!("`{name}` has {lines} lines, more than {FUNCTION_LINES_MAX}");
            findings.push(Finding::warning(path, mask::line_at(code, at), message));
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::super::Severity;
    use super::*;

    fn messages(path: &str, text: &str) -> Vec<String> {
        check(path, text).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_tidy_file_has_no_findings() {
        let text = "//! Tidy, not unsafe.\n\nfn f(g: fn(u8)) { \"unsafe mod utils\"; }\n";
        assert_eq!(messages("a/src/tidy.rs", text), [""; 0]);
    }

    #[test]
    fn a_missing_header_is_found() {
        for text in ["fn main() {}\n", "\n//! Late.\n", "//!\n", ""] {
            assert_eq!(messages("a/build.rs", text).len(), 1, "{text:?}");
        }
    }

    #[test]
    fn a_file_of_601_lines_is_found() {
        let lines = |count: usize| format!("//! Long.\n{}", "\n".repeat(count - 1));
        assert_eq!(messages("a/src/b.rs", &lines(600)), [""; 0]);
        let findings = check("a/src/b.rs", &lines(601));
        assert_eq!(findings.len(), 1);
        assert!(is_long_file(&findings[0]));
        assert_eq!(findings[0].severity, Severity::Error);
    }

    #[test]
    fn a_function_of_71_lines_is_warned_about() {
        let function = |lines: usize| {
            format!(
                "//! F.\n\npub fn long() {{\n{}}}\nfn next() {{}}\n",
                "    x();\n".repeat(lines - 2)
            )
        };
        assert_eq!(messages("a/src/b.rs", &function(70)), [""; 0]);
        assert_eq!(
            messages("a/src/b.rs", &function(71)),
            ["warning: a/src/b.rs:3: `long` has 71 lines, more than 70"]
        );
    }

    #[test]
    fn a_forbidden_module_is_found_by_file_folder_and_declaration() {
        assert_eq!(messages("a/src/utils.rs", "//! U.\n").len(), 1);
        assert_eq!(messages("a/tests/common/mod.rs", "//! C.\n").len(), 1);
        let found =
            messages("a/src/lib.rs", "//! L.\nmod helper;\npub mod manager {}\nmod utility;\n");
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].starts_with("error: a/src/lib.rs:2:"), "{found:?}");
    }

    #[test]
    fn unsafe_is_found_outside_of_its_homes() {
        let text = "//! U.\nfn f() { unsafe { g() } }\n";
        assert_eq!(messages("worker/src/a.rs", text).len(), 1);
        assert_eq!(messages("shards/src/jpeg_two.rs", text).len(), 1);
        assert_eq!(messages("shards/src/jpeg.rs", text), [""; 0]);
        assert_eq!(messages("shards/src/simd.rs", text), [""; 0]);
        assert_eq!(messages("libtorch/src/flat.rs", text), [""; 0]);
    }
}
