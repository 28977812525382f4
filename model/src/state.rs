//! What a model remembers of its sequences: KV caches of the attention layers, convolution windows and recurrent
//! states of the DeltaNet layers, for a fixed number of sequence slots.

pub use crate::cache::CacheTypes;
use crate::cache::{Cache, Floats, Rows};
use crate::config::{Config, LayerKind};
use crate::error::Error;
use crate::ubatch::Buffers;
use std::collections::VecDeque;

/// Memory of `slots` sequences of up to `capacity` tokens. All layouts are the kernels': innermost axis last.
#[derive(Debug)]
pub struct State {
    /// A cache or a recurrent state for every layer of the model.
    pub(crate) layers: Vec<LayerState>,
    /// Tokens that each slot has read.
    lengths: Vec<usize>,
    capacity: usize,
    /// How many tokens back a slot can be rolled.
    depth: usize,
    /// For each slot the recurrent states after its last tokens, oldest first; as many as `depth` + 1.
    history: Vec<VecDeque<Checkpoint>>,
    /// Slots whose last batch failed halfway: their layers disagree on how many tokens they have read.
    spoilt: Vec<bool>,
    sizes: Sizes,
    /// Working memory of forward passes, no part of what is remembered.
    pub(crate) buffers: Buffers,
    /// The same for layers on a device.
    #[cfg(feature = "device")]
    pub(crate) work: Option<crate::device_layers::Work>,
    /// The layers from this one on lie there.
    first_on_device: usize,
}

/// The state of one layer.
#[derive(Debug)]
pub(crate) enum LayerState {
    /// `[slots][W-1 window of every channel]` and `[slots][HV][V][K]`.
    Delta { conv: Floats, delta: Floats },
    /// `[slots][capacity][HKV][D]` each.
    Attention { k: Cache, v: Cache },
}

/// Elements of one slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sizes {
    conv: usize,
    delta: usize,
    kv: usize,
    layers: usize,
}

impl Sizes {
    fn of(config: &Config) -> Sizes {
        let (d, a) = (&config.delta, &config.attention);
        Sizes {
            conv: d.conv_channels() * (d.conv_width - 1),
            delta: d.v_heads * d.v_dim * d.k_dim,
            kv: a.kv_heads * a.head_dim,
            layers: config.layers.len(),
        }
    }
}

/// The recurrent part of one slot after `length` tokens: conv then delta state of every DeltaNet layer.
#[derive(Debug, Clone)]
struct Checkpoint {
    length: usize,
    values: Vec<f32>,
}

/// Everything one slot remembers, apart from its slot: can be put back into any slot of a state of the same model.
#[derive(Debug, Clone, PartialEq)]
pub struct Snapshot {
    length: usize,
    layers: Vec<Kept>,
}

/// What a snapshot holds of one layer.
#[derive(Debug, Clone, PartialEq)]
enum Kept {
    /// Conv then delta state.
    Delta(Vec<f32>),
    /// The keys and the values of the snapshot's tokens.
    Attention { k: Rows, v: Rows },
}

impl Snapshot {
    /// Tokens the sequence had read.
    pub fn len(&self) -> usize {
        self.length
    }

    /// No token had been read.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The convolution windows then the recurrent states of a DeltaNet layer.
    pub fn layer(&self, layer: usize) -> Option<&[f32]> {
        match self.layers.get(layer)? {
            Kept::Delta(values) => Some(values),
            Kept::Attention { .. } => None,
        }
    }

    /// As [`Snapshot::layer`], to be changed.
    pub fn layer_mut(&mut self, layer: usize) -> Option<&mut [f32]> {
        match self.layers.get_mut(layer)? {
            Kept::Delta(values) => Some(values),
            Kept::Attention { .. } => None,
        }
    }
}

impl State {
    /// Empty memory for `slots` sequences of up to `capacity` tokens, with f32 caches. Errors where it would not fit an
    /// address space.
    pub fn new(config: &Config, slots: usize, capacity: usize) -> Result<State, Error> {
        State::with_cache(config, slots, capacity, CacheTypes::default())
    }

