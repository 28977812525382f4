//! Attention with 16 query heads over 2 KV heads of 256 channels: decode over a long cache, prefill of a short text and
//! the last 16 queries of a long one, and the merge of parts.
#![allow(missing_docs)] // criterion_group makes a public function

mod common;

use criterion::{criterion_group, criterion_main, Criterion};
use qwen3next_verify::cases::attention::KvType;
use qwen3next_verify::timed::attention::{Attention, Merge, Sizes};

fn bench(c: &mut Criterion) {
    for &kv in KvType::ALL {
        for (t, s) in [(1, 8192), (128, 512), (16, 8192)] {
            let timed = Attention::new(Sizes { t, s, hq: 16, hkv: 2, d: 256 }, kv).expect("D is whole blocks");
            common::variants(c, &format!("attention/t{t}/s{s}/{kv}"), timed);
        }
    }
    common::variants(c, "attention_merge/t1/parts8", Merge::new(8, 1, 16, 256));
}

criterion_group! {
    name = benches;
    config = common::config();
    targets = bench
}
criterion_main!(benches);
