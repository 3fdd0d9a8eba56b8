//! A convolution with BatchNorm's running statistics folded into it: for evaluation alone, made once.
//!
//! `scale·(w∗x − mean)/√(variance + ε) + bias` is `w′∗x + b′` with each output's weights scaled, computed in f64 and
//! rounded once.

use tch::{Kind, Tensor};

use crate::layers::{BatchNorm, Conv2d};
use crate::norm::Then;

/// What a convolution and its BatchNorm have become.
#[derive(Debug)]
pub(crate) struct Folded(Conv2d);

impl Folded {
    pub(crate) fn new(convolution: &Conv2d, norm: &BatchNorm) -> Folded {
        let (weight, none) = convolution.tensors();
        assert!(none.is_none(), "before BatchNorm there is no bias");
        let [scale, shift] = norm.factors(); // f64, [outputs] each
        let kind = weight.kind();
        let scaled = weight.detach().to_kind(Kind::Double) * scale.view([-1, 1, 1, 1]);
        Folded(convolution.with(scaled.to_kind(kind), shift.to_kind(kind)))
    }

    /// The convolution, and what follows in its memory.
    pub(crate) fn forward(&self, x: &Tensor, then: Then<'_>) -> Tensor {
        let mut y = self.0.forward(x);
        match then {
            Then::Nothing => y,
            Then::Relu => y.relu_(),
            Then::AddRelu(shortcut) => y.g_add_(shortcut).relu_(),
        }
    }
}
