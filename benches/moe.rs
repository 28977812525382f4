//! The steps of a feed-forward of Qwen3-Next's expert shape, top 10, for one token and a batch: routing and grouping
//! over 512 experts, up and down over 64.
#![allow(missing_docs)] // criterion_group makes a public function

mod common;

use criterion::{criterion_group, criterion_main, Criterion};
use qwen3next_verify::cases::quant::{Form, Type};
use qwen3next_verify::timed::moe::{Down, Group, Route, Sizes, Up};

fn bench(c: &mut Criterion) {
    for t in [1, 64] {
        let all = Sizes { t, e: 512, top_k: 10, d: 2048, f: 512 };
        common::variants(c, &format!("moe_route/512/top10/t{t}"), Route::new(all));
        common::variants(c, &format!("moe_group/512/top10/t{t}"), Group::new(all));
        let some = Sizes { e: 64, ..all };
        for dtype in [Type::Q4K, Type::Q8] {
            common::variants(
                c,
                &format!("moe_up/64x512x2048/top10/t{t}/{dtype}"),
                Up::new(some, dtype, Form::Q8R16).expect("whole blocks"),
            );
            common::variants(
                c,
                &format!("moe_down/64x512x2048/top10/t{t}/{dtype}"),
                Down::new(some, dtype, Form::Q8R16).expect("whole blocks"),
            );
        }
    }
}

criterion_group! {
    name = benches;
    config = common::config();
    targets = bench
}
criterion_main!(benches);
