//! `percheron model`: what a network costs, before it is trained.

use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use model::{Architecture, Cost, EXIT_NAMES, Layout, StageSize};
use recipe::Recipe;
use serde::Serialize;

use super::say;
use crate::setup::architecture;

/// Options of the reference whose keys have other names here.
const OTHER_NAMES: [(&str, &str); 4] = [
    ("nb_classes", "classes"),
    ("num_SA_heads", "num_sa_heads"),
    ("with_last_CA", "with_last_ca"),
    ("SA_widening_factor", "sa_widening_factor"),
];

/// `percheron model …`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List the registered models with their published options.
    List(List),
    /// Show one model, stage by stage.
    Show(Show),
}

/// `percheron model list`.
#[derive(Debug, Args)]
pub struct List {
    /// Print one line of JSON.
    #[arg(long)]
    json: bool,
}

/// `percheron model show`.
#[derive(Debug, Args)]
pub struct Show {
    /// A registered model, such as reg800m_perceiver_t128.
    name: String,
    /// Set a key of the recipe's [model], such as input_size=160 or depth_factor=[1,1,1,1]; may be repeated.
    #[arg(long = "option", value_name = "KEY=VALUE")]
    options: Vec<String>,
    /// Print one line of JSON.
    #[arg(long)]
    json: bool,
}

/// A model and what it costs.
#[derive(Debug, Serialize)]
struct Card {
    name: String,
    classes: i64,
    input_size: i64,
    /// Elements of all parameters.
    parameters: usize,
    /// Those of them that have weight decay.
    decayed_parameters: usize,
    /// Entries of the state dict.
    tensors: usize,
    /// Multiply–accumulates of one image up to each exit.
    macs: Macs,
    /// Channels of the features that enter the four stages, and of those that leave the last.
    channels: [i64; 5],
    stages: [Stage; 4],
}

#[derive(Debug, Serialize)]
struct Macs {
    early3: u64,
    att: u64,
    cnn: u64,
    merge: u64,
}

#[derive(Debug, Serialize)]
struct Stage {
    latents: u64,
    channels: u64,
    side: u64,
    layers: u64,
    heads: u64,
    macs: u64,
}

pub(super) fn run(command: &Command) -> Result<()> {
    match command {
        Command::List(list) => {
            let names = model::variant_names();
            let cards: Vec<Card> =
                names.iter().map(|name| card(name, &[])).collect::<Result<_>>()?;
            if list.json {
                say(&serde_json::to_string(&cards)?);
            } else {
                table(&cards).iter().for_each(|line| say(line));
            }
        }
        Command::Show(show) => {
            let card = card(&show.name, &show.options)?;
            if show.json {
                say(&serde_json::to_string(&card)?);
            } else {
                page(&card).iter().for_each(|line| say(line));
            }
        }
    }
    Ok(())
}

fn card(name: &str, options: &[String]) -> Result<Card> {
    let mut sets = vec![format!("model.name={name}")];
    for option in options {
        let Some((key, value)) = option.split_once('=') else {
            bail!("--option {option:?} is not of the form KEY=VALUE, such as input_size=160");
        };
        let known = OTHER_NAMES.iter().find(|(other, _)| *other == key.trim());
        let key = known.map_or(key.trim(), |(_, key)| key);
        sets.push(format!("model.{key}={value}"));
    }
    let recipe = Recipe::from_toml("of the model", "", &sets)?;
    Ok(Card::of(&recipe.model.name, &architecture(&recipe)?))
}

impl Card {
    fn of(name: &str, architecture: &Architecture) -> Self {
        let (layout, cost) = (Layout::of(architecture), Cost::of(architecture));
        let [early3, att, cnn, merge] = cost.macs;
        Self {
            name: name.to_owned(),
            classes: architecture.classes(),
            input_size: architecture.input_size(),
            parameters: layout.param_len(),
            decayed_parameters: layout.decay_len(),
            tensors: layout.entries().len(),
            macs: Macs { early3, att, cnn, merge },
            channels: architecture.channels(),
            stages: cost.stages.map(|stage| {
                let StageSize { tokens: latents, channels, side, layers, heads, macs } = stage;
                Stage { latents, channels, side, layers, heads, macs }
            }),
        }
    }
}

impl Macs {
    fn exits(&self) -> [u64; 4] {
        [self.early3, self.att, self.cnn, self.merge]
    }
}