    /// As [`State::new`], with KV caches of these types. Errors also where attention does not take them.
    pub fn with_cache(config: &Config, slots: usize, capacity: usize, cache: CacheTypes) -> Result<State, Error> {
        cache.expect(config)?;
        let sizes = Sizes::of(config);
        let room = |per_slot: Option<usize>| {
            let n = per_slot.and_then(|n| n.checked_mul(slots)).filter(|&n| n <= isize::MAX as usize / 8);
            n.ok_or_else(|| Error::argument("context", format!("{slots} slots of {capacity} tokens are too large")))
        };
        let floats = |n: usize| {
            let n = room(Some(n))?;
            let bytes = 4 * n;
            Vec::<f32>::new().try_reserve_exact(n).map_err(|_| {
                Error::argument("context", format!("no memory for {bytes} bytes of state in one layer"))
            })?;
            Ok::<_, Error>(vec![0.0f32; n])
        };
        let layers = config
            .layers
            .iter()
            .map(|kind| {
                Ok(match kind {
                    LayerKind::Delta => LayerState::Delta {
                        conv: Floats::Cpu(floats(sizes.conv)?),
                        delta: Floats::Cpu(floats(sizes.delta)?),
                    },
                    LayerKind::Attention => {
                        let n = room(sizes.kv.checked_mul(capacity))?;
                        let (k, v) = (Rows::zeros(cache.k, n)?, Rows::zeros(cache.v, n)?);
                        LayerState::Attention { k: Cache::Cpu(k), v: Cache::Cpu(v) }
                    }
                })
            })
            .collect::<Result<_, Error>>()?;
        Ok(State {
            layers,
            lengths: vec![0; slots],
            capacity,
            depth: 0,
            history: vec![VecDeque::new(); slots],
            spoilt: vec![false; slots],
            sizes,
            buffers: Buffers::default(),
            #[cfg(feature = "device")]
            work: None,
            first_on_device: usize::MAX,
        })
    }

    /// Moves the memory of the layers from `first` on to a device. No sequence has been read yet.
    #[cfg(feature = "device")]
    pub(crate) fn offload(
        &mut self,
        device: &qwen3next_kernels::device::Device,
        first: usize,
        cache: CacheTypes,
    ) -> Result<(), Error> {
        use crate::cache::DeviceRows;
        let (slots, sizes) = (self.slots(), self.sizes);
        for layer in self.layers.iter_mut().skip(first) {
            *layer = match layer {
                LayerState::Delta { .. } => LayerState::Delta {
                    conv: Floats::Cuda(device.zeros(slots * sizes.conv)?),
                    delta: Floats::Cuda(device.zeros(slots * sizes.delta)?),
                },
                LayerState::Attention { .. } => {
                    let n = slots * self.capacity * sizes.kv;
                    LayerState::Attention {
                        k: Cache::Cuda(DeviceRows::zeros(device, cache.k, n)?),
                        v: Cache::Cuda(DeviceRows::zeros(device, cache.v, n)?),
                    }
                }
            };
        }
        self.work = Some(crate::device_layers::Work::new(device)?);
        self.first_on_device = first;
        Ok(())
    }

    /// Lets every slot be rolled back by up to `depth` tokens that are read from now on (0, the default: not at all).
    /// Costs depth + 1 copies of the recurrent state a slot in use.
    pub fn keep_history(&mut self, depth: usize) {
        self.depth = depth;
        self.history.iter_mut().for_each(VecDeque::clear);
    }

    /// Whether steps of a few tokens on a device, where all layers have their experts there, are launched as graphs that
    /// were captured (the default, unless the variable Q3N_CUDA_GRAPHS is 0). The answers are the same, bit for bit.
    #[cfg(feature = "device")]
    pub fn use_graphs(&mut self, on: bool) {
        if let Some(work) = &mut self.work {
            work.graphs.on = on;
        }
    }

    /// Steps that were launched as graphs.
    #[cfg(feature = "device")]
    pub fn graph_launches(&self) -> u64 {
        self.work.as_ref().map_or(0, |work| work.graphs.launches)
    }

    /// Tokens a slot can be rolled back by, at most.
    pub fn depth(&self) -> usize {
        self.depth
    }

    /// Sequence slots.
    pub fn slots(&self) -> usize {
        self.lengths.len()
    }

    /// Tokens a slot can hold.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Tokens that `slot` has read.
    pub fn len(&self, slot: usize) -> Result<usize, Error> {
        self.lengths.get(slot).copied().ok_or_else(|| self.no_slot(slot))
    }

    /// `slot` has read no token.
    pub fn is_empty(&self, slot: usize) -> Result<bool, Error> {
        Ok(self.len(slot)? == 0)
    }

    /// Forgets a sequence.
    pub fn clear(&mut self, slot: usize) -> Result<(), Error> {
        self.len(slot)?;
        self.lengths[slot] = 0;
        self.spoilt[slot] = false;
        self.history[slot].clear();
        for layer in &mut self.layers {
            if let LayerState::Delta { conv, delta } = layer {
                conv.clear(slot, self.sizes.conv)?;
                delta.clear(slot, self.sizes.delta)?;
            }
        }
        Ok(())
    }

