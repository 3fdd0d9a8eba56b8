//! Which crate may depend on which: the graph of STYLE.md, as a table.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use serde::Deserialize;

use super::Finding;
use crate::process;
use crate::workspace::Workspace;

/// The allowed arrows between our crates. A new one needs a decision record.
const ARROWS: [(&str, &[&str]); 15] = [
    ("cluster", &[]),
    ("libtorch", &[]),
    ("bucket", &[]),
    ("xtask", &[]),
    (TESTING, &[]),
    ("recipe", &["cluster"]),
    ("proto", &["cluster"]),
    ("simulation", &["cluster"]),
    ("shards", &["cluster", "bucket"]),
    ("checkpoint", &["cluster", "bucket"]),
    ("collective", &["cluster", "libtorch"]),
    ("model", &["libtorch"]),
    ("coordinator", &["cluster", "proto", "checkpoint"]),
    (
        "worker",
        &["cluster", "recipe", "proto", "checkpoint", "shards", "model", "collective", "libtorch"],
    ),
    ("cli", &["cluster", "recipe", "coordinator", "proto", "shards", "checkpoint", "simulation"]),
];

/// Servers for tests: any crate may name it as a development dependency, none may link it.
const TESTING: &str = "testing";

/// The crates that may name libtorch's bindings.
const TORCH_USERS: [&str; 4] = ["libtorch", "model", "collective", "worker"];
const TORCH: [&str; 2] = ["tch", "torch-sys"];

/// The crates that tokio may not reach, not even through others.
const WITHOUT_TOKIO: [&str; 3] = ["cluster", "model", "collective"];

/// What `cargo metadata` says about the workspace.
#[derive(Debug, Default)]
pub(super) struct Graph {
    /// Our crates, with what each names in its manifest, development dependencies included.
    named: BTreeMap<String, BTreeSet<String>>,
    /// All crates, with what each links, without development and build dependencies.
    linked: BTreeMap<String, BTreeSet<String>>,
}

impl Graph {
    pub(super) fn load(workspace: &Workspace) -> Result<Self> {
        let mut cargo = workspace.cargo(&["metadata"]);
        let json = process::output(cargo.args(["--format-version", "1"]))?;
        Self::from_json(&json)
    }

    fn from_json(json: &str) -> Result<Self> {
        let metadata: Metadata =
            serde_json::from_str(json).context("cannot understand `cargo metadata`")?;
        let names: BTreeMap<&str, &str> = metadata
            .packages
            .iter()
            .map(|package| (package.id.as_str(), package.name.as_str()))
            .collect();
        let ours: BTreeSet<&str> = metadata.workspace_members.iter().map(String::as_str).collect();

        let mut graph = Self::default();
        for package in metadata.packages.iter().filter(|package| ours.contains(&*package.id)) {
            let named = package.dependencies.iter().map(|dependency| dependency.name.clone());
            graph.named.insert(package.name.clone(), named.collect());
        }
        for node in &metadata.resolve.nodes {
            let linked = node.deps.iter().filter(|dep| dep.is_linked());
            let linked = linked.filter_map(|dep| names.get(&*dep.pkg)).map(|&name| name.to_owned());
            if let Some(&name) = names.get(&*node.id) {
                // Two versions of a crate count as one: either may be the way to tokio.
                graph.linked.entry(name.to_owned()).or_default().extend(linked);
            }
        }
        Ok(graph)
    }

    /// How `from` comes to link `to`, as a list of crates; empty if it does not.
    fn way(&self, from: &str, to: &str) -> Vec<String> {
        let mut came_from: BTreeMap<&str, &str> = BTreeMap::new();
        let mut open = vec![from];
        while let Some(name) = open.pop() {
            if name == to {
                let mut way = vec![to.to_owned()];
                let mut at = to;
                while let Some(&before) = came_from.get(at).filter(|_| at != from) {
                    way.push(before.to_owned());
                    at = before;
                }
                way.reverse();
                return way;
            }
            for next in self.linked.get(name).into_iter().flatten() {
                if next != from && !came_from.contains_key(next.as_str()) {
                    came_from.insert(next, name);
                    open.push(next);
                }
            }
        }
        Vec::new()
    }
}

