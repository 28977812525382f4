//! A minimal Qwen3-Next model.

pub mod config;
pub mod error;
pub mod file;
pub mod gguf;
pub mod load;
mod load_gguf;
mod load_hf;
pub mod safetensors;
pub mod synth;
pub mod tokenizer;
pub mod weights;

pub use config::Config;
pub use error::Error;
pub use load::{load, Loaded, Metadata, Progress};
pub use tokenizer::Tokenizer;
pub use weights::{Tensor, Weights};
