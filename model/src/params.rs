//! Names, shapes and the two flat tensors behind them.
//!
//! All learned values of a network lie in one flat tensor and all running statistics in another, each in one
//! fixed order. So a digest, a checkpoint, the sum over ranks and the optimizer each see a few memory ranges.
//!
//! The **flat order** of parameters: first those with weight decay, in state-dict order, then the others, in
//! state-dict order: the order of the reference's optimizer. Buffers: running means and variances in
//! state-dict order. The integer counters `num_batches_tracked` are in no flat tensor: each equals the number
//! of training forwards.

use std::cell::RefCell;
use std::ops::{Div, Range};
use std::sync::Arc;

use tch::{Device, Kind, Tensor};

use crate::config::Architecture;
use crate::init::{self, Init};
use crate::net::Network;

/// What an entry of the state dict is, and so where its values lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A parameter with weight decay.
    Decayed,
    /// A parameter without: everything with one dimension, and biases.
    Undecayed,
    /// A running mean or variance.
    Buffer,
    /// `num_batches_tracked`, an i64 scalar that is in no flat tensor.
    Counter,
}

/// One entry of the state dict.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// The reference's name.
    pub name: String,
    /// The reference's shape; empty for counters.
    pub shape: Vec<i64>,
    /// What it is.
    pub role: Role,
    /// Where its elements lie in the flat parameters or flat buffers; empty for counters.
    pub range: Range<usize>,
    pub(crate) init: Init,
}

/// All entries of a network's state dict, in the reference's order.
#[derive(Debug, Clone, PartialEq)]
pub struct Layout {
    entries: Vec<Entry>,
    decay_len: usize,
    param_len: usize,
    buffer_len: usize,
}

impl Layout {
    /// The layout of a network.
    pub fn of(architecture: &Architecture) -> Layout {
        let registry = RefCell::new(Registry::default());
        drop(Network::assemble(architecture, &Scope::root(&registry)));
        Layout::place(registry.into_inner().declared)
    }

    /// The layout of any named tensors, in the given order: what each is follows from its name and shape.
    pub fn of_state<'n>(state: impl IntoIterator<Item = (&'n str, &'n [i64])>) -> Layout {
        let entry = |(name, shape): (&str, &[i64])| Entry {
            name: name.to_owned(),
            shape: shape.to_vec(),
            role: role_of(name, shape),
            range: 0..0,
            init: Init::Zeros,
        };
        Layout::place(state.into_iter().map(entry).collect())
    }

    /// Gives every entry its range.
    fn place(mut entries: Vec<Entry>) -> Layout {
        let mut place = |role: Role, mut end: usize| {
            for entry in entries.iter_mut().filter(|entry| entry.role == role) {
                let start = end;
                end += elements(&entry.shape);
                entry.range = start..end;
            }
            end
        };
        let decay_len = place(Role::Decayed, 0);
        let param_len = place(Role::Undecayed, decay_len);
        let buffer_len = place(Role::Buffer, 0);
        Layout { entries, decay_len, param_len, buffer_len }
    }

    /// All entries, in state-dict order.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The entry of a name.
    pub fn entry(&self, name: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.name == name)
    }

    /// The names of the counters, in state-dict order.
    pub fn counters(&self) -> impl Iterator<Item = &str> {
        let counters = self.entries.iter().filter(|entry| entry.role == Role::Counter);
        counters.map(|entry| entry.name.as_str())
    }

    /// Elements of the flat parameters that have weight decay; they come first.
    pub fn decay_len(&self) -> usize {
        self.decay_len
    }

    /// Elements of the flat parameters.
    pub fn param_len(&self) -> usize {
        self.param_len
    }

    /// Elements of the flat buffers.
    pub fn buffer_len(&self) -> usize {
        self.buffer_len
    }
}

/// The values of a network: flat parameters `[P]` and flat buffers `[S]` of one kind on one device.
#[derive(Debug)]
pub struct Weights {
    layout: Arc<Layout>,
    params: Tensor,
    buffers: Tensor,
}

impl Weights {
    /// Initial values, drawn from `seed`: the same bits on every machine and, up to rounding, in every kind.
    pub fn initial(layout: Arc<Layout>, seed: u64, kind: Kind, device: Device) -> Weights {
        let mut params = vec![0.0_f32; layout.param_len];
        let mut buffers = vec![0.0_f32; layout.buffer_len];
        for entry in &layout.entries {
            let values = match entry.role {
                Role::Decayed | Role::Undecayed => &mut params[entry.range.clone()],
                Role::Buffer => &mut buffers[entry.range.clone()],
                Role::Counter => continue,
            };
            init::fill(values, entry.init, seed, &entry.name);
        }
        let place = |values: &[f32]| Tensor::from_slice(values).to_kind(kind).to_device(device);
        Weights { params: place(&params), buffers: place(&buffers), layout }
    }

