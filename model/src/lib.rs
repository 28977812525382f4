//! A minimal Qwen3-Next model on [`qwen3next_kernels`]: files, tokenizer, state, forward pass, generation.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`config`] | the sizes of a model |
//! | [`weights`] | its weights in one layout, whatever file they came from |
//! | [`state`] | what it remembers of its sequences: KV caches, windows, recurrent states |
//! | [`forward`] | tokens in, logits out |
//! | [`generate`] | choosing the next token |
//! | [`perplexity`] | likelihood of a text, divergence of two sets of logits |

mod attention_layer;
pub mod config;
mod delta_layer;
pub mod error;
pub mod forward;
pub mod generate;
mod moe_layer;
pub mod perplexity;
pub mod state;
pub mod weights;

pub use config::Config;
pub use error::Error;
pub use forward::{Batch, Model};
pub use state::State;
pub use weights::{Tensor, Weights};