    /// Copies what a slot remembers.
    pub fn snapshot(&self, slot: usize) -> Result<Snapshot, Error> {
        let length = self.usable(slot)?;
        let layers = self
            .layers
            .iter()
            .map(|layer| match layer {
                LayerState::Delta { conv, delta } => {
                    let mut values = Vec::with_capacity(self.sizes.conv + self.sizes.delta);
                    conv.part(slot, self.sizes.conv, &mut values)?;
                    delta.part(slot, self.sizes.delta, &mut values)?;
                    Ok(Kept::Delta(values))
                }
                LayerState::Attention { k, v } => {
                    let from = slot * self.capacity * self.sizes.kv;
                    let used = from..from + length * self.sizes.kv;
                    Ok(Kept::Attention { k: k.part(used.clone())?, v: v.part(used)? })
                }
            })
            .collect::<Result<_, Error>>()?;
        Ok(Snapshot { length, layers })
    }

    /// Puts a snapshot into a slot. Errors: more tokens than the capacity, or a snapshot of another model.
    pub fn restore(&mut self, slot: usize, snapshot: &Snapshot) -> Result<(), Error> {
        self.len(slot)?;
        if snapshot.length > self.capacity {
            let why = format!("holds {} tokens, the state has room for {}", snapshot.length, self.capacity);
            return Err(Error::argument("snapshot", why));
        }
        let used = snapshot.length * self.sizes.kv;
        let fits = snapshot.layers.len() == self.sizes.layers
            && self.layers.iter().zip(&snapshot.layers).all(|(layer, kept)| match (layer, kept) {
                (LayerState::Delta { .. }, Kept::Delta(values)) => values.len() == self.sizes.conv + self.sizes.delta,
                (LayerState::Attention { .. }, Kept::Attention { k, v }) => k.len() == used && v.len() == used,
                _ => false,
            });
        if !fits {
            return Err(Error::argument("snapshot", "is of a model of other sizes"));
        }
        let cached = self.layers.iter().zip(&snapshot.layers).all(|(layer, kept)| match (layer, kept) {
            (LayerState::Attention { k, v }, Kept::Attention { k: kept_k, v: kept_v }) => {
                k.same_type(kept_k) && v.same_type(kept_v)
            }
            _ => true,
        });
        if !cached {
            return Err(Error::argument("snapshot", "has caches of another type"));
        }
        for (layer, kept) in self.layers.iter_mut().zip(&snapshot.layers) {
            match (layer, kept) {
                (LayerState::Delta { conv, delta }, Kept::Delta(values)) => {
                    conv.put(slot, &values[..self.sizes.conv])?;
                    delta.put(slot, &values[self.sizes.conv..])?;
                }
                (LayerState::Attention { k, v }, Kept::Attention { k: kept_k, v: kept_v }) => {
                    let from = slot * self.capacity * self.sizes.kv;
                    k.put(from, kept_k)?;
                    v.put(from, kept_v)?;
                }
                _ => unreachable!("kinds were compared"),
            }
        }
        self.lengths[slot] = snapshot.length;
        self.spoilt[slot] = false;
        self.history[slot].clear();
        Ok(())
    }

    /// Bytes of [`State::save`] for a slot that has read so many tokens; `None` where no memory holds them.
    pub(crate) fn saved_bytes(&self, length: usize) -> Option<u64> {
        let elements = length.checked_mul(self.sizes.kv)?;
        self.layers.iter().try_fold(0u64, |sum, layer| {
            let bytes = match layer {
                LayerState::Delta { .. } => 4 * (self.sizes.conv + self.sizes.delta),
                LayerState::Attention { k, v } => k.bytes(elements).checked_add(v.bytes(elements))?,
            };
            sum.checked_add(bytes as u64)
        })
    }

    /// Hands over all that a slot remembers, layer by layer: convolution windows then recurrent states, or keys then
    /// values.
    pub(crate) fn save(&self, slot: usize, to: &mut dyn FnMut(&[u8]) -> Result<(), Error>) -> Result<(), Error> {
        let length = self.usable(slot)?;
        for layer in &self.layers {
            match layer {
                LayerState::Delta { conv, delta } => {
                    conv.save(slot, self.sizes.conv, to)?;
                    delta.save(slot, self.sizes.delta, to)?;
                }
                LayerState::Attention { k, v } => {
                    let from = slot * self.capacity * self.sizes.kv;
                    let used = from..from + length * self.sizes.kv;
                    k.save(used.clone(), to)?;
                    v.save(used, to)?;
                }
            }
        }
        Ok(())
    }

