//! The thread that computes: it gathers images into batches and runs the network on them.

use std::{
    sync::mpsc::{self, Receiver, RecvTimeoutError, Sender},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use model::{EXIT_NAMES, Network};
use shards::{Batch, Normalize};
use tokio::sync::oneshot;

use super::{desk::Place, figures::Figures};
use crate::tool::{eval::sets::tensor, infer::answers::likely};

/// An image that waits for its answer.
#[derive(Debug)]
pub(super) struct Waiting {
    /// `[side, side, 3]`, eight bits.
    pub(super) pixels: Vec<u8>,
    pub(super) thresholds: [f32; 4],
    /// Classes that are told.
    pub(super) top: usize,
    /// Since when it has been ready.
    pub(super) since: Instant,
    pub(super) answer: oneshot::Sender<Reply>,
    /// Kept until it is answered.
    pub(super) place: Place,
}

/// What the network says of an image.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) exit: usize,
    pub(super) confidence: f32,
    /// Classes and their probabilities, the most likely first.
    pub(super) likely: Vec<(usize, f32)>,
    /// Images that were answered together.
    pub(super) batch: usize,
    /// What the batch took.
    pub(super) network: Duration,
}

#[derive(Debug)]
enum Told {
    Image(Box<Waiting>),
    /// Nobody new will come: what is there is answered without waiting for more.
    End,
}

/// The way to the network.
#[derive(Debug, Clone)]
pub(super) struct Lane(Sender<Told>);

/// How batches are made.
#[derive(Debug)]
pub(super) struct Gathering {
    /// The most images of a batch.
    pub(super) batch: usize,
    /// How long its first image waits for others.
    pub(super) delay: Duration,
    pub(super) normalize: Normalize,
    pub(super) side: usize,
    pub(super) figures: Figures,
}

/// The thread of the network.
#[derive(Debug)]
pub(super) struct Thread {
    pub(super) handle: JoinHandle<()>,
    /// Closes when the thread ends, for whatever reason.
    pub(super) gone: oneshot::Receiver<()>,
}

impl Lane {
    /// Starts the thread. It ends when no lane is left.
    pub(super) fn open(gathering: Gathering, network: Network) -> Result<(Self, Thread)> {
        let (told, hears) = mpsc::channel();
        let (stays, gone) = oneshot::channel::<()>();
        let work = move || {
            let stays = stays; // Dropped at the end, also by a panic.
            gathering.work(&hears, &network);
            drop(stays);
        };
        let handle = thread::Builder::new().name("network".to_owned()).spawn(work);
        let handle = handle.context("the thread of the network cannot be started")?;
        Ok((Self(told), Thread { handle, gone }))
    }

    /// Sends an image. If the thread is gone, the image's answer is dropped.
    pub(super) fn send(&self, image: Waiting) {
        self.0.send(Told::Image(Box::new(image))).ok(); // Who asked sees that the answer is gone.
    }

    pub(super) fn end(&self) {
        self.0.send(Told::End).ok(); // A thread that is gone has ended.
    }
}

impl Gathering {
    fn work(&self, told: &Receiver<Told>, network: &Network) {
        let (mut ending, mut planes) = (false, Vec::new());
        while let Ok(first) = told.recv() {
            let first = match first {
                Told::Image(first) => first,
                Told::End => {
                    ending = true;
                    continue;
                }
            };
            let until = first.since + self.delay;
            let mut batch = vec![*first];
            while batch.len() < self.batch {
                let patience = until.saturating_duration_since(Instant::now());
                match told.recv_timeout(if ending { Duration::ZERO } else { patience }) {
                    Ok(Told::Image(image)) => batch.push(*image),
                    Ok(Told::End) => ending = true,
                    Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
                }
            }
            batch.retain(|waiting| !waiting.answer.is_closed());
            if !batch.is_empty() {
                self.answer(batch, network, &mut planes);
            }
        }
    }

    fn answer(&self, batch: Vec<Waiting>, network: &Network, planes: &mut Vec<f32>) {
        let began = Instant::now();
        let mut pixels = Batch { size: self.side, labels: vec![0; batch.len()], ..Batch::new() };
        batch.iter().for_each(|waiting| pixels.images.extend_from_slice(&waiting.pixels));
        self.normalize.nchw(&pixels, planes);
        let thresholds: Vec<[f32; 4]> = batch.iter().map(|waiting| waiting.thresholds).collect();
        let answers = network.forward_early_each(&tensor(planes, self.side), &thresholds);
        let top = batch.iter().map(|waiting| waiting.top).max().expect("a batch has images");
        let guesses = likely(&answers.logits, top);
        let (took, count) = (began.elapsed(), batch.len());
        self.figures.batch(count, took);
        for (row, (waiting, mut likely)) in batch.into_iter().zip(guesses).enumerate() {
            likely.truncate(waiting.top);
            let exit = answers.exits[row];
            self.figures.exit(EXIT_NAMES[exit]);
            let confidence = answers.confidences[row];
            let reply = Reply { exit, confidence, likely, batch: count, network: took };
            drop(waiting.place);
            waiting.answer.send(reply).ok(); // Who asked may have gone meanwhile.
        }
    }
}
