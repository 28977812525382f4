//! The small steps of a layer.

use super::{blocks, reference, Timed, Work, SEED};
use crate::buffer::Layout;
use crate::cases::attention::KvType;
use crate::cases::layer::{self as cases, GateInputs, Logits, Vectors};
use crate::cases::normal;
use crate::cases::quant::Type;
use crate::compare::{Failure, Metrics};
use crate::suite::rng;
use qwen3next_kernels::layer::{add, delta_gates, gather, kv_store, row_gate};
use qwen3next_kernels::{Exec, Variant, View, ViewMut, Weight};

/// Rows of the table that [`Gather`] picks from.
const ROWS: usize = 1024;

/// `t` rows of `n` elements out of 1024.
pub struct Gather {
    dtype: Type,
    shape: [usize; 2],
    table: Vec<u8>,
    ids: Vec<i64>,
    y: Vec<f32>,
}

impl Gather {
    /// Inputs; `n` is a multiple of the type's block.
    pub fn new(t: usize, n: usize, dtype: Type) -> Gather {
        let table = dtype.random(ROWS * n, 1.0, &mut rng(SEED));
        let ids = (0..t).map(|t| (t * 389 % ROWS) as i64).collect();
        Gather { dtype, shape: [t, n], table, ids, y: vec![0.0; t * n] }
    }
}

impl Timed for Gather {
    type Op = gather::Op;

    fn judge(&self, variant: &Variant<gather::Op>) -> Result<Metrics, Failure> {
        let ([t, n], dtype) = (self.shape, self.dtype);
        let (blocks, layout) = (blocks(n, dtype.dtype()), Layout::Packed);
        reference::<cases::GatherSuite>(variant, &cases::Gather { dtype, rows: 9, blocks, t: t.min(64), layout })
    }

    fn run(&mut self, exec: &Exec<gather::Op>) -> Result<(), Failure> {
        let table = Weight::new(&self.table, self.dtype.dtype(), [ROWS, self.shape[1]])?;
        Ok(gather::run(gather::Args { y: ViewMut::new(&mut self.y, self.shape)?, table, ids: &self.ids }, exec)?)
    }

    /// A product and a sum an element.
    fn work(&self) -> Work {
        let read = self.table.len() / ROWS * self.ids.len();
        Work { ops: 2.0 * self.y.len() as f64, bytes: (read + 4 * self.y.len()) as f64 }
    }

    fn output(&mut self) -> &mut [f32] {
        &mut self.y
    }
}

/// y += x for `t` rows of `n`.
pub struct Add {
    shape: [usize; 2],
    x: Vec<f32>,
    y: Vec<f32>,
}

impl Add {
    /// Inputs.
    pub fn new(t: usize, n: usize) -> Add {
        let rng = &mut rng(SEED);
        Add { shape: [t, n], x: (0..t * n).map(|_| normal(rng)).collect(), y: vec![0.0; t * n] }
    }
}

impl Timed for Add {
    type Op = add::Op;

    fn judge(&self, variant: &Variant<add::Op>) -> Result<Metrics, Failure> {
        let [t, n] = self.shape;
        reference::<cases::AddSuite>(variant, &cases::Add { t: t.min(64), n, layout: Layout::Packed })
    }

    fn run(&mut self, exec: &Exec<add::Op>) -> Result<(), Failure> {
        let (y, x) = (ViewMut::new(&mut self.y, self.shape)?, View::new(&self.x, self.shape)?);
        Ok(add::run(add::Args { y, x }, exec)?)
    }

    /// y is read and written.
    fn work(&self) -> Work {
        Work { ops: self.y.len() as f64, bytes: 12.0 * self.y.len() as f64 }
    }

    /// It is an input as well, which nobody may overwrite.
    fn output(&mut self) -> &mut [f32] {
        &mut []
    }
}

/// Gates of `t` tokens.
pub struct Gates {
    case: cases::Gates,
    inputs: GateInputs,
    g: Vec<f32>,
    beta: Vec<f32>,
}

impl Gates {
    /// Inputs; `hv` is a multiple of `hk`.
    pub fn new(t: usize, hk: usize, hv: usize) -> Gates {
        let case = cases::Gates { t, hk, r: hv / hk.max(1), logits: Logits::Normal, layout: Layout::Packed };
        let inputs = GateInputs::generate(&case, SEED);
        Gates { case, inputs, g: vec![0.0; t * hv], beta: vec![0.0; t * hv] }
    }
}

impl Timed for Gates {
    type Op = delta_gates::Op;

    fn judge(&self, variant: &Variant<delta_gates::Op>) -> Result<Metrics, Failure> {
        reference::<cases::GatesSuite>(variant, &cases::Gates { t: self.case.t.min(64), ..self.case.clone() })
    }

    fn run(&mut self, exec: &Exec<delta_gates::Op>) -> Result<(), Failure> {
        let (t, hv) = (self.case.t, self.inputs.a.len());
        let args = delta_gates::Args {
            g: ViewMut::new(&mut self.g, [t, hv])?,
            beta: ViewMut::new(&mut self.beta, [t, hv])?,
            ba: View::new(&self.inputs.ba, [t, 2 * hv])?,
            a: View::new(&self.inputs.a, [hv])?,
            dt_bias: View::new(&self.inputs.dt_bias, [hv])?,
            k_heads: self.case.hk,
        };
        Ok(delta_gates::run(args, exec)?)
    }

