//! Interleaved rows: every byte where csrc/quant/repack.h says.

use crate::buffer::{zones, Layout};
use crate::case;
use crate::cases::quant::{interleave, Blocks, Type};
use crate::compare::{bytewise, Failure, Metrics};
use crate::guard::Guarded;
use crate::suite::{everywhere, rng, Check, Outcome, Suite};
use proptest::prelude::*;
use qwen3next_kernels::repack::{self, Op};
use qwen3next_kernels::{Exec, Variant};
use rand::Rng as _;

case! {
    /// Groups of rows.
    pub struct Case {
        /// Type of the rows.
        pub dtype: Type,
        /// Groups of 16 rows.
        pub groups: usize,
        /// Blocks a row.
        pub blocks: usize,
        /// Strides of x.
        pub layout: Layout,
    }
}

impl Case {
    fn rows(&self) -> usize {
        16 * self.groups
    }

    fn n(&self) -> usize {
        self.blocks * self.dtype.dtype().block()
    }
}

fn inputs(case: &Case, seed: u64) -> Vec<u8> {
    let mut rng = rng(seed);
    let bytes = case.dtype.dtype().bytes(case.rows() * case.n()).expect("whole blocks");
    (0..bytes).map(|_| rng.random()).collect()
}

fn run(exec: &Exec<Op>, case: &Case, packed: &[u8]) -> Result<Vec<u8>, Failure> {
    const FILL: u8 = 0xa5;
    let x = Blocks::new(packed, case.dtype.dtype(), [case.rows(), case.n()], case.layout);
    let (before, after) = zones(64);
    let mut y = Guarded::filled(before + packed.len() + after, FILL);
    repack::run(repack::Args { y: &mut y[before..before + packed.len()], x: x.view() }, exec)?;
    if y[..before].iter().chain(&y[before + packed.len()..]).any(|&b| b != FILL) {
        return Err(Failure::new("y: wrote outside the array"));
    }
    Ok(y[before..before + packed.len()].to_vec())
}

/// Every byte lies where the layout has it.
fn layout(variant: &Variant<Op>, case: &Case, seed: u64) -> Outcome {
    let x = inputs(case, seed);
    let (want, got) = (interleave(&x, case.dtype.dtype(), case.n()), run(&Exec::variant(*variant), case, &x)?);
    bytewise("y", &got, &want).map(Some)
}

/// Any cut over any number of parts and threads gives the same bytes.
fn cuts(variant: &Variant<Op>, case: &Case, seed: u64) -> Outcome {
    let x = inputs(case, seed);
    let whole = run(&Exec::variant(*variant).parts(1), case, &x)?;
    everywhere(variant, |exec| match run(&exec, case, &x)? == whole {
        true => Ok(()),
        false => Err(Failure::new("a cut makes other bytes")),
    })?;
    Ok(Some(Metrics::default()))
}

/// The block types.
fn types() -> Vec<Type> {
    Type::ALL.iter().copied().filter(|t| t.dtype().block() > 1).collect()
}

/// The suite.
pub struct Repack;

impl Suite for Repack {
    type Op = Op;
    type Case = Case;

    fn grid() -> Vec<Case> {
        let mut grid = Vec::new();
        for (i, dtype) in types().into_iter().enumerate() {
            for (j, (groups, blocks)) in [(0, 1), (1, 0), (1, 1), (1, 2), (2, 3), (3, 8)].into_iter().enumerate() {
                grid.push(Case { dtype, groups, blocks, layout: Layout::ALL[(i + j) % 2] });
            }
        }
        grid
    }

    fn strategy() -> BoxedStrategy<Case> {
        (prop::sample::select(types()), 0usize..5, 0usize..10, prop::sample::select(Layout::ALL))
            .prop_map(|(dtype, groups, blocks, layout)| Case { dtype, groups, blocks, layout })
            .boxed()
    }

    fn checks() -> Vec<Check<Self>> {
        vec![Check { name: "layout", run: layout }, Check { name: "cuts", run: cuts }]
    }
}
