//! Links between files of the repository lead somewhere.

use super::Finding;

/// Checks one Markdown file; `exists` answers for a path relative to the repository's root.
pub(super) fn check(path: &str, text: &str, exists: impl Fn(&str) -> bool) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut fenced = false;
    for (line, number) in text.lines().zip(1..) {
        let start = line.trim_start();
        if start.starts_with("```") || start.starts_with("~~~") {
            fenced = !fenced;
        }
        if fenced {
            continue;
        }
        for target in targets(&without_code(line)) {
            match resolve(path, &target) {
                Some(file) if exists(&file) => {}
                Some(file) => {
                    let message =
                        format!("the link `{target}` leads to {file}, which is not there");
                    findings.push(Finding::error(path, number, message));
                }
                None => {
                    let message = format!("the link `{target}` leaves the repository");
                    findings.push(Finding::error(path, number, message));
                }
            }
        }
    }
    findings
}

/// The line with its `code` blanked.
fn without_code(line: &str) -> String {
    let pieces: Vec<&str> = line.split('`').collect();
    let visible = |(at, piece): (usize, &&str)| {
        let is_code = at % 2 == 1 && at + 1 < pieces.len(); // An odd backtick opens nothing.
        if is_code { String::from(" ") } else { (*piece).to_owned() }
    };
    pieces.iter().enumerate().map(visible).collect()
}

/// The files that a line links to: `[text](file)` and `[name]: file`.
fn targets(line: &str) -> Vec<String> {
    let inline = line.match_indices("](").filter_map(|(at, _)| {
        let rest = &line[at + 2..];
        rest.find(')').map(|end| &rest[..end])
    });
    let definition = line.strip_prefix('[').and_then(|rest| rest.split_once("]: "));
    let all = inline.chain(definition.map(|(_, target)| target));
    all.filter_map(file_of).collect()
}

/// The file in a link's target, without title and anchor; nothing for other places and for anchors.
fn file_of(target: &str) -> Option<String> {
    let target = target.trim();
    let target = match target.strip_prefix('<').and_then(|rest| rest.split_once('>')) {
        Some((inside, _)) => inside,
        None => target.split_whitespace().next()?,
    };
    let is_elsewhere = target.contains("://") || target.starts_with("mailto:");
    let file = target.split('#').next().filter(|file| !file.is_empty());
    file.filter(|_| !is_elsewhere).map(str::to_owned)
}

/// The target seen from the root, or nothing if it lies outside.
fn resolve(path: &str, target: &str) -> Option<String> {
    let (mut folders, target) = match target.strip_prefix('/') {
        Some(from_root) => (Vec::new(), from_root),
        None => (path.split('/').collect(), target),
    };
    folders.pop(); // The Markdown file itself.
    for name in target.split('/') {
        match name {
            "" | "." => {}
            ".." => {
                folders.pop()?;
            }
            name => folders.push(name),
        }
    }
    Some(folders.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn broken(path: &str, text: &str) -> Vec<String> {
        let exists = |file: &str| matches!(file, "README.md" | "docs/operations.md" | "docs" | "");
        check(path, text, exists).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn links_that_lead_somewhere_are_fine() {
        let text = "[a](docs/operations.md#start) [b](./docs \"title\") [c](https://x.example/y)\n\
                    [d](#anchor) [e](mailto:a@b.example) `[f](gone.md)`\n[g]: docs/operations.md\n";
        assert_eq!(broken("README.md", text), [""; 0]);
        assert_eq!(broken("docs/operations.md", "[up](../README.md) [root](..)"), [""; 0]);
    }

    #[test]
    fn a_broken_link_is_found() {
        assert_eq!(
            broken("docs/operations.md", "\nsee [a](README.md)"),
            [
                "error: docs/operations.md:2: the link `README.md` leads to docs/README.md, which is not there"
            ]
        );
        assert_eq!(broken("README.md", "[a]: gone.md").len(), 1);
        assert_eq!(broken("README.md", "an odd ` and [a](gone.md)").len(), 1);
    }

    #[test]
    fn a_link_out_of_the_repository_is_found() {
        assert_eq!(
            broken("README.md", "[a](../elsewhere.md)"),
            ["error: README.md:1: the link `../elsewhere.md` leaves the repository"]
        );
    }

    #[test]
    fn code_blocks_are_not_read() {
        assert_eq!(broken("README.md", "```text\n[a](gone.md)\n```\n[b](gone.md)").len(), 1);
    }
}
