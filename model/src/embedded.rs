//! The small trained model that is part of the program, and text that it was not trained on (`assets/README.md`).

use crate::error::Error;
use crate::gguf::Gguf;
use crate::load_gguf;
use crate::source::Loaded;
use crate::weights::Store;
use std::path::Path;

/// The model as a GGUF file.
pub static GGUF: &[u8] = include_bytes!("../assets/qwen3next-kjv-q8_0.gguf");

/// The end of the text that the model was trained on the rest of.
pub static HELD_OUT: &str = include_str!("../assets/heldout.txt");

/// Loads it.
pub fn load() -> Result<Loaded, Error> {
    let name = Path::new("the embedded model");
    let gguf = Gguf::parse_store(name, Store::Embedded(GGUF))?;
    load_gguf::load_parts(name, &[gguf], &mut |_| ())
}
