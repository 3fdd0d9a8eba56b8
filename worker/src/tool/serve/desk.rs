//! Where requests of both faces come in: who may wait, what the image shows as pixels, and the answer.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use model::{EXIT_NAMES, dynamic::NEVER};
use serde::Serialize;
use shards::{Transform, Viewer};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    task::spawn_blocking,
};

use super::{
    About,
    figures::Figures,
    network::{Lane, Reply, Waiting},
    refusal::Refusal,
};

/// Classes that are told where a request does not say.
const TOP: usize = 5;

/// How requests are answered.
#[derive(Debug)]
pub(super) struct Settings {
    pub(super) about: About,
    /// Their names.
    pub(super) classes: Vec<String>,
    /// The thresholds of each budget, if there are any.
    pub(super) budgets: Option<Vec<[f32; 4]>>,
    pub(super) transform: Transform,
    /// The most requests that are under way.
    pub(super) waiting: usize,
    /// The most images that are decoded at a time.
    pub(super) loaders: usize,
    /// Of an image.
    pub(super) pixels_max: usize,
    /// The longest that a request may take.
    pub(super) patience: Duration,
    pub(super) figures: Figures,
}

/// Takes images and answers what they show.
#[derive(Debug)]
pub(super) struct Desk {
    settings: Settings,
    places: Arc<Semaphore>,
    turns: Arc<Semaphore>,
    viewers: Mutex<Vec<Viewer>>,
    lane: Lane,
    is_ending: AtomicBool,
}

/// A place among the requests that are under way; the last clone gives it back.
#[derive(Debug, Clone)]
pub(super) struct Place(#[expect(dead_code, reason = "held")] Arc<OwnedSemaphorePermit>);

/// What a request wants, checked.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    budget: Option<u32>,
    thresholds: [f32; 4],
    top: usize,
}

/// What an image shows.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Answer {
    pub(super) exit: &'static str,
    /// The exit's largest probability.
    pub(super) confidence: f32,
    /// The most likely first.
    pub(super) top: Vec<Guess>,
    /// That counted; none: the last exit was taken.
    pub(super) budget: Option<u32>,
    /// Multiply–accumulates up to the exit.
    pub(super) macs: u64,
    /// Of those of the last exit.
    pub(super) macs_share: f64,
    /// Images that were answered together.
    pub(super) batch: usize,
    pub(super) seconds: Seconds,
}

/// A class that an image may show.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Guess {
    pub(super) class: String,
    pub(super) index: usize,
    pub(super) probability: f32,
}

/// Where the time of a request went.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Seconds {
    pub(super) decode: f64,
    /// For others, and for the network.
    pub(super) wait: f64,
    /// Of the whole batch.
    pub(super) network: f64,
}

impl Desk {
    pub(super) fn new(settings: Settings, lane: Lane) -> Self {
        let places = Arc::new(Semaphore::new(settings.waiting));
        let turns = Arc::new(Semaphore::new(settings.loaders));
        let (viewers, is_ending) = (Mutex::default(), AtomicBool::new(false));
        Self { settings, places, turns, viewers, lane, is_ending }
    }

    pub(super) fn about(&self) -> &About {
        &self.settings.about
    }

    pub(super) fn figures(&self) -> &Figures {
        &self.settings.figures
    }

    pub(super) fn patience(&self) -> Duration {
        self.settings.patience
    }

    /// The text of a scrape.
    pub(super) fn metrics(&self) -> String {
        let free = self.places.available_permits();
        self.figures().under_way(self.settings.waiting - free);
        self.figures().text()
    }

    pub(super) fn is_ending(&self) -> bool {
        self.is_ending.load(Ordering::Relaxed)
    }

    /// Takes no more; those who wait are answered without waiting for others.
    pub(super) fn end(&self) {
        self.is_ending.store(true, Ordering::Relaxed);
        self.lane.end();
    }

    /// A place for a request, if there is one.
    pub(super) fn place(&self) -> Result<Place, Refusal> {
        if self.is_ending() {
            return Err(Refusal::Ending);
        }
        let place = Arc::clone(&self.places).try_acquire_owned();
        let full = |_| Refusal::Full { most: self.settings.waiting };
        Ok(Place(Arc::new(place.map_err(full)?)))
    }

