//! Small models that tests write, break and read back.
#![allow(dead_code)]

use qwen3next_kernels::DType;
use qwen3next_model::gguf::{Put, Writer};
use qwen3next_model::{file::Options, Error, Tensor};
use qwen3next_model::{load, Loaded};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

/// A folder of its own that is removed at the end.
pub struct Folder(pub PathBuf);

impl Folder {
    pub fn new() -> Folder {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("q3n-files-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub fn open(path: &Path) -> Result<Loaded, Error> {
    load(path, Options::default(), &mut |_| {})
}

/// The error text of a load that must fail, which is one line.
pub fn refused(path: &Path) -> String {
    let text = match open(path) {
        Ok(_) => panic!("{} loads", path.display()),
        Err(e) => e.to_string(),
    };
    assert!(!text.contains('\n'), "{text}");
    text
}

pub const HIDDEN: usize = 32;
pub const VOCAB: usize = 300;

/// A model of two layers, one of each kind, as keys and tensors to tamper with.
pub struct Small {
    pub keys: Vec<(String, Put)>,
    pub tensors: Vec<(String, DType, Vec<usize>)>,
    pub alignment: Option<usize>,
}

pub fn byte_chars() -> Vec<String> {
    let mut extra = 256;
    (0..256u32)
        .map(|b| {
            let plain = (33..=126).contains(&b) || (161..=172).contains(&b) || b >= 174;
            let code = if plain {
                b
            } else {
                extra += 1;
                extra - 1
            };
            char::from_u32(code).unwrap().to_string()
        })
        .collect()
}

pub fn small(quant: DType) -> Small {
    let (e, hidden, ff) = (4, HIDDEN, 32);
    let (hk, hv, k, v) = (2, 4, 8, 8);
    let (hq, hkv, d) = (4, 2, 16);
    let sizes = [
        ("block_count", 2),
        ("context_length", 512),
        ("embedding_length", hidden),
        ("feed_forward_length", 64),
        ("attention.head_count", hq),
        ("attention.head_count_kv", hkv),
        ("attention.key_length", d),
        ("attention.value_length", d),
        ("rope.dimension_count", 4),
        ("expert_count", e),
        ("expert_used_count", 2),
        ("expert_feed_forward_length", ff),
        ("expert_shared_feed_forward_length", ff),
        ("ssm.conv_kernel", 4),
        ("ssm.state_size", k),
        ("ssm.group_count", hk),
        ("ssm.time_step_rank", hv),
        ("ssm.inner_size", hv * v),
        ("full_attention_interval", 2),
    ];
    let mut keys = vec![("general.name".to_string(), Put::Str("small".into()))];
    keys.extend(sizes.iter().map(|(key, n)| (format!("qwen3next.{key}"), Put::U32(*n as u32))));
    keys.push(("qwen3next.attention.layer_norm_rms_epsilon".into(), Put::F32(1e-6)));
    keys.push(("qwen3next.rope.freq_base".into(), Put::F32(1e7)));
    let mut tokens = byte_chars();
    tokens.extend(["ab", "abc", "<|im_end|>", "<tool>"].map(String::from));
    tokens.extend((tokens.len()..VOCAB).map(|i| format!("<t{i}>")));
    let mut types = vec![1; VOCAB];
    (types[258], types[259]) = (3, 4);
    let merges = ["a b", "ab c", "x y"].map(String::from).to_vec();
    keys.push(("tokenizer.ggml.model".into(), Put::Str("gpt2".into())));
    keys.push(("tokenizer.ggml.pre".into(), Put::Str("qwen2".into())));
    keys.push(("tokenizer.ggml.tokens".into(), Put::Strs(tokens)));
    keys.push(("tokenizer.ggml.token_type".into(), Put::I32s(types)));
    keys.push(("tokenizer.ggml.merges".into(), Put::Strs(merges)));
    keys.push(("tokenizer.ggml.eos_token_id".into(), Put::U32(258)));

    let mut tensors = Vec::new();
    let mut big = |name: &str, shape: &[usize]| tensors.push((name.to_string(), quant, shape.to_vec()));
    big("token_embd.weight", &[VOCAB, hidden]);
    big("output.weight", &[VOCAB, hidden]);
    big("blk.0.attn_qkv.weight", &[2 * hk * k + hv * v, hidden]);
    big("blk.0.attn_gate.weight", &[hv * v, hidden]);
    big("blk.0.ssm_ba.weight", &[2 * hv, hidden]);
    big("blk.0.ssm_out.weight", &[hidden, hv * v]);
    big("blk.1.attn_q.weight", &[2 * hq * d, hidden]);
    big("blk.1.attn_k.weight", &[hkv * d, hidden]);
    big("blk.1.attn_v.weight", &[hkv * d, hidden]);
    big("blk.1.attn_output.weight", &[hidden, hq * d]);
    for i in 0..2 {
        big(&format!("blk.{i}.ffn_gate_exps.weight"), &[e, ff, hidden]);
        big(&format!("blk.{i}.ffn_up_exps.weight"), &[e, ff, hidden]);
        big(&format!("blk.{i}.ffn_down_exps.weight"), &[e, hidden, ff]);
        big(&format!("blk.{i}.ffn_gate_shexp.weight"), &[ff, hidden]);
        big(&format!("blk.{i}.ffn_up_shexp.weight"), &[ff, hidden]);
        big(&format!("blk.{i}.ffn_down_shexp.weight"), &[hidden, ff]);
    }
    let mut plain = |name: &str, shape: &[usize]| tensors.push((name.to_string(), DType::F32, shape.to_vec()));
    plain("output_norm.weight", &[hidden]);
    plain("blk.0.ssm_conv1d.weight", &[2 * hk * k + hv * v, 4]);
    plain("blk.0.ssm_dt.bias", &[hv]);
    plain("blk.0.ssm_a", &[hv]);
    plain("blk.0.ssm_norm.weight", &[v]);
    plain("blk.1.attn_q_norm.weight", &[d]);
    plain("blk.1.attn_k_norm.weight", &[d]);
    for i in 0..2 {
        plain(&format!("blk.{i}.attn_norm.weight"), &[hidden]);
        plain(&format!("blk.{i}.post_attention_norm.weight"), &[hidden]);
        plain(&format!("blk.{i}.ffn_gate_inp.weight"), &[e, hidden]);
        plain(&format!("blk.{i}.ffn_gate_inp_shexp.weight"), &[hidden]);
    }
    Small { keys, tensors, alignment: None }
}

impl Small {
    pub fn set(&mut self, key: &str, value: Put) -> &mut Self {
        self.unset(key);
        self.keys.push((key.into(), value));
        self
    }

    pub fn unset(&mut self, key: &str) -> &mut Self {
        self.keys.retain(|(k, _)| k != key);
        self
    }

    pub fn without(&mut self, tensor: &str) -> &mut Self {
        let before = self.tensors.len();
        self.tensors.retain(|(name, ..)| name != tensor);
        assert_eq!(self.tensors.len(), before - 1, "{tensor}");
        self
    }

    pub fn with(&mut self, tensor: &str, dtype: DType, shape: &[usize]) -> &mut Self {
        self.tensors.push((tensor.into(), dtype, shape.to_vec()));
        self
    }

    /// Writes the model; the data of a tensor follow from its name alone.
    pub fn write(&self, path: &Path) {
        let mut writer = Writer::new("qwen3next");
        if let Some(alignment) = self.alignment {
            writer.align(alignment);
        }
        for (key, value) in &self.keys {
            writer.put(key, value.clone());
        }
        for (name, dtype, shape) in &self.tensors {
            writer.tensor(name, *dtype, shape);
        }
        writer.write(path, |i, out| out.write_all(&data(&writer, i)).map_err(|_| unreachable!())).unwrap();
    }
}

/// Bytes of a tensor: small numbers that depend on its name.
pub fn data(writer: &Writer, index: usize) -> Vec<u8> {
    let (name, dtype, shape) = &writer.tensors()[index];
    let seed = name.bytes().fold(1u32, |h, b| h.wrapping_mul(31).wrapping_add(b.into()));
    let count: usize = shape.iter().product();
    let number =
        |i: usize| ((seed.wrapping_add(i as u32).wrapping_mul(2_654_435_761) >> 8) as f32 / 8_388_608.0 - 1.0) * 0.1;
    match *dtype {
        DType::F32 => (0..count).flat_map(|i| number(i).to_le_bytes()).collect(),
        DType::BF16 => (0..count).flat_map(|i| half::bf16::from_f32(number(i)).to_le_bytes()).collect(),
        DType::F16 => (0..count).flat_map(|i| half::f16::from_f32(number(i)).to_le_bytes()).collect(),
        dtype => (0..dtype.bytes(count).unwrap()).map(|i| (seed as usize + i * 7) as u8).collect(),
    }
}

/// Two tensors hold the same bits in the same shape and type, gaps between experts left out.
pub fn same(a: &Tensor, b: &Tensor) -> bool {
    let matrices = |t: &Tensor| (0..t.experts()).map(|e| t.expert(e).unwrap().bytes().to_vec()).collect::<Vec<_>>();
    a.shape() == b.shape() && a.dtype() == b.dtype() && matrices(a) == matrices(b)
}
