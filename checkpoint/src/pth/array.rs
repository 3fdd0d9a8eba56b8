//! Named arrays: kind of element, shape, bytes in row-major order.

use super::PthFault;

/// The kind of an array's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE half.
    F16,
    /// Brain float.
    Bf16,
    /// IEEE single.
    F32,
    /// IEEE double.
    F64,
    /// Signed 64 bits.
    I64,
    /// Signed 32 bits.
    I32,
    /// Signed 16 bits.
    I16,
    /// Signed 8 bits.
    I8,
    /// Unsigned 8 bits.
    U8,
    /// One byte, 0 or 1.
    Bool,
}

/// All kinds, with the names of their storages.
const STORAGES: [(Dtype, &str); 10] = [
    (Dtype::F16, "torch HalfStorage"),
    (Dtype::Bf16, "torch BFloat16Storage"),
    (Dtype::F32, "torch FloatStorage"),
    (Dtype::F64, "torch DoubleStorage"),
    (Dtype::I64, "torch LongStorage"),
    (Dtype::I32, "torch IntStorage"),
    (Dtype::I16, "torch ShortStorage"),
    (Dtype::I8, "torch CharStorage"),
    (Dtype::U8, "torch ByteStorage"),
    (Dtype::Bool, "torch BoolStorage"),
];

impl Dtype {
    /// Bytes of an element.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::Bf16 | Self::I16 => 2,
            Self::I8 | Self::U8 | Self::Bool => 1,
        }
    }

    pub(super) fn of_storage(class: &str) -> Option<Self> {
        STORAGES.iter().find(|(_, name)| *name == class).map(|(dtype, _)| *dtype)
    }

    pub(super) fn storage(self) -> &'static str {
        let found = STORAGES.iter().find(|(dtype, _)| *dtype == self);
        found.expect("the table is complete").1
    }
}

/// An array of numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Array {
    /// Kind of the elements.
    pub dtype: Dtype,
    /// Sizes of the axes; empty for a scalar.
    pub shape: Vec<u64>,
    /// The elements, little-endian, row-major.
    pub bytes: Vec<u8>,
}

impl Array {
    /// An array of f32.
    ///
    /// # Panics
    /// If the number of values is not that of the shape.
    #[must_use]
    pub fn f32(shape: &[u64], values: &[f32]) -> Self {
        assert_eq!(shape.iter().product::<u64>(), values.len() as u64, "the shape fits");
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self { dtype: Dtype::F32, shape: shape.to_vec(), bytes }
    }

    /// A scalar i64.
    #[must_use]
    pub fn i64_scalar(value: i64) -> Self {
        Self { dtype: Dtype::I64, shape: Vec::new(), bytes: value.to_le_bytes().to_vec() }
    }

    /// The elements as f32; f64 is rounded, f16 and bf16 are widened. None for whole numbers.
    #[must_use]
    pub fn to_f32(&self) -> Option<Vec<f32>> {
        let half = |bytes: &[u8; 2]| u16::from_le_bytes(*bytes);
        Some(match self.dtype {
            Dtype::F32 => self.bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            Dtype::F64 => {
                self.bytes.as_chunks().0.iter().map(|b| rounded(f64::from_le_bytes(*b))).collect()
            }
            Dtype::F16 => self.bytes.as_chunks().0.iter().map(|b| widened(half(b))).collect(),
            Dtype::Bf16 => {
                let wide = |b| f32::from_bits(u32::from(half(b)) << 16);
                self.bytes.as_chunks().0.iter().map(wide).collect()
            }
            Dtype::I64 | Dtype::I32 | Dtype::I16 | Dtype::I8 | Dtype::U8 | Dtype::Bool => {
                return None;
            }
        })
    }

