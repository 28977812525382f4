//! The sizes of a model, whatever file they came from.

use crate::error::Error;

/// How a layer mixes tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LayerKind {
    /// Gated DeltaNet: a recurrent state.
    Delta,
    /// Full attention: a KV cache.
    Attention,
}

/// How a layer's feed-forward is built.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mlp {
    /// One SwiGLU of width `dense_ff`.
    Dense,
    /// Routed experts and a shared one.
    Moe,
}

/// Which key head a value head reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HeadMap {
    /// hk = h / (HV / HK): Hugging Face, and GGUF files of architecture `qwen3next`.
    Grouped,
    /// hk = h % HK.
    Tiled,
}

/// Sizes of the full-attention layers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionConfig {
    /// HQ, query heads.
    pub heads: usize,
    /// HKV, key and value heads.
    pub kv_heads: usize,
    /// D, channels of a head.
    pub head_dim: usize,
    /// R, the first channels of a head, which are rotated.
    pub rotary: usize,
    /// Base of the rotary frequencies.
    pub rope_base: f64,
}

/// Sizes of the DeltaNet layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeltaConfig {
    /// HK, query and key heads.
    pub k_heads: usize,
    /// HV, value heads, a multiple of HK.
    pub v_heads: usize,
    /// K, channels of a query or key head.
    pub k_dim: usize,
    /// V, channels of a value head.
    pub v_dim: usize,
    /// W, taps of the causal convolution.
    pub conv_width: usize,
    /// Which key head a value head reads.
    pub head_map: HeadMap,
}

impl DeltaConfig {
    /// Channels of the convolution: q, k and v, HK·K·2 + HV·V.
    pub fn conv_channels(&self) -> usize {
        2 * self.key_channels() + self.value_channels()
    }

    /// HK·K.
    pub fn key_channels(&self) -> usize {
        self.k_heads * self.k_dim
    }

    /// HV·V.
    pub fn value_channels(&self) -> usize {
        self.v_heads * self.v_dim
    }

    /// r = HV / HK, value heads of a key head.
    pub fn group(&self) -> usize {
        self.v_heads / self.k_heads.max(1)
    }
}

/// Sizes of the sparse feed-forward; all 0 where no layer has one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MoeConfig {
    /// Routed experts.
    pub experts: usize,
    /// Experts that a token chooses.
    pub top_k: usize,
    /// Width of a routed expert.
    pub ff: usize,
    /// Width of the shared expert; 0: there is none.
    pub shared_ff: usize,
    /// The chosen experts' weights are divided by their sum.
    pub normalize: bool,
}

/// The sizes of a model. [`Config::validate`] holds for every one that a loader returns, so that products of a few of
/// them do not overflow.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Rows of the embedding and of the output projection.
    pub vocab: usize,
    /// E, width of the residual stream.
    pub hidden: usize,
    /// Kind of every layer; MTP blocks are not counted.
    pub layers: Vec<LayerKind>,
    /// Feed-forward of every layer; as long as `layers`.
    pub mlp: Vec<Mlp>,
    /// Full attention.
    pub attention: AttentionConfig,
    /// DeltaNet.
    pub delta: DeltaConfig,
    /// Sparse feed-forward.
    pub moe: MoeConfig,
    /// Width of a dense feed-forward.
    pub dense_ff: usize,
    /// eps of every RMS norm.
    pub norm_eps: f32,
    /// Tokens that the model was trained to read.
    pub context: usize,
    /// The output projection is the embedding.
    pub tied: bool,
    /// MTP blocks in the file, which are skipped.
    pub mtp_layers: usize,
}

/// Layers a model may have.
pub const MAX_LAYERS: usize = 1024;

impl Config {
    /// Checks every size against its limit, and which must divide which.
    pub fn validate(&self) -> Result<(), Error> {
        let within = |field, value: usize, low: usize, high: usize| {
            if (low..=high).contains(&value) {
                return Ok(());
            }
            Err(Error::config(field, format!("is {value}, expected {low} to {high}")))
        };
        let multiple = |field, value: usize, name: &str, of: usize| {
            if of != 0 && value % of == 0 {
                return Ok(());
            }
            Err(Error::config(field, format!("is {value}, expected a multiple of {name} ({of})")))
        };
        within("vocab", self.vocab, 1, 1 << 24)?;
        within("hidden", self.hidden, 1, 1 << 16)?;
        within("layers", self.layers.len(), 1, MAX_LAYERS)?;
        within("mtp_layers", self.mtp_layers, 0, 64)?;
        if self.mlp.len() != self.layers.len() {
            return Err(Error::config(
                "mlp",
                format!("has {} entries, expected {}", self.mlp.len(), self.layers.len()),
            ));
        }
        within("context", self.context, 1, 1 << 30)?;

        let a = &self.attention;
        within("attention.heads", a.heads, 1, 1024)?;
        within("attention.kv_heads", a.kv_heads, 1, 1024)?;
        multiple("attention.heads", a.heads, "kv_heads", a.kv_heads)?;
        within("attention.head_dim", a.head_dim, 1, 512)?;
        within("attention.rotary", a.rotary, 0, a.head_dim)?;
        multiple("attention.rotary", a.rotary, "a pair", 2)?;
        if !(a.rope_base.is_finite() && a.rope_base > 0.0) {
            return Err(Error::config(
                "attention.rope_base",
                format!("is {}, expected a positive number", a.rope_base),
            ));
        }

        let d = &self.delta;
        within("delta.k_heads", d.k_heads, 1, 1024)?;
        within("delta.v_heads", d.v_heads, 1, 1024)?;
        multiple("delta.v_heads", d.v_heads, "k_heads", d.k_heads)?;
        within("delta.k_dim", d.k_dim, 1, 1024)?;
        within("delta.v_dim", d.v_dim, 1, 1024)?;
        within("delta.conv_width", d.conv_width, 1, 16)?;

        if self.mlp.contains(&Mlp::Moe) {
            let m = &self.moe;
            within("moe.experts", m.experts, 1, 1 << 16)?;
            within("moe.top_k", m.top_k, 1, m.experts)?;
            within("moe.ff", m.ff, 1, 1 << 20)?;
            within("moe.shared_ff", m.shared_ff, 0, 1 << 20)?;
        }
        if self.mlp.contains(&Mlp::Dense) {
            within("dense_ff", self.dense_ff, 1, 1 << 20)?;
        }
        if !(self.norm_eps.is_finite() && self.norm_eps >= 0.0) {
            return Err(Error::config("norm_eps", format!("is {}, expected 0 or a small number", self.norm_eps)));
        }
        Ok(())
    }

    /// Layers of a kind.
    pub fn count(&self, kind: LayerKind) -> usize {
        self.layers.iter().filter(|&&k| k == kind).count()
    }

    /// Bytes of one sequence's recurrent state in f32: delta states and convolution windows of all DeltaNet layers.
    pub fn state_bytes(&self) -> usize {
        let d = &self.delta;
        let states = d.v_heads * d.v_dim * d.k_dim + d.conv_channels() * (d.conv_width - 1);
        4 * self.count(LayerKind::Delta) * states
    }

    /// Elements that one token adds to the KV caches of all attention layers.
    pub fn kv_elements(&self) -> usize {
        2 * self.count(LayerKind::Attention) * self.attention.kv_heads * self.attention.head_dim
    }
}