    /// The reverse of [`State::save`] for `length` tokens, at most the capacity. After an error the slot must be cleared.
    pub(crate) fn load(
        &mut self,
        slot: usize,
        length: usize,
        from: &mut dyn FnMut(&mut [u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.clear(slot)?;
        self.expect_room(slot, length)?;
        self.spoilt[slot] = true;
        for layer in &mut self.layers {
            match layer {
                LayerState::Delta { conv, delta } => {
                    conv.load(slot, self.sizes.conv, from)?;
                    delta.load(slot, self.sizes.delta, from)?;
                }
                LayerState::Attention { k, v } => {
                    let first = slot * self.capacity * self.sizes.kv;
                    let used = first..first + length * self.sizes.kv;
                    k.load(used.clone(), from)?;
                    v.load(used, from)?;
                }
            }
        }
        self.lengths[slot] = length;
        self.spoilt[slot] = false;
        Ok(())
    }

    /// Takes back the last `tokens` tokens of a slot: KV length, convolution windows and recurrent states.
    pub fn rollback(&mut self, slot: usize, tokens: usize) -> Result<(), Error> {
        let length = self.usable(slot)?;
        if tokens == 0 {
            return Ok(());
        }
        let target = length.checked_sub(tokens);
        let Some(at) = target.and_then(|t| self.history[slot].iter().position(|c| c.length == t)) else {
            let kept = self.history[slot].front().map_or(0, |c| length - c.length);
            return Err(Error::argument("tokens", format!("is {tokens}, slot {slot} can be rolled back by {kept}")));
        };
        self.history[slot].truncate(at + 1);
        let checkpoint = &self.history[slot][at];
        let mut from = 0;
        for layer in &mut self.layers {
            if let LayerState::Delta { conv, delta } = layer {
                let (c, d) = (self.sizes.conv, self.sizes.delta);
                conv.put(slot, &checkpoint.values[from..from + c])?;
                delta.put(slot, &checkpoint.values[from + c..from + c + d])?;
                from += c + d;
            }
        }
        self.lengths[slot] = checkpoint.length;
        Ok(())
    }

    /// `slot` exists and has room for `tokens` more.
    pub(crate) fn expect_room(&self, slot: usize, tokens: usize) -> Result<(), Error> {
        let length = self.usable(slot)?;
        if tokens > self.capacity - length {
            let why =
                format!("slot {slot} has read {length} tokens, {tokens} more exceed its capacity of {}", self.capacity);
            return Err(Error::argument("tokens", why));
        }
        Ok(())
    }

    /// Before tokens are read into `slot`: remembers where it stands, if it must be able to go back there.
    pub(crate) fn begin(&mut self, slot: usize) -> Result<(), Error> {
        let length = self.lengths[slot];
        if self.depth == 0 || self.history[slot].back().is_some_and(|c| c.length == length) {
            return Ok(());
        }
        let mut values = Vec::new();
        for layer in &self.layers {
            if let LayerState::Delta { conv, delta } = layer {
                conv.part(slot, self.sizes.conv, &mut values)?;
                delta.part(slot, self.sizes.delta, &mut values)?;
            }
        }
        self.history[slot].clear();
        self.history[slot].push_back(Checkpoint { length, values });
        Ok(())
    }

    /// After `slot` has read `tokens` tokens. `steps` holds, for each of them, the recurrent values as in [`Checkpoint`];
    /// empty where no history is kept.
    pub(crate) fn advance(&mut self, slot: usize, tokens: usize, steps: Vec<Vec<f32>>) {
        let length = self.lengths[slot];
        self.lengths[slot] += tokens;
        for (i, values) in steps.into_iter().enumerate() {
            self.history[slot].push_back(Checkpoint { length: length + i + 1, values });
        }
        while self.history[slot].len() > self.depth.saturating_add(1) {
            self.history[slot].pop_front();
        }
    }

    /// The layers of `slot` no longer agree on what was read.
    pub(crate) fn spoil(&mut self, slot: usize) {
        self.spoilt[slot] = true;
    }

    /// This is memory of a model of these sizes.
    pub(crate) fn expect_model(&self, config: &Config, first_on_device: usize) -> Result<(), Error> {
        if self.sizes != Sizes::of(config) {
            return Err(Error::argument("state", "is of a model of other sizes"));
        }
        if self.first_on_device != first_on_device {
            return Err(Error::argument(
                "state",
                "has its layers in other memory than the model: make it by Model::state",
            ));
        }
        Ok(())
    }

    /// Length of a slot whose last batch was read to its end.
    fn usable(&self, slot: usize) -> Result<usize, Error> {
        let length = self.len(slot)?;
        if self.spoilt[slot] {
            return Err(Error::argument("slot", format!("{slot} failed halfway through a batch: clear or restore it")));
        }
        Ok(length)
    }

    fn no_slot(&self, slot: usize) -> Error {
        Error::argument("slot", format!("is {slot}, the state has {}", self.slots()))
    }
}
