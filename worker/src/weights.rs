//! A state as the reference's named tensors, and back.
//!
//! The official checkpoint (SPEC of the reference, section 13) is a dictionary: `model` and `model_ema`
//! hold named tensors, `optimizer` the two moments by the parameter's number, decayed parameters first:
//! the order in which they lie here too.

use checkpoint::pth::{Array, Value};
use model::{Layout, Role};
use recipe::Recipe;

use crate::train::TrainState;

/// One of the two sets of weights in a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// Those that are trained.
    Live,
    /// Their moving average.
    Averaged,
}

/// Where each lies among [`crate::train::SECTIONS`].
impl Which {
    fn sections(self) -> [usize; 2] {
        match self {
            Self::Live => [0, 5],
            Self::Averaged => [3, 4],
        }
    }

    fn counter(self) -> usize {
        match self {
            Self::Live => 0,
            Self::Averaged => 1,
        }
    }
}

const COUNTERS: usize = 6;
const MOMENTS: [(usize, &str); 2] = [(1, "exp_avg"), (2, "exp_avg_sq")];

/// Tensors that are no weights of this network: every name that does not fit, and how.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", problems.join("; "))]
pub struct Misfit {
    /// One sentence a tensor.
    pub problems: Vec<String>,
}

/// The named tensors of a set of weights, in the reference's order.
///
/// # Panics
/// If the state is not usable.
#[must_use]
pub fn named(state: &TrainState, which: Which) -> Vec<(String, Array)> {
    assert!(state.step().is_some(), "only a usable state is written");
    let sections = state.sections();
    let floats = |section: usize| bytemuck::cast_slice::<u8, f32>(sections[section]);
    let [params, buffers] = which.sections().map(floats);
    let entry = |entry: &model::Entry| {
        let values = match entry.role {
            Role::Decayed | Role::Undecayed => &params[entry.range.clone()],
            Role::Buffer => &buffers[entry.range.clone()],
            Role::Counter => {
                let batches = state.batches()[which.counter()].cast_signed();
                return (entry.name.clone(), Array::i64_scalar(batches));
            }
        };
        (entry.name.clone(), Array::f32(&shape(entry), values))
    };
    state.layout().entries().iter().map(entry).collect()
}

/// The moments and constants of the optimizer, as PyTorch's AdamW keeps them.
///
/// # Panics
/// If the state is not usable.
#[must_use]
pub fn optimizer(state: &TrainState, recipe: &Recipe) -> Value {
    let step = state.step().expect("only a usable state is written").0;
    let step = Value::Int(step.cast_signed());
    let sections = state.sections();
    let parameters = in_group_order(state.layout());
    let decayed = parameters.iter().filter(|entry| entry.role == Role::Decayed).count();
    let moments = |(number, entry): (usize, &&model::Entry)| {
        let mut items = vec![(text("step"), step.clone())];
        for (section, name) in MOMENTS {
            let floats = bytemuck::cast_slice::<u8, f32>(sections[section]);
            let array = Array::f32(&shape(entry), &floats[entry.range.clone()]);
            items.push((text(name), Value::Array(array)));
        }
        (int(number), Value::Dict(items))
    };
    let moments = parameters.iter().enumerate().map(moments).collect();
    let groups = vec![
        group(recipe, recipe.optimizer.weight_decay, 0..decayed),
        group(recipe, 0.0, decayed..parameters.len()),
    ];
    Value::Dict(vec![
        (text("state"), Value::Dict(moments)),
        (text("param_groups"), Value::List(groups)),
    ])
}

/// One parameter group. The reference writes `lr` anew at each step, from its schedule and `lr_scale`.
fn group(recipe: &Recipe, weight_decay: f64, numbers: std::ops::Range<usize>) -> Value {
    let betas = recipe.optimizer.betas.map(Value::Float).to_vec();
    Value::Dict(vec![
        (text("weight_decay"), Value::Float(weight_decay)),
        (text("params"), Value::List(numbers.map(int).collect())),
        (text("lr_scale"), Value::Float(1.0)),
        (text("lr"), Value::Float(recipe.schedule.lr)),
        (text("betas"), Value::List(betas)),
        (text("eps"), Value::Float(recipe.optimizer.eps)),
        (text("amsgrad"), Value::Bool(false)),
    ])
}

