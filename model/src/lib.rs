//! The mathematics of training a Dynamic Perceiver (Han et al., ICCV 2023, arXiv:2306.11248): the network, its
//! losses, the optimizer, the rates and the averaged weights. torch; no files, no network, no clock.
//!
//! Start reading at [`net`], then [`params`]: all state is in flat tensors of one fixed order.
//!
//! **Invariants**: for a fixed device, CPU capability and number of threads every function gives the same
//! bits for the same arguments. Nothing reads or moves libtorch's own random state, and nothing accumulates
//! in `.grad`. Call `libtorch::init` first.

mod attention;
mod backbone;
mod draws;
mod early;
mod elementwise;
mod exchange;
mod exit;
mod folded;
mod fused;
mod gate;
mod init;
mod latent;
mod layers;
mod neighbourhood;
mod norm;
mod products;
mod variants;

pub mod config;
pub mod cost;
pub mod dynamic;
pub mod ema;
pub mod loss;
pub mod loss_scale;
pub mod net;
pub mod optimizer;
pub mod params;
pub mod schedule;

pub use config::{Architecture, ConfigError, ModelConfig};
pub use cost::{Cost, StageSize};
pub use draws::Draws;
pub use early::{Answers, confidences};
pub use ema::Ema;
pub use exit::{EXIT_NAMES, Exits};
pub use loss::{LossConfig, Losses, Targets, multi_exit};
pub use loss_scale::{LossScale, Verdict};
pub use net::{GradientError, Network};
pub use optimizer::{AdamW, AdamWConfig, Update, clip_norm, global_norm};
pub use params::{Entry, Layout, Role, ValueError, Weights};
pub use schedule::{Schedule, ScheduleConfig, ScheduleError};
pub use variants::variant_names;
