//! The state of training: flat tensors in one order, seen as byte sections.
//!
//! Sections, in the order in which they are digested, sent to peers and cut into checkpoint parts:
//!
//! ```text
//!   params  exp_avg  exp_avg_sq   [P] f32   the network's parameters and AdamW's two moments
//!   ema_params                    [P] f32   their moving average
//!   ema_buffers  buffers          [S] f32   BatchNorm's running statistics: averaged, live
//!   counters                      [2] u64   updates applied; the average's `num_batches_tracked`
//! ```
//!
//! All numbers are little-endian. The live `num_batches_tracked` is the number of a virtual rank's forwards:
//! of updates, times the micro-batches of each.

use std::sync::{Arc, OnceLock};

use checkpoint::{LayoutError, Section};
use cluster::Step;
use model::{
    AdamW, AdamWConfig, Architecture, Ema, Layout, Network, Weights, ema::average_counter,
};
use sha2::{Digest as _, Sha256};
use tch::{Device, Kind, Tensor};

use crate::weights::Which;

const _: () = assert!(cfg!(target_endian = "little"), "sections are the memory of the tensors");

/// The names of the sections, in order.
pub const SECTIONS: [&str; 7] =
    ["params", "exp_avg", "exp_avg_sq", "ema_params", "ema_buffers", "buffers", "counters"];

/// Sections that are flat tensors: all but the last.
const FLAT: usize = SECTIONS.len() - 1;

/// Everything that a step changes, with the networks that are views of it.
#[derive(Debug)]
pub struct TrainState {
    live: Weights,
    optimizer: AdamW,
    ema: Ema,
    /// Updates applied, and the average's count of batches.
    counters: [u64; 2],
    /// Forwards of a virtual rank an update.
    update_freq: u32,
    /// Whether the sections are the state after `counters[0]` updates, and not torn or empty.
    intact: bool,
    network: Network,
    averaged: Network,
    /// What the tensors hold, in the memory of the host: there only if they are on a device, and made when
    /// it is asked for after they changed.
    mirror: OnceLock<Vec<Tensor>>,
}

impl TrainState {
    /// Memory for a state, and no state yet. Each virtual rank makes `update_freq` forwards an update.
    #[must_use]
    pub fn empty(
        architecture: &Architecture,
        optimizer: AdamWConfig,
        update_freq: u32,
        device: Device,
    ) -> Self {
        let layout = Arc::new(Layout::of(architecture));
        let live = Weights::zeros(Arc::clone(&layout), Kind::Float, device);
        let ema = Ema::new(&live);
        let network = Network::new(architecture, &live);
        let averaged = Network::new(architecture, ema.weights());
        let optimizer = AdamW::new(optimizer, &layout, live.params());
        let (counters, intact, mirror) = ([0; 2], false, OnceLock::new());
        Self { live, optimizer, ema, counters, update_freq, intact, network, averaged, mirror }
    }

    /// The initial state of a run.
    pub fn initialize(&mut self, seed: u64) {
        self.tear();
        let layout = Arc::clone(self.live.layout());
        let fresh = Weights::initial(layout, seed, self.live.kind(), self.live.device());
        overwrite(self.live.params_mut(), fresh.params());
        overwrite(self.live.buffers_mut(), fresh.buffers());
        overwrite(self.ema.weights_mut().params_mut(), fresh.params());
        overwrite(self.ema.weights_mut().buffers_mut(), fresh.buffers());
        for moment in self.optimizer.moments_mut() {
            tch::no_grad(|| drop(moment.fill_(0.0)));
        }
        self.counters = [0; 2];
        self.mirror = OnceLock::new();
        self.intact = true;
    }

    /// Where the tensors are.
    #[must_use]
    pub fn device(&self) -> Device {
        self.live.device()
    }

    /// Updates applied; none if there is no usable state.
    #[must_use]
    pub fn step(&self) -> Option<Step> {
        self.intact.then_some(Step(self.counters[0]))
    }

    /// `num_batches_tracked` of the weights and of their average.
    #[must_use]
    pub fn batches(&self) -> [u64; 2] {
        let [updates, averaged] = self.counters;
        [updates * u64::from(self.update_freq), averaged]
    }

    /// The network of the weights.
    #[must_use]
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// The network of the averaged weights.
    #[must_use]
    pub fn averaged(&self) -> &Network {
        &self.averaged
    }

    /// A network that answers as [`network`](Self::network) or [`averaged`](Self::averaged) does now, faster: see
    /// [`Network::for_inference`]. It has its own copy of the weights.
    #[must_use]
    pub fn for_inference(&self, architecture: &Architecture, which: Which) -> Network {
        let weights = match which {
            Which::Live => &self.live,
            Which::Averaged => self.ema.weights(),
        };
        Network::for_inference(architecture, &weights.duplicate())
    }

    /// The parameters' and running statistics' order.
    #[must_use]
    pub fn layout(&self) -> &Arc<Layout> {
        self.live.layout()
    }

    /// The running statistics, `[S]`; a training forward moves them.
    #[must_use]
    pub fn buffers(&self) -> &[f32] {
        libtorch::slice(self.live.buffers()).expect("the flat tensors are f32 on the host")
    }

    /// The running statistics, to be put back after a forward.
    pub fn buffers_mut(&mut self) -> &mut [f32] {
        libtorch::slice_mut(self.live.buffers_mut()).expect("the flat tensors are f32 on the host")
    }

    /// The running statistics as a tensor on the state's device, `[S]`.
    pub fn buffers_tensor(&mut self) -> &mut Tensor {
        self.live.buffers_mut()
    }

