//! What the exits said of a set of samples, kept so that all figures can be taken from it.

use model::{Exits, LossConfig, Targets, confidences, dynamic::Confidences, multi_exit};
use tch::{Kind, Tensor};

/// Answers of the exits, samples in order.
#[derive(Debug)]
pub(super) struct Scores {
    classes: usize,
    loss_sum: f64,
    sure: Confidences,
    correct: [Vec<bool>; 4],
    top5_hits: [u64; 4],
    /// Hits of the exits by class.
    class_hits: Vec<[u64; 4]>,
    class_samples: Vec<u64>,
    /// Of the last exit: label by answer.
    confusion: Vec<Vec<u64>>,
}

impl Scores {
    /// Nothing yet, of `classes` that there are samples of and `answers` that the network can give.
    pub(super) fn new(classes: usize, answers: usize) -> Self {
        Self {
            classes,
            loss_sum: 0.0,
            sure: Confidences::default(),
            correct: Default::default(),
            top5_hits: [0; 4],
            class_hits: vec![[0; 4]; classes],
            class_samples: vec![0; classes],
            confusion: vec![vec![0; answers]; classes],
        }
    }

    /// Adds a batch: logits `[B, K]` of the exits and labels `[B]`.
    pub(super) fn add(&mut self, exits: &Exits, labels: &[i64], loss: &LossConfig) {
        let targets = Tensor::from_slice(labels);
        let losses = tch::no_grad(|| multi_exit(exits, Targets::Labels(&targets), loss));
        self.loss_sum += losses.total.double_value(&[]) * labels.len() as f64;
        let places: Vec<usize> = labels.iter().map(|&label| index(label)).collect();
        for &label in &places {
            self.class_samples[label] += 1;
        }
        for (exit, logits) in exits.in_order().into_iter().enumerate() {
            let answers = answers(logits);
            self.sure[exit].extend(confidences(logits));
            for (&label, &answer) in places.iter().zip(&answers) {
                let hit = label == answer;
                self.correct[exit].push(hit);
                self.class_hits[label][exit] += u64::from(hit);
                if exit == 3 {
                    self.confusion[label][answer] += 1;
                }
            }
            self.top5_hits[exit] += top5(logits, &targets);
        }
    }

    pub(super) fn samples(&self) -> usize {
        self.correct[0].len()
    }

    pub(super) fn loss(&self) -> f64 {
        self.loss_sum / self.samples() as f64
    }

    pub(super) fn top1(&self) -> [f64; 4] {
        let hits = |list: &Vec<bool>| list.iter().filter(|hit| **hit).count() as f64;
        self.correct.each_ref().map(|list| hits(list) / self.samples() as f64)
    }

    pub(super) fn top5(&self) -> [f64; 4] {
        self.top5_hits.map(|hits| hits as f64 / self.samples() as f64)
    }

    /// Samples of a class and the exits' top-1 on them.
    pub(super) fn of_class(&self, class: usize) -> (u64, [Option<f64>; 4]) {
        assert!(class < self.classes, "the class is one of the dataset's");
        let samples = self.class_samples[class];
        let share = |hits: u64| (samples > 0).then(|| hits as f64 / samples as f64);
        (samples, self.class_hits[class].map(share))
    }

    pub(super) fn confusion(&self) -> &[Vec<u64>] {
        &self.confusion
    }

    pub(super) fn confidences(&self) -> &Confidences {
        &self.sure
    }

    pub(super) fn correct(&self) -> &[Vec<bool>; 4] {
        &self.correct
    }
}

fn answers(logits: &Tensor) -> Vec<usize> {
    let classes = Vec::<i64>::try_from(logits.argmax(-1, false)).expect("it is i64 of one axis");
    classes.into_iter().map(index).collect()
}

/// Samples whose label is among the five largest logits, or among all if there are fewer.
fn top5(logits: &Tensor, labels: &Tensor) -> u64 {
    let count = logits.size()[1].min(5);
    let (_, largest) = logits.topk(count, 1, true, true); // [B, 5]
    let hits = largest.eq_tensor(&labels.unsqueeze(1)).sum(Kind::Int64).int64_value(&[]);
    u64::try_from(hits).expect("a count is not negative")
}

fn index(class: i64) -> usize {
    usize::try_from(class).expect("classes count from 0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hits_are_counted_by_exit_and_class() {
        libtorch::init(1).unwrap();
        let logits = |best: [i64; 3]| {
            let places = Tensor::from_slice(&best).unsqueeze(1);
            Tensor::zeros([3, 7], (Kind::Float, tch::Device::Cpu)).scatter_value(1, &places, 4.0)
        };
        let exits = Exits {
            early3: logits([1, 1, 1]),
            att: logits([0, 1, 1]),
            cnn: logits([0, 1, 2]),
            merge: logits([0, 2, 2]),
        };
        let mut scores = Scores::new(3, 7);
        scores.add(&exits, &[0, 1, 2], &LossConfig::default());
        let thirds = |hits: [u32; 4]| hits.map(|hits| f64::from(hits) / 3.0);
        assert_eq!(scores.top1(), thirds([1, 2, 3, 2]));
        assert_eq!(scores.of_class(1), (1, [Some(1.0), Some(1.0), Some(1.0), Some(0.0)]));
        assert_eq!(scores.confusion()[1][..3], [0, 0, 1]);
        assert!(scores.top5().iter().all(|top5| *top5 >= 1.0 / 3.0));
        assert!(scores.loss() > 0.0);
        assert_eq!(scores.samples(), 3);
    }
}
