//! Files of safetensors: named tensors of one set of weights.

use std::{
    collections::BTreeMap,
    fs::{self, OpenOptions},
    io::Write as _,
    path::Path,
};

use anyhow::{Context as _, Result, bail};
use checkpoint::pth::{Array, Dtype, Value};
use safetensors::{SafeTensors, tensor::TensorView};

use crate::weights::text;

/// The kinds of elements that both formats know and weights may have.
const KINDS: [(safetensors::Dtype, Dtype); 6] = [
    (safetensors::Dtype::F16, Dtype::F16),
    (safetensors::Dtype::BF16, Dtype::Bf16),
    (safetensors::Dtype::F32, Dtype::F32),
    (safetensors::Dtype::F64, Dtype::F64),
    (safetensors::Dtype::I64, Dtype::I64),
    (safetensors::Dtype::I32, Dtype::I32),
];

/// The tensors of a file, by name.
pub(super) fn read(path: &Path) -> Result<Value> {
    let bytes = fs::read(path).context("it cannot be read")?;
    let tensors = SafeTensors::deserialize(&bytes).context("it is no file of safetensors")?;
    let mut items = Vec::new();
    for (name, view) in tensors.iter() {
        let Some((_, dtype)) = KINDS.iter().find(|(kind, _)| *kind == view.dtype()) else {
            bail!("{name} holds {:?}; weights are expected to be floats", view.dtype());
        };
        let shape = view.shape().iter().map(|&size| size as u64).collect();
        let array = Array { dtype: *dtype, shape, bytes: view.data().to_vec() };
        items.push((text(name), Value::Array(array)));
    }
    Ok(Value::Dict(items))
}

/// Writes named tensors into a file that must not be there yet.
pub(super) fn write(path: &Path, named: &[(String, Array)]) -> Result<()> {
    let mut views = BTreeMap::new();
    for (name, array) in named {
        let kind = KINDS.iter().find(|(_, dtype)| *dtype == array.dtype);
        let (kind, _) = kind.with_context(|| format!("{name} holds {:?}", array.dtype))?;
        let shape: Result<Vec<usize>, _> =
            array.shape.iter().map(|&size| usize::try_from(size)).collect();
        views.insert(name.as_str(), TensorView::new(*kind, shape?, &array.bytes)?);
    }
    let bytes = safetensors::serialize(views, None)?;
    let mut file = OpenOptions::new().write(true).create_new(true).open(path)?;
    file.write_all(&bytes)?;
    Ok(file.sync_all()?)
}