    /// The running statistics as a tensor, and the network whose layers move them.
    pub(crate) fn moving(&mut self) -> (&mut Tensor, &Network) {
        (self.live.buffers_mut(), &self.network)
    }

    /// Applies one update: AdamW on the parameters, the new running statistics `[S]`, then the average.
    pub fn apply(
        &mut self,
        gradients: &Tensor,
        buffers: &Tensor,
        update: &model::Update,
        decay: f64,
    ) {
        assert_eq!(self.step(), Some(Step(update.step)), "an update follows the one before");
        self.intact = false;
        self.optimizer.step(self.live.params_mut(), gradients, update);
        overwrite(self.live.buffers_mut(), buffers);
        self.ema.update(&self.live, decay);
        self.counters[0] = update.step + 1;
        let [batches, averaged] = self.batches().map(u64::cast_signed);
        self.counters[1] = average_counter(averaged, batches, decay).cast_unsigned();
        self.mirror = OnceLock::new();
        self.intact = true;
    }

    /// Declares the state unusable, before its sections are overwritten.
    pub fn tear(&mut self) {
        self.intact = false;
    }

    /// Declares the overwritten sections a state.
    pub fn mend(&mut self) {
        if let Some(mirror) = self.mirror.get() {
            let mirror: Vec<Tensor> = mirror.iter().map(Tensor::shallow_clone).collect();
            for (mut tensor, values) in self.tensors_mut().into_iter().zip(&mirror) {
                overwrite(&mut tensor, values);
            }
        }
        self.intact = true;
    }

    /// The flat tensors, in the order of the sections.
    fn tensors(&self) -> [&Tensor; FLAT] {
        let [first, second] = self.optimizer.moments();
        let averaged = self.ema.weights();
        let live = &self.live;
        [live.params(), first, second, averaged.params(), averaged.buffers(), live.buffers()]
    }

    /// As [`Self::tensors`]. Handles of the same storage.
    fn tensors_mut(&mut self) -> [Tensor; FLAT] {
        self.tensors().map(Tensor::shallow_clone)
    }

    /// The flat tensors in the memory of the host.
    fn on_host(&self) -> [&Tensor; FLAT] {
        let tensors = self.tensors();
        if self.device() == Device::Cpu {
            return tensors;
        }
        let copies = || tensors.map(|tensor| tensor.to_device(Device::Cpu)).into();
        let mirror: &Vec<Tensor> = self.mirror.get_or_init(copies);
        std::array::from_fn(|index| &mirror[index])
    }

    /// All sections, in order.
    #[must_use]
    pub fn sections(&self) -> [&[u8]; SECTIONS.len()] {
        let [params, first, second, ema_params, ema_buffers, buffers] = self.on_host().map(bytes);
        let counters = bytemuck::cast_slice(&self.counters);
        [params, first, second, ema_params, ema_buffers, buffers, counters]
    }

    /// One section, to be overwritten. Call [`TrainState::tear`] before and [`TrainState::mend`] after.
    ///
    /// # Panics
    /// If there is no such section.
    pub fn section_mut(&mut self, index: usize) -> &mut [u8] {
        if index == FLAT {
            return bytemuck::cast_slice_mut(&mut self.counters);
        }
        if self.device() != Device::Cpu {
            self.on_host();
            let mirror = self.mirror.get_mut().expect("it was just filled");
            return bytes_mut(&mut mirror[index]);
        }
        let [first, second] = self.optimizer.moments_mut();
        let tensor = match SECTIONS[index] {
            "params" => self.live.params_mut(),
            "exp_avg" => first,
            "exp_avg_sq" => second,
            "ema_params" => self.ema.weights_mut().params_mut(),
            "ema_buffers" => self.ema.weights_mut().buffers_mut(),
            _ => self.live.buffers_mut(),
        };
        bytes_mut(tensor)
    }

    /// BLAKE3 of all sections: what the members of a generation compare.
    #[must_use]
    pub fn digest(&self) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        for section in self.sections() {
            hasher.update(section);
        }
        hasher.finalize()
    }

    /// SHA-256 of all sections, hexadecimal: what a run promises.
    #[must_use]
    pub fn sha256(&self) -> String {
        let mut hasher = Sha256::new();
        for section in self.sections() {
            hasher.update(section);
        }
        hex::encode(hasher.finalize())
    }

    /// How a checkpoint of this state is cut into parts.
    ///
    /// # Errors
    /// [`LayoutError`] if `part_bytes` is too small for so large a state.
    pub fn checkpoint_layout(&self, part_bytes: u64) -> Result<checkpoint::Layout, LayoutError> {
        let sections = SECTIONS.iter().zip(self.sections()).map(|(name, section)| Section {
            name: (*name).to_owned(),
            bytes: section.len() as u64,
        });
        checkpoint::Layout::new(sections.collect(), part_bytes)
    }
}

/// The place of a section by its name.
pub(crate) fn section_index(name: &str) -> Option<usize> {
    SECTIONS.iter().position(|known| *known == name)
}

fn overwrite(target: &mut Tensor, source: &Tensor) {
    tch::no_grad(|| target.copy_(source));
}

fn bytes(tensor: &Tensor) -> &[u8] {
    let floats = libtorch::slice::<f32>(tensor).expect("the flat tensors are f32 on the host");
    bytemuck::cast_slice(floats)
}

fn bytes_mut(tensor: &mut Tensor) -> &mut [u8] {
    let floats = libtorch::slice_mut::<f32>(tensor).expect("the flat tensors are f32 on the host");
    bytemuck::cast_slice_mut(floats)
}
