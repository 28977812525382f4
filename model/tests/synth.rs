//! Synthetic models load, in both layouts alike, and their numbers are of the size they claim.

mod common;

use common::{open, same, Folder};
use qwen3next_kernels::quant::dequantize;
use qwen3next_kernels::{DType, Exec, ViewMut, Weight};
use qwen3next_model::synth::{synth, Synth};
use qwen3next_model::weights::{Ffn, Mixer};
use qwen3next_model::Tensor;

fn written(folder: &Folder, name: &str, what: Synth) -> qwen3next_model::Loaded {
    let mut last = None;
    synth(&folder.file(name), &what, &mut |p| last = Some(p)).unwrap();
    assert!(last.is_some_and(|p| p.done == p.total));
    open(&folder.file(name)).unwrap_or_else(|e| panic!("{e}"))
}

/// All numbers of a weight of any type.
fn numbers(tensor: &Tensor) -> Vec<f32> {
    let shape = [tensor.experts() * tensor.rows(), tensor.cols()];
    let mut values = vec![0.0; shape[0] * shape[1]];
    let y = ViewMut::new(&mut values, shape).unwrap();
    let x = Weight::new(tensor.bytes(), tensor.dtype(), shape).unwrap();
    dequantize::run(dequantize::Args { y, x }, &Exec::default()).unwrap();
    // The loader's own reading of plain types agrees.
    assert!(tensor.to_f32().is_none_or(|own| own == values));
    values
}

#[test]
fn every_type_loads_and_spreads_as_it_should() {
    let folder = Folder::new();
    for quant in DType::ALL {
        let model = written(&folder, "m.gguf", Synth { quant, tiny: true, ..Synth::default() });
        assert_eq!((model.config.layers.len(), model.config.vocab), (4, 512));
        assert_eq!(model.weights.token_embd.dtype(), quant);
        let Ffn::Moe(moe) = &model.weights.layers[3].ffn else { panic!("a sparse layer") };
        assert_eq!(moe.down.shape(), [16, 256, 256]);
        let values = numbers(&moe.down);
        let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / values.len() as f64;
        let square = values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / values.len() as f64;
        // 2^20 values; those of a block share a scale, so there are 2^15 to 2^16 independent ones.
        let deviation = (square - mean * mean).sqrt();
        assert!((deviation / 0.02 - 1.0).abs() < 0.03, "{quant}: {deviation}");
        // Q4_0 runs from -8 to 7, so its mean is half a step of STD / 4.6 below 0; Q5_0 and IQ4_NL are alike.
        let lopsided = matches!(quant, DType::Q4_0 | DType::Q5_0 | DType::IQ4_NL);
        assert!(mean.abs() < if lopsided { 0.003 } else { 0.0005 }, "{quant}: {mean}");
        for layer in &model.weights.layers {
            if let Mixer::Delta(delta) = &layer.mixer {
                assert!(delta.a.iter().all(|&a| (-7.4..=-1.0).contains(&a)));
            }
        }
        assert!(model.tokenizer.unwrap().encode("any text: ☃\n", true).unwrap().len() == 14);
    }
}

#[test]
fn the_legacy_layout_holds_the_same_model() {
    let folder = Folder::new();
    for quant in [DType::Q4_K, DType::Q8_0, DType::BF16] {
        let what = Synth { quant, tiny: true, layers: 2, ..Synth::default() };
        let current = written(&folder, "c.gguf", what);
        let legacy = written(&folder, "l.gguf", Synth { legacy: true, ..what });
        assert!(legacy.metadata.tensors.iter().any(|t| t.name == "blk.0.ssm_in.weight"));
        assert_eq!(current.config, legacy.config);
        for (a, b) in current.weights.layers.iter().zip(&legacy.weights.layers) {
            let (Mixer::Delta(a), Mixer::Delta(b)) = (&a.mixer, &b.mixer) else { panic!("DeltaNet layers") };
            assert!(same(&a.qkv, &b.qkv) && same(&a.z, &b.z) && same(&a.ba, &b.ba) && a.conv == b.conv);
            assert!(a.qkv.is_mapped() && !b.qkv.is_mapped());
        }
    }
}

#[test]
fn equal_seeds_give_equal_files() {
    let folder = Folder::new();
    let bytes = |name: &str, seed: u64| {
        let what = Synth { tiny: true, layers: 1, seed, ..Synth::default() };
        synth(&folder.file(name), &what, &mut |_| {}).unwrap();
        std::fs::read(folder.file(name)).unwrap()
    };
    let first = bytes("a.gguf", 7);
    assert!(first == bytes("b.gguf", 7));
    assert!(first != bytes("c.gguf", 8));
    assert!(synth(&folder.file("d.gguf"), &Synth { layers: 0, ..Synth::default() }, &mut |_| {}).is_err());
    assert!(synth(&folder.file("no/d.gguf"), &Synth { tiny: true, ..Synth::default() }, &mut |_| {}).is_err());
    assert_eq!(std::fs::read_dir(&folder.0).unwrap().count(), 3);
}
