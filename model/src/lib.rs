//! A minimal Qwen3-Next model on [`qwen3next_kernels`]: files, tokenizer, state, forward pass, generation.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`config`] | the sizes of a model |
//! | [`embedded`] | the small trained model that is part of the program |
//! | [`gguf`], [`safetensors`] | the two containers, read without trust |
//! | [`mod@load`] | from a path to a model |
//! | [`weights`] | its weights in one layout, whatever file they came from |
//! | [`tokenizer`] | text to token ids and back |
//! | [`state`] | what it remembers of its sequences: KV caches, windows, recurrent states |
//! | [`forward`] | tokens in, logits out |
//! | [`generate`] | choosing the next token |
//! | [`chat`], [`stop`] | a conversation as text, and where its turns end |
//! | [`session`] | one sequence that is read and continued |
//! | [`prompt_cache`] | a session as a file |
//! | [`streaming`] | experts in the CPU's memory, computed on a device |
//! | [`perplexity`] | likelihood of a text, divergence of two sets of logits |
//! | [`quantize`] | a model with its matrices in another type |
//! | [`synth`] | random weights in the real shapes |
//! | [`whole`] | output files that are there whole or not at all |

mod attention_layer;
mod cache;
pub mod chat;
pub mod config;
#[cfg(feature = "device")]
mod cpu_experts;
mod delta_layer;
#[cfg(feature = "device")]
mod device_layers;
pub mod embedded;
pub mod error;
pub mod file;
mod fingerprint;
pub mod forward;
pub mod generate;
pub mod gguf;
pub mod load;
mod load_gguf;
mod load_hf;
mod moe_layer;
#[cfg(feature = "device")]
pub mod offload;
pub mod perplexity;
pub mod prompt_cache;
pub mod quantize;
mod repeat;
pub mod safetensors;
pub mod session;
mod source;
pub mod state;
pub mod stop;
pub mod streaming;
pub mod synth;
pub mod tokenizer;
mod ubatch;
pub mod weights;
pub mod whole;

pub use config::Config;
pub use error::Error;
pub use forward::{Batch, Model};
pub use load::load;
pub use session::Session;
pub use source::{Loaded, Metadata, Progress, TensorInfo};
pub use state::{CacheTypes, State};
pub use tokenizer::Tokenizer;
pub use weights::{Tensor, Weights};
