//! No file names a folder of one machine: such a path works for one person only.

use std::collections::BTreeSet;

use super::{Finding, mask};

/// The first folder of paths that only one machine has.
const FOLDERS: [&str; 4] = ["root", "home", "work", "tmp"];

/// Source, scripts, settings and prose; but tests may name what they like.
pub(super) fn applies_to(path: &str) -> bool {
    let is_test = path.ends_with("/tests.rs")
        || path.split('/').any(|folder| matches!(folder, "tests" | "benches" | "examples"));
    let kinds = [".rs", ".py", ".cpp", ".h", ".toml", ".proto", ".sh", ".md", ".ci/run"];
    !is_test && kinds.iter().any(|kind| path.ends_with(kind))
}

pub(super) fn check(path: &str, text: &str) -> Vec<Finding> {
    let tests =
        if path.ends_with(".rs") { mask::test_lines(&mask::code(text)) } else { BTreeSet::new() };
    let mut findings = Vec::new();
    for (line, number) in text.lines().zip(1..) {
        if tests.contains(&number) {
            continue;
        }
        for folder in FOLDERS.map(|name| format!("/{name}/")) {
            if starts_a_path(line, &folder) {
                let message = format!("a path below {folder} exists on one machine only");
                findings.push(Finding::error(path, number, message));
            }
        }
    }
    findings
}

/// Whether `folder` stands in the line as the start of a path, not in the middle of one.
fn starts_a_path(line: &str, folder: &str) -> bool {
    line.match_indices(folder).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        !before.is_some_and(|c| c.is_alphanumeric() || "_-.~/*}>)]".contains(c))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_absolute_path_is_found() {
        for folder in FOLDERS {
            let text = format!("//! A.\nconst A: &str = \"/{folder}/me\";\n");
            let findings = check("a/src/b.rs", &text);
            assert_eq!(findings.len(), 1);
            assert_eq!(findings[0].line, 2);
        }
    }

    #[test]
    fn the_middle_of_a_path_is_no_start() {
        for text in ["runs/work/a", "{root}/tmp/a", "~/work/", "https://b.example/home/", "../tmp/"]
        {
            assert_eq!(check("a.md", text), []);
        }
    }

    #[test]
    fn tests_may_name_any_path() {
        let text = "//! A.\n#[cfg(test)]\nmod tests {\n    const A: &str = \"/tmp/a\";\n}\n";
        assert_eq!(check("a/src/b.rs", text), []);
        assert!(!applies_to("a/tests/run.rs"));
        assert!(!applies_to("a/src/b/tests.rs"));
        assert!(applies_to(".ci/run"));
        assert!(applies_to("README.md"));
    }
}
