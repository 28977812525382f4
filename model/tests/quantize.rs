//! Requantised models: every type, what stays as it was, what is refused. (The golden models: tests/golden.rs.)

mod common;

use common::{data, open, small, Folder, Small, HIDDEN};
use qwen3next_kernels::quant::to_floats;
use qwen3next_kernels::{DType, Weight};
use qwen3next_model::file::Options;
use qwen3next_model::gguf::{Gguf, Put, Writer};
use qwen3next_model::quantize::{quantize, Types};
use qwen3next_model::synth::{synth, Synth};
use qwen3next_model::{Error, Loaded, Tensor};

fn matrix(loaded: &Loaded, name: &str) -> Tensor {
    match name {
        "token_embd" => loaded.weights.token_embd.clone(),
        _ => loaded.weights.output.clone(),
    }
}

fn numbers(tensor: &Tensor) -> Vec<f32> {
    to_floats(Weight::new(tensor.bytes(), tensor.dtype(), [tensor.rows(), tensor.cols()]).unwrap()).unwrap()
}

#[test]
fn every_type_is_written_and_as_near_as_it_reports() {
    let folder = Folder::new();
    let (from, to) = (folder.file("from.gguf"), folder.file("to.gguf"));
    synth(&from, &Synth { layers: 1, quant: DType::F32, tiny: true, ..Synth::default() }, &mut |_| {}).unwrap();
    let before = open(&from).unwrap();
    for dtype in DType::ALL {
        let (mut last, mut total) = (0, 0);
        let report = quantize(&from, &to, Types::all(dtype), &mut |p| (last, total) = (p.done, p.total)).unwrap();
        assert!(report.warnings.is_empty() && last == total && total > 0, "{dtype}: {:?}", report.warnings);
        let after = open(&to).unwrap();
        let (mut squares, mut errors) = (0.0, 0.0);
        for name in ["token_embd", "output"] {
            assert_eq!(matrix(&after, name).dtype(), dtype);
            for (x, y) in numbers(&matrix(&before, name)).iter().zip(numbers(&matrix(&after, name))) {
                squares += f64::from(*x).powi(2);
                errors += (f64::from(*x) - f64::from(y)).powi(2);
            }
        }
        let (seen, told) = ((errors / squares).sqrt(), report.types[dtype.name()].relative_error());
        assert!((seen - told).abs() <= 0.03 * told, "{dtype}: {seen} seen, {told} reported");
        // Measured on Gaussian rows (csrc/quant/README.md), and a little room.
        let most = match dtype.name() {
            "f32" => 0.0,
            "f16" => 2.2e-4,
            "bf16" => 1.8e-3,
            "q8_0" => 5.5e-3,
            "q4_0" => 0.088,
            "q4_1" => 0.080,
            "q5_0" => 0.044,
            "q5_1" => 0.039,
            "q2_k" => 0.266,
            "q3_k" => 0.147,
            "q4_k" => 0.0713,
            "q5_k" => 0.0352,
            "q6_k" => 0.0177,
            "iq4_nl" => 0.0750,
            "iq4_xs" => 0.0762,
            "mxfp4" => 0.118,
            other => panic!("{other}"),
        };
        assert!(told <= most, "{dtype}: {told}, expected at most {most}");
        for tensor in &after.metadata.tensors {
            let own = before.metadata.tensors.iter().find(|t| t.name == tensor.name).unwrap();
            assert_eq!(tensor.shape, own.shape);
            let small =
                tensor.shape.len() < 2 || tensor.name.contains("ffn_gate_inp") || tensor.name.contains("conv1d");
            assert_eq!(tensor.dtype, if small { "F32".into() } else { dtype.name().to_uppercase() }, "{}", tensor.name);
        }
        assert_eq!(after.config, before.config);
    }
}

/// Rows of 32 and 64 hold no super-block, rows of 24 no block at all: llama.cpp's substitutes, one line a row length.
#[test]
fn rows_that_a_type_cannot_hold_get_another() {
    let folder = Folder::new();
    let (from, to) = (folder.file("from.gguf"), folder.file("to.gguf"));
    small(DType::F32).write(&from);
    for (asked, got) in [
        (DType::Q2_K, DType::IQ4_NL),
        (DType::Q3_K, DType::IQ4_NL),
        (DType::IQ4_XS, DType::IQ4_NL),
        (DType::Q4_K, DType::Q5_0),
        (DType::Q5_K, DType::Q5_1),
        (DType::Q6_K, DType::Q8_0),
    ] {
        let report = quantize(&from, &to, Types::all(asked), &mut |_| ()).unwrap();
        assert_eq!(open(&to).unwrap().weights.output.dtype(), got);
        let [short, long] = &report.warnings[..] else { panic!("{:?}", report.warnings) };
        let parts =
            [(short, "rows of 32"), (short, "token_embd.weight and"), (long, "blk.1.attn_output.weight: rows of 64")];
        for (warning, part) in parts {
            assert!([part, asked.name(), got.name()].iter().all(|p| warning.contains(p)), "{warning}");
        }
    }
    let mut odd = small(DType::F32);
    for i in 0..2 {
        for (part, shape) in [("gate", [24, HIDDEN]), ("up", [24, HIDDEN]), ("down", [HIDDEN, 24])] {
            let name = format!("blk.{i}.ffn_{part}_shexp.weight");
            odd.without(&name).with(&name, DType::F32, &shape);
        }
    }
    odd.set("qwen3next.expert_shared_feed_forward_length", Put::U32(24)).write(&from);
    let report = quantize(&from, &to, Types::all(DType::Q8_0), &mut |_| ()).unwrap();
    assert_eq!((report.types["f16"].tensors, report.warnings.len()), (2, 1));
    open(&to).unwrap();
}