    /// Zeros, to be overwritten.
    pub fn zeros(layout: Arc<Layout>, kind: Kind, device: Device) -> Weights {
        let zeros = |len: usize| Tensor::zeros([to_i64(len)], (kind, device));
        Weights { params: zeros(layout.param_len), buffers: zeros(layout.buffer_len), layout }
    }

    /// An independent copy.
    pub fn duplicate(&self) -> Weights {
        Weights {
            layout: self.layout.clone(),
            params: self.params.copy(),
            buffers: self.buffers.copy(),
        }
    }

    /// The order and the shapes of what the flat tensors hold.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// Kind of the flat tensors.
    pub fn kind(&self) -> Kind {
        self.params.kind()
    }

    /// Device of the flat tensors.
    pub fn device(&self) -> Device {
        self.params.device()
    }

    /// The flat parameters, `[P]`.
    pub fn params(&self) -> &Tensor {
        &self.params
    }

    /// The flat parameters, to be changed in place. Networks built on these weights see the change.
    pub fn params_mut(&mut self) -> &mut Tensor {
        &mut self.params
    }

    /// The flat buffers, `[S]`.
    pub fn buffers(&self) -> &Tensor {
        &self.buffers
    }

    /// The flat buffers, to be changed in place. Networks built on these weights see the change.
    pub fn buffers_mut(&mut self) -> &mut Tensor {
        &mut self.buffers
    }

    /// A copy of one entry's values, in its shape. `None` for a counter or an unknown name.
    pub fn value(&self, name: &str) -> Option<Tensor> {
        let entry = self.layout.entry(name)?;
        self.view(entry).map(|view| view.copy())
    }

    /// Overwrites one entry's values, converting the kind and the device if need be.
    ///
    /// # Errors
    /// [`ValueError`] if no such entry has values, or the shape is another.
    pub fn set_value(&mut self, name: &str, value: &Tensor) -> Result<(), ValueError> {
        let entry = self.layout.entry(name).ok_or_else(|| ValueError::Unknown(name.to_owned()))?;
        let mut view = self.view(entry).ok_or_else(|| ValueError::Unknown(name.to_owned()))?;
        if value.size() != entry.shape {
            let (name, wanted) = (name.to_owned(), entry.shape.clone());
            return Err(ValueError::Shape { name, wanted, found: value.size() });
        }
        tch::no_grad(|| view.copy_(value));
        Ok(())
    }

    /// A view of an entry's values.
    fn view(&self, entry: &Entry) -> Option<Tensor> {
        let flat = match entry.role {
            Role::Decayed | Role::Undecayed => &self.params,
            Role::Buffer => &self.buffers,
            Role::Counter => return None,
        };
        Some(part(flat, &entry.range, &entry.shape))
    }
}

/// A value that does not fit its name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ValueError {
    /// The network has no values of this name.
    #[error("the network has no parameter or running statistic named {0}")]
    Unknown(String),
    /// The value has another shape.
    #[error("{name} has shape {wanted:?}, and {found:?} was given")]
    Shape { name: String, wanted: Vec<i64>, found: Vec<i64> },
}

/// A view of `shape` over a range of a flat tensor.
fn part(flat: &Tensor, range: &Range<usize>, shape: &[i64]) -> Tensor {
    flat.narrow(0, to_i64(range.start), to_i64(range.len())).view(shape)
}

fn elements(shape: &[i64]) -> usize {
    let count: i64 = shape.iter().product();
    usize::try_from(count).expect("dimensions are positive")
}

pub(crate) fn to_i64(len: usize) -> i64 {
    i64::try_from(len).expect("no memory holds more elements")
}

/// What building a network fills: once the list of entries, once the list of leaves.
///
/// The same constructors run twice. The first run declares, and hands out undefined tensors; the second
/// hands out views of the weights. So the order of the state dict is written once.
#[derive(Debug, Default)]
pub(crate) struct Registry<'w> {
    declared: Vec<Entry>,
    weights: Option<Handing<'w>>,
}

/// The second run: weights to hand out and where in their layout it has come to.
#[derive(Debug)]
struct Handing<'w> {
    weights: &'w Weights,
    next: usize,
    leaves: Vec<(usize, Tensor)>,
}

