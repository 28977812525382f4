//! A minimal Qwen3-Next model.

pub mod config;
pub mod error;
pub mod weights;

pub use config::Config;
pub use error::Error;
pub use weights::{Tensor, Weights};