/// Every kind of value, byte for byte, in the order of the file; what says how the file is stored is its own.
#[test]
fn keys_are_kept() {
    let folder = Folder::new();
    let (from, to) = (folder.file("from.gguf"), folder.file("to.gguf"));
    let mut model = small(DType::F16);
    let nested: Vec<u8> = [
        9u32.to_le_bytes().to_vec(),
        1u64.to_le_bytes().to_vec(),
        1u32.to_le_bytes().to_vec(),
        2u64.to_le_bytes().to_vec(),
        vec![7, 255],
    ]
    .concat();
    let raw = [
        (0, vec![200]),
        (1, vec![200]),
        (2, vec![1, 2]),
        (3, vec![255, 255]),
        (5, vec![255; 4]),
        (6, f32::NAN.to_le_bytes().to_vec()),
        (7, vec![1]),
        (8, [3u64.to_le_bytes().as_slice(), "ä!".as_bytes()].concat()),
        (9, nested),
        (10, u64::MAX.to_le_bytes().to_vec()),
        (11, i64::MIN.to_le_bytes().to_vec()),
        (12, 0.1f64.to_le_bytes().to_vec()),
    ];
    for (kind, bytes) in &raw {
        model.set(&format!("odd.{kind}"), Put::Raw(*kind, bytes.clone()));
    }
    model.set("general.file_type", Put::U32(1)).set("general.quantization_version", Put::U32(1));
    model.alignment = Some(64);
    model.write(&from);
    quantize(&from, &to, Types::all(DType::Q5_1), &mut |_| ()).unwrap();
    let [a, b] = [&from, &to].map(|path| Gguf::open(path, Options::default()).unwrap());
    let storage = ["general.file_type", "general.quantization_version"];
    let keys = |file: &Gguf| -> Vec<(String, String)> {
        file.keys().filter(|(k, _)| !storage.contains(k)).map(|(k, v)| (k.into(), format!("{v:?}"))).collect()
    };
    assert_eq!(keys(&a), keys(&b));
    let whole = std::fs::read(&to).unwrap();
    for (kind, bytes) in raw {
        let entry = [format!("odd.{kind}").as_bytes(), u32::to_le_bytes(kind).as_slice(), bytes.as_slice()].concat();
        assert!(whole.windows(entry.len()).any(|w| w == entry), "odd.{kind}");
    }
    let stored = storage.map(|key| b.uint(key).unwrap());
    assert_eq!((stored, b.uint("general.alignment").unwrap()), ([Some(9), Some(2)], Some(64)));
    assert!(b.tensors().iter().all(|t| t.start % 64 == 0));
}

/// `model` with the first numbers of one tensor replaced.
fn write_with(model: &Small, path: &std::path::Path, tensor: &str, values: &[f32]) {
    let mut writer = Writer::new("qwen3next");
    for (key, value) in &model.keys {
        writer.put(key, value.clone());
    }
    for (name, dtype, shape) in &model.tensors {
        writer.tensor(name, *dtype, shape);
    }
    let fill = |i: usize, out: &mut dyn std::io::Write| -> Result<(), Error> {
        let mut bytes = data(&writer, i);
        if writer.tensors()[i].0 == tensor {
            values.iter().zip(bytes.chunks_exact_mut(4)).for_each(|(v, to)| to.copy_from_slice(&v.to_le_bytes()));
        }
        out.write_all(&bytes).unwrap();
        Ok(())
    };
    writer.write(path, fill).unwrap();
}

#[test]
fn what_cannot_be_kept_is_refused_and_nothing_is_written() {
    let folder = Folder::new();
    let (from, to) = (folder.file("from.gguf"), folder.file("to.gguf"));
    let model = small(DType::F32);
    let name = "blk.1.attn_k.weight";
    let refuse = |values: &[f32], dtype: DType, what: &str| {
        write_with(&model, &from, name, values);
        let error = quantize(&from, &to, Types::all(dtype), &mut |_| ()).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains(what) && error.lines().count() == 1, "{error}");
        assert_eq!(std::fs::read_dir(&folder.0).unwrap().count(), 1);
    };
    refuse(&[f32::NAN], DType::Q8_0, "NaN");
    refuse(&[0.0, f32::INFINITY], DType::BF16, "infinity");
    refuse(&[1e5], DType::F16, "1e5, which is past the range of f16");
    refuse(&[-1e9], DType::Q5_0, "past the range of q5_0");
    // The range of MXFP4 holds it.
    write_with(&model, &from, name, &[-1e9]);
    quantize(&from, &to, Types::all(DType::MXFP4), &mut |_| ()).unwrap();
    let alien = folder.file("alien.gguf");
    Writer::new("llama").write(&alien, |_, _| Ok(())).unwrap();
    let error = quantize(&alien, &folder.file("no.gguf"), Types::all(DType::Q8_0), &mut |_| ()).unwrap_err();
    assert!(error.to_string().contains("qwen3next"), "{error}");
}
