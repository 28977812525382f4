//! The memory that a forward pass takes of a device beside weights and states: what `device_layers::Work` holds after a
//! ubatch, reckoned by taking and giving the same buffers in the same order.

use crate::memory::{Layer, Sizes, Use};
use qwen3next_kernels::DType;
use qwen3next_model::config::Config;

/// Bytes on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Working {
    /// Activations, routings, indices.
    pub activations: u64,
    /// What the logits take beyond that.
    pub logits: u64,
    /// What kernels keep between their steps.
    pub scratch: u64,
    /// Room for experts that are copied from the CPU's memory.
    pub staged: u64,
}

/// As `Work`: free buffers, which are lent, and what is kept beside them.
#[derive(Default, Clone)]
struct Pool {
    /// Floats of each free buffer.
    free: Vec<usize>,
    /// Bytes of free quantised rows.
    rows: Vec<u64>,
    /// Hidden activations, in f32 and quantised.
    hidden: [u64; 2],
    /// Routings: of routed experts, of the shared one, of a dense feed-forward, of staged experts.
    routings: [u64; 4],
    staged: [u64; 3],
    scratch: u64,
}

fn grow(to: &mut u64, bytes: u64) {
    *to = (*to).max(bytes);
}

/// Bytes of rows as `activations::Q8` has them.
fn quantised(dtype: DType, rows: usize, cols: usize) -> u64 {
    dtype.activations().bytes(rows * cols).unwrap_or(0) as u64
}

impl Pool {
    /// The smallest that is large enough, else the largest, which grows.
    fn take(&mut self, n: usize) -> usize {
        let fits = (0..self.free.len()).filter(|&i| self.free[i] >= n).min_by_key(|&i| self.free[i]);
        let best = fits.or_else(|| (0..self.free.len()).max_by_key(|&i| self.free[i]));
        best.map_or(0, |i| self.free.swap_remove(i)).max(n)
    }

    fn take_all<const N: usize>(&mut self, sizes: [usize; N]) -> [usize; N] {
        sizes.map(|n| self.take(n))
    }

    /// Rows of an input, quantised once for each type that the weights want.
    fn input(
        &mut self,
        quantize: bool,
        [rows, cols]: [usize; 2],
        weights: impl IntoIterator<Item = DType>,
    ) -> Vec<u64> {
        let mut types: Vec<DType> = Vec::new();
        let mut taken = Vec::new();
        for dtype in weights {
            let wanted = dtype.activations();
            if quantize && wanted != DType::F32 && !types.contains(&wanted) {
                types.push(wanted);
                taken.push(self.rows.pop().unwrap_or(0).max(quantised(dtype, rows, cols)));
            }
        }
        taken
    }

    /// x += W y.
    fn project_back(&mut self, quantize: bool, t: usize, dtype: DType, [rows, cols]: [usize; 2]) {
        let input = self.input(quantize, [t, cols], [dtype]);
        let out = self.take(t * rows);
        self.rows.extend(input.into_iter().rev());
        self.free.push(out);
    }

    /// Experts of width `ff` on `t` tokens with so many choices each.
    fn feed(&mut self, quantize: bool, config: &Config, of: [usize; 4], [gate, up, down]: [DType; 3]) {
        let [t, experts, top_k, ff] = of;
        let pairs = t * top_k;
        grow(&mut self.hidden[0], 4 * (pairs * ff) as u64);
        let together = gate.activations() == up.activations() && gate.activations() != DType::F32;
        if quantize && together && down.activations() != DType::F32 {
            grow(&mut self.hidden[1], quantised(down, pairs, ff));
        }
        grow(&mut self.scratch, experts_scratch(of, config.hidden));
        grow(&mut self.scratch, group_scratch(pairs, experts));
    }

    fn mixer(&mut self, config: &Config, layer: &Layer, of: &Use, t: usize) {
        let (e, a, d) = (config.hidden, &config.attention, &config.delta);
        let input = self.input(of.quantize, [t, e], layer.mixer_types.iter().copied());
        let (held, width) = if layer.attention {
            let (heads, keys) = (a.heads * a.head_dim, a.kv_heads * a.head_dim);
            let mut held = self.take_all([t * 2 * heads, t * keys, t * keys]).to_vec();
            self.rows.extend(input.into_iter().rev());
            held.push(self.take(t * heads));
            grow(&mut self.scratch, attention_scratch(config, of, t));
            (held, heads)
        } else {
            let (channels, values, heads) = (d.conv_channels(), d.value_channels(), d.v_heads);
            let mut held = self.take_all([t * channels, t * values, t * 2 * heads]).to_vec();
            self.rows.extend(input.into_iter().rev());
            // Two that hold something only where a history is kept.
            held.extend(self.take_all([t * channels, 0, t * heads, t * heads, t * values, 0]));
            (held, values)
        };
        self.project_back(of.quantize, t, layer.out_type, [e, width]);
        self.free.extend(held);
    }