/// Overwrites a set of weights; returns the count of batches, if the tensors say it. The state is torn
/// until [`TrainState::mend`].
///
/// A prefix `module.` of all names is taken off. `num_batches_tracked` may be missing.
///
/// # Errors
/// [`Misfit`] names every tensor that is missing, unexpected, of another shape or not of floats.
pub fn fill(
    state: &mut TrainState,
    which: Which,
    arrays: &[(&str, &Array)],
) -> Result<Option<u64>, Misfit> {
    state.tear();
    let wrapped = arrays.iter().all(|(name, _)| name.starts_with("module."));
    let strip =
        |name: &str| if wrapped { name["module.".len()..].to_owned() } else { name.to_owned() };
    let mut arrays: std::collections::BTreeMap<String, &Array> =
        arrays.iter().map(|(name, array)| (strip(name), *array)).collect();
    let mut problems = Vec::new();
    let mut batches = None;
    let layout = std::sync::Arc::clone(state.layout());
    for entry in layout.entries() {
        let Some(array) = arrays.remove(&entry.name) else {
            if entry.role != Role::Counter {
                problems.push(format!("{} is missing", entry.name));
            }
            continue;
        };
        if array.shape != shape(entry) {
            let (found, wanted) = (&array.shape, shape(entry));
            problems.push(format!("{} has the shape {found:?}, expected {wanted:?}", entry.name));
        } else if entry.role == Role::Counter {
            batches = array.to_i64().and_then(|batches| u64::try_from(batches).ok()).or(batches);
        } else if let Some(values) = array.to_f32() {
            let [params, buffers] = which.sections();
            let section = if entry.role == Role::Buffer { buffers } else { params };
            let floats = bytemuck::cast_slice_mut::<u8, f32>(state.section_mut(section));
            floats[entry.range.clone()].copy_from_slice(&values);
        } else {
            problems.push(format!("{} holds {:?} and no floats", entry.name, array.dtype));
        }
    }
    problems.extend(arrays.keys().map(|name| format!("{name} is not of this network")));
    if problems.is_empty() { Ok(batches) } else { Err(Misfit { problems }) }
}

/// What became of the tensors of a file of which not all need fit.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Taken {
    /// How many were taken.
    pub taken: usize,
    /// Tensors of the network that the file lacks, or has for other classes: they stay as they were.
    pub fresh: Vec<String>,
    /// Tensors of the file that the network has no place for.
    pub left: Vec<String>,
}

/// Parts whose shapes follow from the number of classes.
const OF_CLASSES: [&str; 6] =
    ["early_classifier3", "classifier_att", "classifier_cnn", "classifier_merge", "isc3", "isc4"];

/// Overwrites a set of weights as far as the tensors fit; those whose names do not begin with `prefix` are none of
/// this network. The state is torn until [`TrainState::mend`].
///
/// # Errors
/// [`Misfit`] names every tensor of another shape that does not only differ by the classes, and every one that
/// has no floats or values that are not finite; or says that nothing fits.
pub fn take(
    state: &mut TrainState,
    which: Which,
    arrays: &[(&str, &Array)],
    prefix: &str,
) -> Result<Taken, Misfit> {
    state.tear();
    let strip = |name: &str| name.strip_prefix(prefix).map(str::to_owned);
    let mut left: Vec<String> = Vec::new();
    let mut known = std::collections::BTreeMap::new();
    for (name, array) in arrays {
        match strip(name) {
            Some(stripped) => drop(known.insert(stripped, *array)),
            None => left.push((*name).to_owned()),
        }
    }
    let (mut taken, mut fresh, mut problems) = (0, Vec::new(), Vec::new());
    let layout = std::sync::Arc::clone(state.layout());
    for entry in layout.entries() {
        let found = known.remove(&entry.name);
        if entry.role == Role::Counter {
            continue; // It is counted from the updates that are made here.
        }
        let of_classes = OF_CLASSES.iter().any(|part| entry.name.starts_with(part));
        match found.map(|array| (array, array.shape == shape(entry))) {
            None => fresh.push(entry.name.clone()),
            Some((_, false)) if of_classes => fresh.push(entry.name.clone()),
            Some((array, false)) => {
                let (found, wanted) = (&array.shape, shape(entry));
                problems
                    .push(format!("{} has the shape {found:?}, expected {wanted:?}", entry.name));
            }
            Some((array, true)) => match array.to_f32() {
                Some(values) if values.iter().all(|value| value.is_finite()) => {
                    let [params, buffers] = which.sections();
                    let section = if entry.role == Role::Buffer { buffers } else { params };
                    let floats = bytemuck::cast_slice_mut::<u8, f32>(state.section_mut(section));
                    floats[entry.range.clone()].copy_from_slice(&values);
                    taken += 1;
                }
                Some(_) => problems.push(format!("{} is not finite (NaN or infinite)", entry.name)),
                None => problems.push(format!("{} holds no floats", entry.name)),
            },
        }
    }
    if taken == 0 && problems.is_empty() {
        problems.push(format!("none of its {} tensors is of this network", arrays.len()));
    }
    left.extend(known.into_keys());
    if problems.is_empty() { Ok(Taken { taken, fresh, left }) } else { Err(Misfit { problems }) }
}

