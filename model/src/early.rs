//! Early exit for real (arXiv:2306.11248, §3.4): the network runs stage by stage, samples that are sure enough
//! leave, and no later stage sees them. A stage that nobody needs does not run.
//!
//! Axes: B batch, K classes.

use tch::{Device, Kind, Tensor};

use crate::layers::Mode;
use crate::net::{Network, average, samples};
use crate::params::to_i64;

/// What dynamic inference answers.
#[derive(Debug)]
pub struct Answers {
    /// Logits `[B, K]`, each row of the exit that its sample took.
    pub logits: Tensor,
    /// The exit of each sample, in the order of [`EXIT_NAMES`](crate::EXIT_NAMES).
    pub exits: Vec<usize>,
    /// How sure that exit was: its largest softmax probability.
    pub confidences: Vec<f32>,
}

impl Network {
    /// Lets each image leave at the first exit whose confidence reaches its threshold; the last exit takes all
    /// who are left, whatever the fourth threshold says.
    ///
    /// `images` is `[B, 3, S, S]`, of the weights' kind and on their device. The logits are those of
    /// [`forward_eval`](Network::forward_eval): the same bits as long as nobody has left, afterwards but for
    /// the rounding of products of fewer rows. The classifier of the exit `cnn`, which no other reads, does
    /// not run if the threshold of all who come there is above 1.
    ///
    /// # Panics
    /// If kind, device or shape of the images do not fit.
    pub fn forward_early(&self, images: &Tensor, thresholds: [f32; 4]) -> Answers {
        let batch = usize::try_from(images.size()[0]).expect("sizes are not negative");
        self.forward_early_each(images, &vec![thresholds; batch])
    }

    /// [`forward_early`](Network::forward_early) with thresholds of its own for each image.
    ///
    /// # Panics
    /// As there; if there are not as many thresholds as images.
    pub fn forward_early_each(&self, images: &Tensor, thresholds: &[[f32; 4]]) -> Answers {
        tch::no_grad(|| self.staged(images, thresholds))
    }

    fn staged(&self, images: &Tensor, thresholds: &[[f32; 4]]) -> Answers {
        let (parts, mode) = (&self.parts, Mode::Eval);
        let mut reached = parts.to_early3(images, mode);
        let mut waiting = Waiting::all(&reached.logits, thresholds);
        match waiting.leave(0, &reached.logits) {
            Stay::All => {}
            Stay::Some(rows) => reached = reached.only(&rows),
            Stay::None => return waiting.answers,
        }
        reached = parts.to_att(reached, mode);
        match waiting.leave(1, &reached.logits) {
            Stay::All => {}
            Stay::Some(rows) => reached = reached.only(&rows),
            Stay::None => return waiting.answers,
        }
        let mut x = parts.features(&reached, mode); // [B, Cout, H/16, W/16]
        let mut pooled = average(&x); // [B, Cout]
        if waiting.anyone_may_leave(2) {
            match waiting.leave(2, &parts.cnn(&pooled)) {
                Stay::All => {}
                Stay::Some(rows) => {
                    x = samples(&x, &rows);
                    pooled = pooled.index_select(0, &rows);
                    reached = reached.only(&rows);
                }
                Stay::None => return waiting.answers,
            }
        }
        waiting.leave(3, &parts.merge(&reached, &x, pooled, mode));
        waiting.answers
    }
}

/// Who goes on after an exit.
enum Stay {
    All,
    /// Their rows `[B′]`, i64, among those who came.
    Some(Tensor),
    None,
}

/// The samples that are still on their way, and what the others have said.
struct Waiting<'t> {
    /// Their places in the batch.
    places: Vec<usize>,
    /// Of everyone, by place.
    thresholds: &'t [[f32; 4]],
    answers: Answers,
}

impl<'t> Waiting<'t> {
    /// Everyone. `first` `[B, K]` are logits of the first exit.
    fn all(first: &Tensor, thresholds: &'t [[f32; 4]]) -> Waiting<'t> {
        let batch = usize::try_from(first.size()[0]).expect("sizes are not negative");
        assert_eq!(thresholds.len(), batch, "each image has thresholds");
        let (exits, confidences) = (vec![3; batch], vec![0.0; batch]);
        let answers = Answers { logits: first.empty_like(), exits, confidences };
        Waiting { places: (0..batch).collect(), thresholds, answers }
    }

    /// Whether an exit's threshold is one that a probability can reach, for anyone who waits.
    fn anyone_may_leave(&self, exit: usize) -> bool {
        self.places.iter().any(|&place| self.thresholds[place][exit] <= 1.0)
    }

    /// Takes the answers of those who are sure enough. `logits` `[B′, K]` are of those who came.
    ///
    /// A confidence that is not a number is below no threshold but the last exit's.
    fn leave(&mut self, exit: usize, logits: &Tensor) -> Stay {
        let sure = confidences(logits);
        let leaves =
            |row: &usize| exit == 3 || sure[*row] >= self.thresholds[self.places[*row]][exit];
        let (leaving, staying): (Vec<usize>, Vec<usize>) = (0..sure.len()).partition(leaves);
        if leaving.is_empty() {
            return Stay::All;
        }
        let places: Vec<usize> = leaving.iter().map(|&row| self.places[row]).collect();
        for (&place, &row) in places.iter().zip(&leaving) {
            self.answers.exits[place] = exit;
            self.answers.confidences[place] = sure[row];
        }
        let device = logits.device();
        let said = logits.index_select(0, &index(&leaving, device)); // [leaving, K]
        drop(self.answers.logits.index_copy_(0, &index(&places, device), &said));
        if staying.is_empty() {
            return Stay::None;
        }
        self.places = staying.iter().map(|&row| self.places[row]).collect();
        Stay::Some(index(&staying, device))
    }
}

/// The largest softmax probability of each row of logits `[B, K]`, in f32: how sure an exit is.
///
/// # Panics
/// If the logits have not two axes.
pub fn confidences(logits: &Tensor) -> Vec<f32> {
    let surest = logits.softmax(-1, Kind::Float).amax([-1_i64].as_slice(), false); // [B]
    Vec::try_from(surest.to_device(Device::Cpu)).expect("it is f32 and has one axis")
}

fn index(rows: &[usize], device: Device) -> Tensor {
    let rows: Vec<i64> = rows.iter().map(|&row| to_i64(row)).collect();
    Tensor::from_slice(&rows).to_device(device)
}