    /// Checks what a request wants. Numbers that are not there are the server's.
    pub(super) fn wanted(&self, budget: Option<u32>, top: Option<u32>) -> Result<Wanted, Refusal> {
        let Settings { about, budgets, classes, .. } = &self.settings;
        let top = match top {
            Some(0) => return Err(Refusal::Top("0".to_owned())),
            Some(top) => usize::try_from(top).unwrap_or(usize::MAX),
            None => TOP,
        };
        let budget = budget.or(about.default_budget);
        let thresholds = match (budget, budgets) {
            (None, _) => [NEVER; 4],
            (Some(_), None) => return Err(Refusal::NoBudgets),
            (Some(budget), Some(table)) => {
                let place = usize::try_from(budget).unwrap_or(usize::MAX);
                *table.get(place).ok_or_else(|| Refusal::Budget(budget.to_string()))?
            }
        };
        Ok(Wanted { budget, thresholds, top: top.min(classes.len()) })
    }

    /// Decodes an image and has the network answer it.
    pub(super) async fn ask(
        self: &Arc<Self>,
        place: Place,
        encoded: Vec<u8>,
        wanted: Wanted,
    ) -> Result<Answer, Refusal> {
        let most = self.about().image_bytes_max;
        if encoded.is_empty() {
            return Err(Refusal::Empty);
        }
        if encoded.len() > most {
            return Err(Refusal::TooLarge { most });
        }
        let came = Instant::now();
        let turn = Arc::clone(&self.turns).acquire_owned().await.expect("it is never closed");
        let desk = Arc::clone(self);
        // The place goes along: a client that goes away frees it only when its work is done.
        let decoding = spawn_blocking(move || (desk.shown(encoded, turn), place));
        let ((pixels, decode), place) = match decoding.await.expect("decoding does not panic") {
            (Ok(shown), place) => (shown, place),
            (Err(refusal), _) => return Err(refusal),
        };
        let (answer, answered) = oneshot::channel();
        let Wanted { thresholds, top, .. } = wanted;
        self.lane.send(Waiting { pixels, thresholds, top, since: Instant::now(), answer, place });
        let reply = answered.await.map_err(|_| Refusal::Failed)?;
        let wait = came.elapsed().saturating_sub(decode + reply.network);
        self.figures().phase("decode", decode);
        self.figures().phase("wait", wait);
        Ok(self.answer(reply, wanted.budget, decode, wait))
    }

    /// The pixels that the network sees, and how long it took to get them.
    fn shown(
        &self,
        encoded: Vec<u8>,
        turn: OwnedSemaphorePermit,
    ) -> Result<(Vec<u8>, Duration), Refusal> {
        let began = Instant::now();
        let Settings { transform, pixels_max, .. } = &self.settings;
        let viewers = || self.viewers.lock().unwrap_or_else(PoisonError::into_inner);
        let free = viewers().pop();
        let mut viewer = free.unwrap_or_else(|| Viewer::new(*pixels_max));
        let mut pixels = vec![0; transform.size() * transform.size() * 3];
        let shown = viewer.show(encoded, transform, &mut pixels);
        viewers().push(viewer);
        drop(turn);
        shown.map_err(Refusal::Image)?;
        Ok((pixels, began.elapsed()))
    }

    fn answer(
        &self,
        reply: Reply,
        budget: Option<u32>,
        decode: Duration,
        wait: Duration,
    ) -> Answer {
        let exit = &self.about().exits[reply.exit];
        let guess = |(index, probability): (usize, f32)| Guess {
            class: self.settings.classes[index].clone(),
            index,
            probability,
        };
        let [decode, wait, network] =
            [decode, wait, reply.network].map(|duration| duration.as_secs_f64());
        Answer {
            exit: EXIT_NAMES[reply.exit],
            confidence: reply.confidence,
            top: reply.likely.into_iter().map(guess).collect(),
            budget,
            macs: exit.macs,
            macs_share: exit.share,
            batch: reply.batch,
            seconds: Seconds { decode, wait, network },
        }
    }
}
