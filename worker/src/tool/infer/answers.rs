//! What was found, for people, for programs and for tables.

use std::io;

use anyhow::Result;
use model::{Answers, EXIT_NAMES};
use serde::Serialize;
use tch::{Device, Kind, Tensor};

use crate::tool::say;

/// How predictions are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    Text,
    /// An object a line.
    Json,
    Csv,
}

/// An image and what it may show.
#[derive(Debug, Serialize)]
struct Prediction<'a> {
    image: &'a str,
    exit: &'static str,
    /// How sure the exit was: its largest probability.
    confidence: f32,
    /// The most likely first.
    top: Vec<Guess<'a>>,
}

#[derive(Debug, Serialize)]
struct Guess<'a> {
    class: &'a str,
    index: usize,
    probability: f32,
}

/// Writes predictions to the standard output, and counts the exits.
pub(super) struct Predictions {
    form: Form,
    classes: Vec<String>,
    top: usize,
    counts: [u64; 4],
    table: csv::Writer<io::Stdout>,
}

impl Predictions {
    /// The table's head is written at once. At most as many classes are told as there are.
    pub(super) fn new(form: Form, classes: Vec<String>, top: usize) -> Result<Self> {
        let top = top.min(classes.len());
        let mut table = csv::Writer::from_writer(io::stdout());
        if form == Form::Csv {
            let mut head = ["image", "exit", "confidence"].map(str::to_owned).to_vec();
            for place in 1..=top {
                head.extend([format!("class{place}"), format!("probability{place}")]);
            }
            table.write_record(&head)?;
        }
        Ok(Self { form, classes, top, counts: [0; 4], table })
    }

    /// Images that took each exit so far.
    pub(super) fn counts(&self) -> [u64; 4] {
        self.counts
    }

    /// Tells a batch: the names of its images, and the answers of the network.
    pub(super) fn tell(&mut self, names: &[String], answers: &Answers) -> Result<()> {
        let likely = likely(&answers.logits, self.top);
        for (row, (name, guesses)) in names.iter().zip(likely).enumerate() {
            let exit = answers.exits[row];
            self.counts[exit] += 1;
            let top = guesses.into_iter().map(|(index, probability)| Guess {
                class: &self.classes[index],
                index,
                probability,
            });
            let prediction = Prediction {
                image: name,
                exit: EXIT_NAMES[exit],
                confidence: answers.confidences[row],
                top: top.collect(),
            };
            match self.form {
                Form::Text => say(&prediction.line()),
                Form::Json => say(&serde_json::to_string(&prediction)?),
                Form::Csv => self.table.write_record(prediction.fields())?,
            }
        }
        if self.form == Form::Csv {
            self.table.flush()?;
        }
        Ok(())
    }
}

impl Prediction<'_> {
    fn line(&self) -> String {
        let guess =
            |guess: &Guess<'_>| format!("{} {:.1} %", guess.class, guess.probability * 100.0);
        let top = self.top.iter().map(guess).collect::<Vec<_>>().join(", ");
        format!("{}  [{}]  {top}", self.image, self.exit)
    }

    fn fields(&self) -> Vec<String> {
        let mut fields =
            vec![self.image.to_owned(), self.exit.to_owned(), self.confidence.to_string()];
        for guess in &self.top {
            fields.extend([guess.class.to_owned(), guess.probability.to_string()]);
        }
        fields
    }
}

/// The `count` most likely classes of each row of logits `[B, K]`, and their probabilities.
pub(in crate::tool) fn likely(logits: &Tensor, count: usize) -> Vec<Vec<(usize, f32)>> {
    let count_i64 = i64::try_from(count).expect("there are not so many classes");
    let (probabilities, classes) = logits.softmax(-1, Kind::Float).topk(count_i64, -1, true, true); // [B, count] each
    let flat = |tensor: Tensor| tensor.to_device(Device::Cpu).flatten(0, 1);
    let probabilities: Vec<f32> = Vec::try_from(flat(probabilities)).expect("it is f32");
    let classes: Vec<i64> = Vec::try_from(flat(classes)).expect("it is i64");
    let pairs: Vec<(usize, f32)> = classes
        .into_iter()
        .map(|class| usize::try_from(class).expect("classes count from 0"))
        .zip(probabilities)
        .collect();
    pairs.chunks(count).map(<[_]>::to_vec).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_likely_classes_come_first() {
        libtorch::init(1).unwrap();
        let logits = Tensor::from_slice(&[0.0_f32, 2.0, 1.0, 3.0, -1.0, 0.0]).view([2, 3]);
        let found = likely(&logits, 2);
        let classes: Vec<Vec<usize>> =
            found.iter().map(|row| row.iter().map(|guess| guess.0).collect()).collect();
        assert_eq!(classes, [[1, 2], [0, 2]]);
        assert!((found[0][0].1 - 0.665_24).abs() < 1e-4, "{found:?}");
    }

    #[test]
    fn a_prediction_is_a_line_or_a_row() {
        let top = vec![Guess { class: "hat, red", index: 1, probability: 0.75 }];
        let image = Prediction { image: "a.jpg", exit: "att", confidence: 0.75, top };
        assert_eq!(image.line(), "a.jpg  [att]  hat, red 75.0 %");
        assert_eq!(image.fields(), ["a.jpg", "att", "0.75", "hat, red", "0.75"]);
    }
}