    fn ffn(&mut self, config: &Config, layer: &Layer, of: &Use, t: usize, at_cpu: bool) {
        let (e, m) = (config.hidden, &config.moe);
        let [gate, up, down] = layer.expert_types;
        let Some(router) = layer.router else {
            let input = self.input(of.quantize, [t, e], [gate, up]);
            grow(&mut self.routings[2], (12 * t + 16) as u64);
            self.feed(of.quantize, config, [t, 1, 1, config.dense_ff], layer.expert_types);
            return self.rows.extend(input.into_iter().rev());
        };
        let pairs = t * m.top_k;
        let expert_bytes = layer.experts / m.experts.max(1) as u64;
        let room = if at_cpu { of.streaming.staged(m, e, expert_bytes, t) } else { 0 };
        let own = [gate, up].into_iter().filter(|_| !at_cpu || room > 0);
        let shared = layer.shared.iter().flat_map(|s| [s[0], s[1]]);
        let input = self.input(of.quantize, [t, e], own.chain([router]).chain(shared));
        let logits = self.take(t * m.experts);
        self.free.push(logits);
        grow(&mut self.routings[0], (16 * pairs + 8 * (m.experts + 1)) as u64);
        grow(&mut self.scratch, group_scratch(pairs, m.experts));
        if room > 0 {
            for (staged, dtype) in self.staged.iter_mut().zip([gate, up, down]) {
                grow(staged, dtype.bytes(room * m.ff * e).unwrap_or(0) as u64);
            }
            grow(&mut self.routings[3], (16 * pairs + 8 * (room + 1)) as u64);
        }
        if !at_cpu || room > 0 {
            self.feed(
                of.quantize,
                config,
                [t, if at_cpu { room } else { m.experts }, m.top_k, m.ff],
                layer.expert_types,
            );
        }
        if let Some(types) = layer.shared {
            grow(&mut self.routings[1], (16 * t + 16) as u64);
            self.feed(of.quantize, config, [t, 1, 1, m.shared_ff], types);
        }
        self.rows.extend(input.into_iter().rev());
    }

    /// One ubatch through the layers on the device.
    fn ubatch(&mut self, sizes: &Sizes, config: &Config, of: &Use, n_cpu_moe: usize, t: usize, logits: usize) {
        let (e, vocab) = (config.hidden, config.vocab);
        let [there, normed] = self.take_all([t * e; 2]);
        for (i, layer) in sizes.layers.iter().enumerate().skip(of.first_on_gpu(sizes)) {
            self.mixer(config, layer, of, t);
            self.ffn(config, layer, of, t, i < n_cpu_moe);
        }
        if logits > 0 && of.output_on_gpu(sizes) {
            let held = self.take_all([logits * e, logits * e, logits * vocab]);
            let input = self.input(of.quantize, [logits, e], [sizes.output_type]);
            self.rows.extend(input.into_iter().rev());
            self.free.extend(held);
        }
        self.free.extend([there, normed]);
    }

    fn activations(&self) -> u64 {
        4 * self.free.iter().sum::<usize>() as u64
            + self.rows.iter().chain(&self.hidden).chain(&self.routings).sum::<u64>()
    }
}

impl Working {
    /// After a prompt in ubatches, of which one yields `of.logits` rows of logits, and a token.
    pub fn of(sizes: &Sizes, config: &Config, of: &Use, n_cpu_moe: usize) -> Working {
        if of.first_on_gpu(sizes) >= sizes.layers.len() && !of.output_on_gpu(sizes) {
            return Working::default();
        }
        let t = of.ubatch.min(of.context).max(1);
        let run = |logits: usize| {
            let mut pool = Pool::default();
            for (t, logits) in [(t, logits), (1, logits.min(1))] {
                pool.ubatch(sizes, config, of, n_cpu_moe, t, logits);
            }
            pool
        };
        let (with, without) = (run(of.logits), run(0));
        // Starts, slot and length of a sequence, positions, wanted rows: each from a multiple of 256 bytes on.
        let indices = 8 * (3 * 32 + t.next_multiple_of(32) + of.logits.next_multiple_of(32)) as u64;
        Working {
            activations: without.activations() + indices,
            logits: with.activations() - without.activations(),
            scratch: with.scratch,
            staged: with.staged.iter().sum(),
        }
    }
}

/// `moe.cu`: the counts of many runs.
fn group_scratch(pairs: usize, experts: usize) -> u64 {
    let runs = match pairs <= 1024 && experts <= 8192 {
        true => 0,
        false => (pairs / 256).min((1 << 20) / experts.max(1024)).max(1),
    };
    (64 + 8 * runs * (1 + experts)) as u64
}

/// `moe_experts.cu`: the list of tiles, and a pair's dots with rows of down.
fn experts_scratch([t, experts, top_k, _]: [usize; 4], hidden: usize) -> u64 {
    if t <= 8 && experts <= 4096 && top_k <= 64 {
        return 0;
    }
    let pairs = t * top_k;
    let list = (64 + 16 * (pairs / 8 + experts.min(pairs))).next_multiple_of(64);
    let rows = (64 << 20) / (4 * pairs).max(1) / 64 * 64;
    let rows = if rows < 64 { 64 } else { rows.min(hidden) };
    (list + 4 * pairs * rows) as u64
}

/// `attention.cu`: sums of the parts of a long context, where the blocks alone would not fill a GPU.
fn attention_scratch(config: &Config, of: &Use, t: usize) -> u64 {
    let (a, aligned) = (&config.attention, |bytes: usize| bytes.next_multiple_of(64));
    let (heads, rows) = (a.heads / a.kv_heads.max(1), t * a.heads);
    let tiles = match (t * heads, a.head_dim) {
        (_, 257..) | (..=16, _) => 1,
        (33.., _) if of.cache.k == DType::F16 => 4,
        _ => 2,
    };
    let blocks = (t * heads / (16 * tiles) + 1) * a.kv_heads;
    let segments = of.context.div_ceil(256);
    let split = segments > 1 && blocks < 264 && segments <= (512 << 20) / 4 / rows.max(1) / (a.head_dim + 2);
    match split {
        true => (aligned(segments * rows * a.head_dim * 4) + 2 * aligned(segments * rows * 4)) as u64,
        false => 0,
    }
}