/// Overwrites the moments; returns the number of updates, if the optimizer says it.
///
/// # Errors
/// [`Misfit`] names every parameter whose moments do not fit.
pub fn fill_moments(state: &mut TrainState, optimizer: &Value) -> Result<Option<u64>, Misfit> {
    state.tear();
    let layout = std::sync::Arc::clone(state.layout());
    let (mut problems, mut steps) = (Vec::new(), None);
    let of_parameter = |number: usize| {
        let Some(Value::Dict(items)) = optimizer.get("state") else { return None };
        let wanted = int(number);
        items.iter().find(|(key, _)| *key == wanted).map(|(_, value)| value)
    };
    for (number, entry) in in_group_order(&layout).into_iter().enumerate() {
        let Some(held) = of_parameter(number) else {
            problems.push(format!("the moments of {} (number {number}) are missing", entry.name));
            continue;
        };
        steps = held.get("step").and_then(whole).or(steps);
        for (section, name) in MOMENTS {
            let values = match held.get(name) {
                Some(Value::Array(array)) if array.shape == shape(entry) => array.to_f32(),
                _ => None,
            };
            let Some(values) = values else {
                problems.push(format!("{name} of {} (number {number}) does not fit", entry.name));
                continue;
            };
            let floats = bytemuck::cast_slice_mut::<u8, f32>(state.section_mut(section));
            floats[entry.range.clone()].copy_from_slice(&values);
        }
    }
    if problems.is_empty() { Ok(steps) } else { Err(Misfit { problems }) }
}

/// Sets the counters: updates, and batches of the average. The state is torn until [`TrainState::mend`].
pub fn set_counters(state: &mut TrainState, updates: u64, averaged: u64) {
    state.tear();
    let counters: &mut [u64] = bytemuck::cast_slice_mut(state.section_mut(COUNTERS));
    counters.copy_from_slice(&[updates, averaged]);
}

/// Decayed parameters first, then the others, each in the reference's order.
fn in_group_order(layout: &Layout) -> Vec<&model::Entry> {
    let of = |role: Role| layout.entries().iter().filter(move |entry| entry.role == role);
    of(Role::Decayed).chain(of(Role::Undecayed)).collect()
}

fn shape(entry: &model::Entry) -> Vec<u64> {
    entry.shape.iter().map(|size| size.cast_unsigned()).collect()
}

/// A whole number, however an optimizer of some version stores it.
fn whole(value: &Value) -> Option<u64> {
    match value {
        Value::Int(number) => u64::try_from(*number).ok(),
        Value::Float(number) => from_float(*number),
        Value::Array(array) => match array.to_i64() {
            Some(number) => u64::try_from(number).ok(),
            None => from_float(f64::from(*array.to_f32()?.first()?)),
        },
        Value::None
        | Value::Bool(_)
        | Value::Text(_)
        | Value::Bytes(_)
        | Value::List(_)
        | Value::Dict(_) => None,
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "it is checked to be a whole number that fits"
)]
fn from_float(number: f64) -> Option<u64> {
    ((0.0..9e15).contains(&number) && number.fract() == 0.0).then_some(number as u64)
}

pub(crate) fn text(text: &str) -> Value {
    Value::Text(text.to_owned())
}

fn int(number: usize) -> Value {
    Value::Int(i64::try_from(number).expect("no memory holds more elements"))
}