    /// The value of a scalar of whole numbers.
    #[must_use]
    pub fn to_i64(&self) -> Option<i64> {
        match self.dtype {
            Dtype::I64 => Some(i64::from_le_bytes(self.bytes.as_slice().try_into().ok()?)),
            Dtype::I32 => Some(i32::from_le_bytes(self.bytes.as_slice().try_into().ok()?).into()),
            Dtype::F16
            | Dtype::Bf16
            | Dtype::F32
            | Dtype::F64
            | Dtype::I16
            | Dtype::I8
            | Dtype::U8
            | Dtype::Bool => None,
        }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "rounding is what is asked for")]
fn rounded(value: f64) -> f32 {
    value as f32
}

/// IEEE half to single, exactly.
fn widened(half: u16) -> f32 {
    let sign = u32::from(half & 0x8000) << 16;
    let exponent = u32::from(half >> 10) & 0x1f;
    let fraction = u32::from(half & 0x3ff);
    let magnitude = match (exponent, fraction) {
        (0, _) => (fraction as f32 * 2f32.powi(-24)).to_bits(),
        (0x1f, _) => 0x7f80_0000 | (fraction << 13),
        _ => ((exponent + 112) << 23) | (fraction << 13),
    };
    f32::from_bits(sign | magnitude)
}

/// A view of a storage as an array of its own.
pub(super) fn gather(
    storage: &[u8],
    dtype: Dtype,
    offset: u64,
    shape: &[u64],
    strides: &[u64],
) -> Result<Array, PthFault> {
    let misfit = || PthFault::Storage { shape: shape.to_vec(), bytes: storage.len() };
    if shape.len() != strides.len() {
        return Err(misfit());
    }
    let elements = shape.iter().try_fold(1u64, |product, &size| product.checked_mul(size));
    let elements = elements.and_then(|n| usize::try_from(n).ok()).ok_or_else(misfit)?;
    let size = dtype.bytes();
    // A view may repeat elements, but no file needs one that is much larger than its storage.
    if elements > storage.len().max(1) {
        return Err(misfit());
    }
    let mut bytes = Vec::with_capacity(elements * size);
    let mut index = vec![0u64; shape.len()];
    for _ in 0..elements {
        let at = index.iter().zip(strides).try_fold(offset, |at, (i, stride)| {
            i.checked_mul(*stride).and_then(|step| at.checked_add(step))
        });
        let start = at.and_then(|at| usize::try_from(at).ok()?.checked_mul(size));
        let element = start.and_then(|start| storage.get(start..start.checked_add(size)?));
        bytes.extend_from_slice(element.ok_or_else(misfit)?);
        for axis in (0..shape.len()).rev() {
            index[axis] += 1;
            if index[axis] < shape[axis] {
                break;
            }
            index[axis] = 0;
        }
    }
    Ok(Array { dtype, shape: shape.to_vec(), bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_column_major_view_becomes_row_major() {
        let storage: Vec<u8> = (0..6).collect();
        let array = gather(&storage, Dtype::U8, 0, &[2, 3], &[1, 2]).unwrap();
        assert_eq!(array.bytes, [0, 2, 4, 1, 3, 5]);
        assert!(gather(&storage, Dtype::U8, 1, &[2, 3], &[1, 2]).is_err(), "it ends outside");
        assert!(gather(&storage, Dtype::U8, 0, &[u64::MAX, 3], &[1, 2]).is_err());
    }

    #[test]
    fn halves_are_widened_exactly() {
        let widen = |half: u16| {
            let bytes = half.to_le_bytes().to_vec();
            Array { dtype: Dtype::F16, shape: vec![1], bytes }.to_f32().unwrap()[0]
        };
        assert_eq!(widen(0x3c00), 1.0);
        assert_eq!(widen(0xc500), -5.0);
        assert_eq!(widen(0x0001), 2f32.powi(-24));
        assert_eq!(widen(0x7bff), 65504.0);
        assert!(widen(0x7c00).is_infinite() && widen(0x7e00).is_nan());
    }
}