impl<'w> Registry<'w> {
    /// A registry that hands out views of `weights`.
    pub(crate) fn over(weights: &'w Weights) -> Registry<'w> {
        let handing = Handing { weights, next: 0, leaves: Vec::new() };
        Registry { declared: Vec::new(), weights: Some(handing) }
    }

    /// The leaves handed out, in flat order.
    ///
    /// # Panics
    /// If the network took other entries than its layout has.
    pub(crate) fn into_leaves(self) -> Vec<Tensor> {
        let handing = self.weights.expect("only a registry over weights has leaves");
        let layout = &handing.weights.layout;
        assert_eq!(handing.next, layout.entries.len(), "the layout is of another network");
        let mut leaves = handing.leaves;
        leaves.sort_by_key(|(start, _)| *start);
        leaves.into_iter().map(|(_, leaf)| leaf).collect()
    }

    fn take(&mut self, name: String, shape: &[i64], init: Init) -> Taken<'w> {
        let Some(handing) = &mut self.weights else {
            let role = role_of(&name, shape);
            self.declared.push(Entry { name, shape: shape.to_vec(), role, range: 0..0, init });
            return None;
        };
        let entry = handing.weights.layout.entries.get(handing.next);
        let entry = entry.filter(|entry| entry.name == name && entry.shape == shape);
        let entry = entry.unwrap_or_else(|| panic!("the layout is of another network: {name}"));
        handing.next += 1;
        Some((handing.weights, entry.range.clone()))
    }

    /// Hands out a parameter as a leaf of autograd.
    fn leaf(&mut self, taken: Taken<'w>, shape: &[i64]) -> Tensor {
        let (Some((weights, range)), Some(handing)) = (taken, &mut self.weights) else {
            return Tensor::new();
        };
        let leaf = part(&weights.params, &range, shape).detach().set_requires_grad(true);
        handing.leaves.push((range.start, leaf.shallow_clone()));
        leaf
    }
}

/// Where an entry that was taken in the second run lies; nothing in the first.
type Taken<'w> = Option<(&'w Weights, Range<usize>)>;

/// A prefix of names, as `scope / "fc1"`, from which layers take their tensors.
#[derive(Debug, Clone)]
pub(crate) struct Scope<'r, 'w> {
    registry: &'r RefCell<Registry<'w>>,
    prefix: String,
}

impl<'r, 'w> Scope<'r, 'w> {
    pub(crate) fn root(registry: &'r RefCell<Registry<'w>>) -> Scope<'r, 'w> {
        Scope { registry, prefix: String::new() }
    }

    /// The full name of `name` here.
    pub(crate) fn name(&self, name: &str) -> String {
        if self.prefix.is_empty() { name.to_owned() } else { format!("{}.{name}", self.prefix) }
    }

    /// A learned tensor. It is decayed unless it has one dimension or is a bias.
    pub(crate) fn param(&self, name: &str, shape: &[i64], init: Init) -> Tensor {
        self.reshaped(name, shape, shape, init)
    }

    /// A learned tensor that the state dict holds as `stored` and the network uses as `shape`.
    pub(crate) fn reshaped(&self, name: &str, stored: &[i64], shape: &[i64], init: Init) -> Tensor {
        let mut registry = self.registry.borrow_mut();
        let taken = registry.take(self.name(name), stored, init);
        registry.leaf(taken, shape)
    }

    /// Several matrices with the same number of columns that are neighbours in the state dict, as one leaf
    /// with all their rows: one product then does the work of several.
    pub(crate) fn stacked(&self, names: &[&str], rows: i64, columns: i64, init: Init) -> Tensor {
        let mut registry = self.registry.borrow_mut();
        let mut whole: Taken<'w> = None;
        for name in names {
            let name = self.name(&format!("{name}.weight"));
            let taken = registry.take(name, &[rows, columns], init);
            whole = match (whole, taken) {
                (Some((weights, first)), Some((_, next))) => {
                    assert_eq!(first.end, next.start, "stacked matrices are neighbours");
                    Some((weights, first.start..next.end))
                }
                (_, taken) => taken,
            };
        }
        registry.leaf(whole, &[rows * to_i64(names.len()), columns])
    }

    /// A running statistic.
    pub(crate) fn buffer(&self, name: &str, shape: &[i64], init: Init) -> Tensor {
        let mut registry = self.registry.borrow_mut();
        match registry.take(self.name(name), shape, init) {
            Some((weights, range)) => part(&weights.buffers, &range, shape),
            None => Tensor::new(),
        }
    }

    /// A counter of training forwards, which has no tensor.
    pub(crate) fn counter(&self, name: &str) {
        let mut registry = self.registry.borrow_mut();
        registry.take(self.name(name), &[], Init::Zeros);
    }
}

impl<'r, 'w> Div<&str> for &Scope<'r, 'w> {
    type Output = Scope<'r, 'w>;

    fn div(self, name: &str) -> Scope<'r, 'w> {
        Scope { registry: self.registry, prefix: self.name(name) }
    }
}

/// What an entry of the state dict is. The reference's rule for decay: none for a tensor with one dimension or a
/// name that ends with `.bias`. So `latent` and every `relative_position_bias` are decayed.
fn role_of(name: &str, shape: &[i64]) -> Role {
    if name.ends_with("num_batches_tracked") {
        Role::Counter
    } else if name.ends_with(".running_mean") || name.ends_with(".running_var") {
        Role::Buffer
    } else if shape.len() == 1 || name.ends_with(".bias") {
        Role::Undecayed
    } else {
        Role::Decayed
    }
}
