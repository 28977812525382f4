//! A minimal Qwen3-Next model.
