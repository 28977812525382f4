//! A config.json; what is accepted fits together.

#![no_main]

use qwen3next_model::Config;
use std::path::Path;

libfuzzer_sys::fuzz_target!(|text: &str| {
    if let Ok(config) = Config::parse_json(Path::new("config.json"), text) {
        config.validate().expect("a config that was read is valid");
        config.state_bytes();
        config.kv_elements();
    }
});
