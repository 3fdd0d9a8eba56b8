//! State dicts, costs, and the rule that fills them.

use model::{Architecture, Cost, EXIT_NAMES, Entry, Layout, ModelConfig, Role};
use serde_json::Value;
use tch::Kind;

use super::golden::{self, Golden, number, numbers, text, whole};
use super::report::{Check, for_each_case};

/// Names, shapes and order of all entries, numbers of parameters, and the exact cost of each exit.
pub(crate) fn models(golden: &Golden) -> Vec<Check> {
    let mut cases = golden.cases("models.json", "models");
    cases.extend(golden.cases("models.json", "variants"));
    for_each_case(&cases, |case| {
        let supported = case["unsupported"].is_null();
        vec![if supported { model(case) } else { unsupported(case) }]
    })
}

fn model(case: &Value) -> Check {
    let off = case["off"].as_str().map_or(String::new(), |off| format!(" without {off}"));
    let mut check = Check::new(format!("{}{off}, state and cost", text(&case["model"])), 0.0);
    let architecture = golden::architecture(case);
    let layout = Layout::of(&architecture);
    let lines: Vec<String> = layout.entries().iter().map(line).collect();
    for (line, stored) in lines.iter().zip(case["state"].as_array().expect("a list")) {
        let shape: Vec<i64> = numbers(&stored[1]).into_iter().map(|length| length as i64).collect();
        let stored = line_of(text(&stored[0]), &shape, text(&stored[2]));
        check.must(*line == stored, || format!("{line}, stored {stored}"));
    }
    let mut equal = |name: &str, found: u64| {
        let stored = whole(&case[name]);
        check.must(found == stored, || format!("{name} {found}, stored {stored}"));
    };
    equal("n_entries", lines.len() as u64);
    equal("params", layout.param_len() as u64);
    equal("decay_params", layout.decay_len() as u64);
    let hash = format!("{:016x}", golden::fnv1a64(&lines.join("\n")));
    check.must(hash == text(&case["state_fnv1a64"]), || "state_fnv1a64".to_owned());
    if let Some(stored) = case["macs_exact"].as_array() {
        let macs = Cost::of(&architecture).macs;
        for ((exit, found), stored) in EXIT_NAMES.iter().zip(macs).zip(stored) {
            check.must(found == whole(stored), || {
                format!("multiply-accumulates of {exit} {found}, stored {stored}")
            });
        }
    }
    check
}

/// What the reference cannot build is refused, by the name of the option.
fn unsupported(case: &Value) -> Check {
    let (name, off) = (text(&case["model"]), text(&case["off"]));
    let mut check = Check::new(format!("{name} refuses {off} off"), 0.0);
    let mut config = ModelConfig::published(name);
    golden::set_option(&mut config, off, &Value::Bool(false));
    let refusal = Architecture::try_from(&config).err().map(|error| error.to_string());
    check.must(refusal.as_ref().is_some_and(|text| text.contains(off)), || format!("{refusal:?}"));
    check
}

fn line(entry: &Entry) -> String {
    let kind = if entry.role == Role::Counter { "i64" } else { "f32" };
    line_of(&entry.name, &entry.shape, kind)
}

fn line_of(name: &str, shape: &[i64], kind: &str) -> String {
    let dimensions: Vec<String> = shape.iter().map(i64::to_string).collect();
    format!("{name} {} {kind}", dimensions.join("x"))
}

/// The rule's own test vectors.
pub(crate) fn fill_rule(golden: &Golden) -> Vec<Check> {
    let file = golden.json("fill.json");
    let seed = whole(&file["seed"]);
    let mut check = Check::new("the fill rule", 1e-9);
    for tensor in file["tensors"].as_array().expect("a list") {
        let name = text(&tensor["name"]);
        if name.ends_with("num_batches_tracked") {
            continue;
        }
        let shape: Vec<i64> = numbers(&tensor["shape"]).into_iter().map(|n| n as i64).collect();
        let values: Vec<f64> =
            golden::filled(seed, name, &shape).into_iter().map(f64::from).collect();
        let stored = numbers(&tensor["values_first4"]);
        check.must(values[..stored.len()] == stored, || name.to_owned());
        let sum: f64 = values.iter().sum();
        check.see((sum - number(&tensor["sum"])).abs(), || name.to_owned());
    }
    let size: Vec<usize> =
        numbers(&file["input"]["shape"]).into_iter().map(|n| n as usize).collect();
    let input = golden::images(seed, text(&file["input"]["name"]), size[0], size[2], Kind::Double);
    let sum = input.sum(Kind::Double).double_value(&[]);
    check.see((sum - number(&file["input"]["sum"])).abs(), || "input".to_owned());
    let labels = &file["labels"];
    let stored = numbers(&labels["values"]);
    let found =
        golden::labels(seed, text(&labels["name"]), stored.len(), whole(&labels["classes"]));
    check.must(found.iter().map(|label| *label as f64).eq(stored), || "labels".to_owned());
    vec![check]
}
