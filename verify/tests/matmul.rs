//! Every variant of matmul on every case, and the calls it must refuse.

use qwen3next_kernels::{matmul, DType, Error, Exec, Isa, Operator, View, ViewMut, Weight};
use qwen3next_verify::buffer::Layout;
use qwen3next_verify::cases::matmul::{multiply, Case, Inputs, Matmul, Regime};
use qwen3next_verify::cases::quant::{Form, Type};
use qwen3next_verify::suite::{assert_cases_round_trip, assert_passes, Options};

#[test]
fn every_variant_passes_every_check() {
    assert_passes::<Matmul>(&Options::default());
}

#[test]
fn cases_round_trip() {
    assert_cases_round_trip::<Matmul>();
}

/// Sums over a block are exact integers, and blocks are added in one order (csrc/matmul/q8_tile.h). CUDA cuts K into parts
/// (csrc/matmul/tile.cuh).
#[test]
fn integer_products_give_the_same_bits_on_every_instruction_set() {
    let other_orders = [Isa::SCALAR, Isa::CUDA_HOST];
    let simd: Vec<_> = matmul::Op::variants()
        .into_iter()
        .filter(|v| !other_orders.contains(&v.isa()) && v.isa().available())
        .collect();
    for dtype in [Type::Q4K, Type::Q5K, Type::Q6K, Type::Q8, Type::Q4] {
        for form in [Form::Q8, Form::Q8R16] {
            for m in 1..=13 {
                let case = Case { dtype, m, n: 48, blocks: 9, form, layout: Layout::Packed, regime: Regime::Outlier };
                let inputs = Inputs::generate(&case, m as u64);
                let results: Vec<_> = simd
                    .iter()
                    .map(|v| {
                        multiply(&Exec::variant(*v), &case, &inputs).map(|y| y.into_iter().map(f32::to_bits).collect())
                    })
                    .collect::<Result<Vec<Vec<u32>>, _>>()
                    .unwrap();
                for (variant, result) in simd.iter().zip(&results) {
                    assert_eq!(result, &results[0], "{case}: {} and {}", variant.name(), simd[0].name());
                }
            }
        }
    }
}

#[test]
fn wrong_arguments_are_refused_by_name() {
    let (x, w, mut y) = (vec![0f32; 256], vec![0u8; 34 * 16], vec![0f32; 64]);
    let weight = |n, k| Weight::new(&w, DType::Q8_0, [n, k]);
    let mut call = |y_strides, x_shape, w| {
        let args = matmul::Args {
            y: ViewMut::strided(&mut y, [4, 3], y_strides).unwrap(),
            x: View::new(&x, x_shape).unwrap().into(),
            w,
        };
        matmul::run(args, &Exec::default())
    };
    assert_eq!(call([3, 1], [4, 32], weight(3, 32).unwrap()), Ok(()));
    assert!(matches!(call([3, 1], [3, 32], weight(3, 32).unwrap()), Err(Error::Shape { arg: "x", .. })));
    assert!(matches!(call([3, 1], [4, 32], weight(3, 64).unwrap()), Err(Error::Shape { arg: "w", .. })));
    assert!(matches!(call([3, 1], [4, 32], weight(2, 32).unwrap()), Err(Error::Shape { arg: "w", .. })));
    assert!(call([2, 1], [4, 32], weight(3, 32).unwrap()).unwrap_err().to_string().contains("y: stride"));
    assert!(weight(3, 48).unwrap_err().to_string().contains("block of 32"));
    assert!(weight(17, 32).unwrap_err().to_string().contains("578 bytes, there are 544"));
}