pub(super) fn check(graph: &Graph) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (name, named) in &graph.named {
        let place = format!("{name}/Cargo.toml");
        let Some((_, allowed)) = ARROWS.iter().find(|(known, _)| known == name) else {
            let message = "this crate has no row in the table of xtask/src/tidy/arrows.rs";
            findings.push(Finding::error(&place, 0, message));
            continue;
        };
        for dependency in named.iter().filter(|dependency| graph.named.contains_key(*dependency)) {
            let is_for_tests = dependency == TESTING && graph.way(name, TESTING).is_empty();
            if !allowed.contains(&&**dependency) && !is_for_tests {
                let message = format!("`{name}` may not depend on `{dependency}`");
                findings.push(Finding::error(&place, 0, message));
            }
        }
        for torch in TORCH.into_iter().filter(|&torch| named.contains(torch)) {
            if !TORCH_USERS.contains(&&**name) {
                let message = format!("only {} may use {torch}", TORCH_USERS.join(", "));
                findings.push(Finding::error(&place, 0, message));
            }
        }
        if WITHOUT_TOKIO.contains(&&**name) {
            let way = graph.way(name, "tokio");
            if !way.is_empty() || named.contains("tokio") {
                let message = format!("tokio may not come in here ({})", way.join(" -> "));
                findings.push(Finding::error(&place, 0, message));
            }
        }
    }
    findings
}

#[derive(Debug, Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    workspace_members: Vec<String>,
    resolve: Resolve,
}

#[derive(Debug, Deserialize)]
struct Package {
    name: String,
    id: String,
    dependencies: Vec<Dependency>,
}

#[derive(Debug, Deserialize)]
struct Dependency {
    name: String,
}

#[derive(Debug, Deserialize)]
struct Resolve {
    nodes: Vec<Node>,
}

#[derive(Debug, Deserialize)]
struct Node {
    id: String,
    deps: Vec<NodeDependency>,
}

#[derive(Debug, Deserialize)]
struct NodeDependency {
    pkg: String,
    dep_kinds: Vec<DependencyKind>,
}

#[derive(Debug, Deserialize)]
struct DependencyKind {
    kind: Option<String>,
}

impl NodeDependency {
    fn is_linked(&self) -> bool {
        self.dep_kinds.iter().any(|kind| kind.kind.is_none())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A graph of our crates, in which everything named is also linked.
    fn graph(edges: &[(&str, &[&str])]) -> Graph {
        let to_set = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        let all: BTreeMap<String, BTreeSet<String>> =
            edges.iter().map(|&(name, to)| (name.to_owned(), to_set(to))).collect();
        let ours = |name: &String| ARROWS.iter().any(|(known, _)| known == name) || name == "new";
        let named = all.clone().into_iter().filter(|(name, _)| ours(name)).collect();
        Graph { named, linked: all }
    }

    fn messages(edges: &[(&str, &[&str])]) -> Vec<String> {
        check(&graph(edges)).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_allowed_arrows_are_allowed() {
        assert_eq!(messages(&ARROWS), [""; 0]);
    }

    #[test]
    fn a_wrong_arrow_is_found() {
        assert_eq!(
            messages(&[("cluster", &["proto", "serde"]), ("proto", &["cluster"])]),
            ["error: cluster/Cargo.toml: `cluster` may not depend on `proto`"]
        );
    }

    #[test]
    fn a_crate_without_a_row_is_found() {
        assert_eq!(messages(&[("new", &[])]).len(), 1);
    }

    #[test]
    fn torch_in_the_wrong_crate_is_found() {
        assert_eq!(messages(&[("cli", &["tch"]), ("shards", &["torch-sys"])]).len(), 2);
        assert_eq!(messages(&[("model", &["tch"])]), [""; 0]);
    }

    #[test]
    fn tokio_is_found_directly_and_through_others() {
        assert_eq!(messages(&[("cluster", &["tokio"])]).len(), 1);
        assert_eq!(messages(&[("worker", &["tokio"])]), [""; 0]);
        let through = messages(&[("model", &["a"]), ("a", &["b", "model"]), ("b", &["tokio"])]);
        assert_eq!(through.len(), 1);
        assert!(through[0].ends_with("(model -> a -> b -> tokio)"), "{through:?}");
    }

    #[test]
    fn metadata_is_read_as_cargo_writes_it() {
        let json = r#"{
            "packages": [
                {"name": "model", "id": "path#model", "dependencies": [
                    {"name": "tch", "kind": null}, {"name": "tokio", "kind": "dev"}]},
                {"name": "tch", "id": "registry#tch", "dependencies": []},
                {"name": "tokio", "id": "registry#tokio", "dependencies": []}
            ],
            "workspace_members": ["path#model"],
            "resolve": {"nodes": [{"id": "path#model", "deps": [
                {"pkg": "registry#tch", "dep_kinds": [{"kind": null}]},
                {"pkg": "registry#tokio", "dep_kinds": [{"kind": "dev"}]}]}]}
        }"#;
        let graph = Graph::from_json(json).unwrap();
        assert_eq!(graph.way("model", "tch"), ["model", "tch"]);
        assert_eq!(graph.way("model", "tokio"), [""; 0]);
        assert_eq!(graph.named["model"].len(), 2);
        assert!(Graph::from_json("{}").is_err());
    }
}