/// A line a model.
fn table(cards: &[Card]) -> Vec<String> {
    let [early3, att, cnn, merge] = EXIT_NAMES;
    let row = |name: &str, parameters: &str, exits: [&str; 4], latents: &str, channels: &str| {
        let [a, b, c, d] = exits;
        format!("{name:<30}{parameters:>12}{a:>10}{b:>10}{c:>10}{d:>10}  {latents:<16}{channels}")
    };
    let mut lines = vec![
        format!("{:<42}{:>40}", "", "millions of multiply–accumulates up to"),
        row("model", "parameters", [early3, att, cnn, merge], "latents", "channels"),
    ];
    for card in cards {
        let exits = card.macs.exits().map(millions);
        let exits = exits.each_ref().map(String::as_str);
        let latents = spaced(card.stages.iter().map(|stage| stage.latents));
        let channels = spaced(card.channels);
        let parameters = grouped(card.parameters as u64);
        lines.push(row(&card.name, &parameters, exits, &latents, &channels));
    }
    lines
}

/// A page for one model.
fn page(card: &Card) -> Vec<String> {
    let Card { name, classes, input_size, tensors, .. } = card;
    let mut lines = vec![
        format!("{name}, {classes} classes, {input_size} px"),
        format!(
            "  parameters {} ({} with weight decay), in {tensors} named tensors with the buffers",
            grouped(card.parameters as u64),
            grouped(card.decayed_parameters as u64),
        ),
        "  exit        multiply–accumulates of one image up to it".to_owned(),
    ];
    for (exit, macs) in EXIT_NAMES.iter().zip(card.macs.exits()) {
        lines.push(format!("  {exit:<8} {:>16}", grouped(macs)));
    }
    lines.push("  stage  channels  side  latents  layers  heads  multiply–accumulates".to_owned());
    for (number, stage) in (1..).zip(&card.stages) {
        let Stage { latents, channels, side, layers, heads, macs } = stage;
        lines.push(format!(
            "  {number:>5}{channels:>10}{side:>6}{latents:>9}{layers:>8}{heads:>7}{:>22}",
            grouped(*macs)
        ));
    }
    lines.push(format!("  out  {:>10}", card.channels[4]));
    lines
}

fn millions(count: u64) -> String {
    format!("{:.1}", count as f64 / 1e6)
}

fn spaced<T: ToString>(values: impl IntoIterator<Item = T>) -> String {
    values.into_iter().map(|value| value.to_string()).collect::<Vec<_>>().join(" ")
}

/// Whole digits in groups of three.
fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let groups: Vec<&str> = digits
        .as_bytes()
        .rchunks(3)
        .rev()
        .map(|group| std::str::from_utf8(group).expect("digits are ASCII"))
        .collect();
    groups.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_registered_model_has_a_card_with_the_published_figures() {
        let cards: Vec<Card> =
            model::variant_names().iter().map(|name| card(name, &[]).unwrap()).collect();
        assert_eq!(cards.len(), 56);
        assert_eq!(table(&cards).len(), 58);
        let figures = |name: &str| {
            let card = cards.iter().find(|card| card.name == name).unwrap();
            (card.parameters, card.macs.exits().map(millions))
        };
        let millions = |exits: [&str; 4]| exits.map(str::to_owned);
        assert_eq!(
            figures("reg800m_perceiver_t128"),
            (21_798_360, millions(["457.9", "1063.5", "1227.6", "1298.3"]))
        );
        assert_eq!(
            figures("resnet50_0375_perceiver_t128"),
            (20_283_336, millions(["619.3", "1007.3", "1121.9", "1190.2"]))
        );
        assert_eq!(
            figures("mobilenetV3_0x75_perceiver_t128"),
            (9_299_040, millions(["97.3", "181.3", "206.4", "266.1"]))
        );
    }

    #[test]
    fn options_change_the_model_and_wrong_ones_are_named() {
        let with = |options: &[&str]| {
            let options: Vec<_> = options.iter().map(|&option| option.to_owned()).collect();
            card("reg400m_perceiver_t32", &options)
        };
        let small = with(&["nb_classes=10", "input_size=64", "with_last_CA=false"]).unwrap();
        assert_eq!((small.classes, small.input_size), (10, 64));
        assert!(small.parameters < with(&[]).unwrap().parameters);
        let problem = |options: &[&str]| format!("{:#}", with(options).unwrap_err());
        assert!(problem(&["depth_facto=1"]).contains("\"model.depth_factor\""));
        assert!(problem(&["num_SA_heads=[3,2,4,8]"]).contains("num_sa_heads"));
        assert!(problem(&["dropout"]).contains("KEY=VALUE"));
        let unknown = format!("{:#}", card("reg400m_perceiver_t33", &[]).err().unwrap());
        assert!(unknown.contains("reg400m_perceiver_t33"), "{unknown}");
    }

    #[test]
    fn a_page_has_a_line_for_every_exit_and_stage() {
        let page = page(&card("resnet18_perceiver_t128", &[]).unwrap());
        assert_eq!(page.len(), 3 + 4 + 1 + 4 + 1);
        assert_eq!([7, 999, 1_000, 1_234_567].map(grouped), ["7", "999", "1,000", "1,234,567"]);
    }
}