    /// Two exponentials and a logarithm, two sums, a quotient, a sum, a product.
    fn work(&self) -> Work {
        Work { ops: 8.0 * self.g.len() as f64, bytes: 16.0 * self.g.len() as f64 }
    }

    fn output(&mut self) -> &mut [f32] {
        &mut self.g
    }
}

/// `t` rows of `n` into a cache of one sequence.
pub struct Store {
    case: cases::Store,
    x: Vec<f32>,
    pos: Vec<i64>,
    cache: Memory,
}

enum Memory {
    F32(Vec<f32>),
    F16(Vec<half::f16>),
    BF16(Vec<half::bf16>),
    Q8_0(Vec<qwen3next_kernels::attention::Q8_0>),
}

impl Store {
    /// Inputs; for q8_0 `n` is a multiple of 32.
    pub fn new(t: usize, n: usize, kv: KvType) -> Store {
        let rng = &mut rng(SEED);
        let cache = match kv {
            KvType::F32 => Memory::F32(vec![0.0; t * n]),
            KvType::F16 => Memory::F16(vec![half::f16::ZERO; t * n]),
            KvType::BF16 => Memory::BF16(vec![half::bf16::ZERO; t * n]),
            KvType::Q8_0 => Memory::Q8_0(vec![[0; 34]; t * n / 32]),
        };
        let case = cases::Store { kv, batch: 1, t, s: t, n, layout: Layout::Packed };
        Store { case, x: (0..t * n).map(|_| normal(rng)).collect(), pos: (0..t as i64).collect(), cache }
    }
}

impl Timed for Store {
    type Op = kv_store::Op;

    fn judge(&self, variant: &Variant<kv_store::Op>) -> Result<Metrics, Failure> {
        let t = self.case.t.min(64);
        reference::<cases::StoreSuite>(variant, &cases::Store { t, s: 2 * t, ..self.case.clone() })
    }

    fn run(&mut self, exec: &Exec<kv_store::Op>) -> Result<(), Failure> {
        let (t, n) = (self.case.t, self.case.n);
        let args = kv_store::Args {
            cache: match &mut self.cache {
                Memory::F32(rows) => kv_store::Cache::F32(ViewMut::new(rows, [1, t, n])?),
                Memory::F16(rows) => kv_store::Cache::F16(ViewMut::new(rows, [1, t, n])?),
                Memory::BF16(rows) => kv_store::Cache::BF16(ViewMut::new(rows, [1, t, n])?),
                Memory::Q8_0(rows) => kv_store::Cache::Q8_0(ViewMut::new(rows, [1, t, n / 32])?),
            },
            x: View::new(&self.x, [t, n])?,
            slot: &[0],
            pos: &self.pos,
            cu_seqlens: &[0, t as i64],
        };
        Ok(kv_store::run(args, exec)?)
    }

    /// A comparison, a product and a rounding an element.
    fn work(&self) -> Work {
        let written = match &self.cache {
            Memory::F32(rows) => size_of_val(&rows[..]),
            Memory::F16(rows) => size_of_val(&rows[..]),
            Memory::BF16(rows) => size_of_val(&rows[..]),
            Memory::Q8_0(rows) => size_of_val(&rows[..]),
        };
        Work { ops: 3.0 * self.x.len() as f64, bytes: (4 * self.x.len() + written) as f64 }
    }

    fn output(&mut self) -> &mut [f32] {
        match &mut self.cache {
            Memory::F32(rows) => rows,
            _ => &mut [],
        }
    }
}

/// Gates of `t` rows of `d`.
pub struct Gate {
    case: cases::Gate,
    inputs: Vectors,
    y: Vec<f32>,
}

impl Gate {
    /// Inputs.
    pub fn new(t: usize, d: usize) -> Gate {
        let case = cases::Gate { t, d, size: 1.0, layout: Layout::Packed };
        Gate { inputs: Vectors::generate(&case, SEED), case, y: vec![0.0; t] }
    }
}

impl Timed for Gate {
    type Op = row_gate::Op;

    fn judge(&self, variant: &Variant<row_gate::Op>) -> Result<Metrics, Failure> {
        reference::<cases::GateSuite>(variant, &cases::Gate { t: self.case.t.min(64), ..self.case.clone() })
    }

    fn run(&mut self, exec: &Exec<row_gate::Op>) -> Result<(), Failure> {
        let (t, d) = (self.case.t, self.case.d);
        let args = row_gate::Args {
            y: ViewMut::new(&mut self.y, [t])?,
            x: View::new(&self.inputs.x, [t, d])?,
            w: View::new(&self.inputs.w, [d])?,
        };
        Ok(row_gate::run(args, exec)?)
    }

    /// A product and a sum an element.
    fn work(&self) -> Work {
        Work {
            ops: 2.0 * self.inputs.x.len() as f64,
            bytes: 4.0 * (self.inputs.x.len() + self.case.d + self.case.t) as f64,
        }
    }

    fn output(&mut self) -> &mut [f32] {
        &mut self.y
    }
}
