//! A feed-forward whose routed experts lie in the CPU's memory. Router and shared expert are the device's. Either the CPU
//! computes the chosen experts while the device computes the shared one, or, for ubatches of many tokens, the experts are
//! copied to the device and computed there ([`crate::streaming`]).

use crate::config::Config;
use crate::device_layers::{self, Input};
use crate::error::Error;
use crate::moe_layer;
use crate::offload::Split;
use crate::streaming::Streaming;
use crate::ubatch::{Buffers, Packed};
use crate::weights::{Moe, Tensor};
use qwen3next_kernels::device::{Buffer, Cuda, Device, Landing};
use qwen3next_kernels::moe::{self, Routing};
use qwen3next_kernels::Weight;

/// Working memory, kept from one layer to the next.
#[derive(Debug)]
pub(crate) struct Work {
    /// What the CPU learns of a layer: who goes where, and the rows.
    ids: Landing<i32>,
    weights: Landing<f32>,
    normed: Landing<f32>,
    /// Gate, up and down of experts that were copied here, one after the other.
    staged: [Buffer<u8>; 3],
    /// Who goes to which of these.
    routing: Routing<Cuda>,
}

impl Work {
    pub fn new(device: &Device) -> Result<Work, Error> {
        Ok(Work {
            ids: Landing::on(device)?,
            weights: Landing::on(device)?,
            normed: Landing::on(device)?,
            staged: [device.zeros(0)?, device.zeros(0)?, device.zeros(0)?],
            routing: Routing::on(device)?,
        })
    }
}

/// `moe_layer::add`: x += ffn(normed). What was normed is overwritten.
#[allow(clippy::too_many_arguments)]
pub(crate) fn add(
    config: &Config,
    here: &Split,
    w: &Moe,
    streaming: Streaming,
    packed: &Packed,
    normed: &mut Buffer<f32>,
    (work, buffers): (&mut device_layers::Work, &mut Buffers),
    x: &mut Buffer<f32>,
) -> Result<(), Error> {
    let (t, width, pairs) = (packed.tokens, config.hidden, packed.tokens * config.moe.top_k);
    let room = streaming.staged(&config.moe, width, expert_bytes(w), t);
    let shared = here.shared.iter().flat_map(|(s, _)| [s.gate.dtype(), s.up.dtype()]);
    let own = [w.gate.dtype(), w.up.dtype()].into_iter().filter(|_| room > 0);
    let dtypes = own.chain([here.router.dtype()]).chain(shared);
    let input = Input::of(normed.view([t, width])?, packed.quantize, dtypes, work)?;
    device_layers::route(config, &here.router, &input, work)?;
    let device_layers::Work { routing, experts, stream, .. } = work;
    stream.land(routing.ids(), pairs, &mut experts.ids)?;
    if let Some(weights) = routing.weights() {
        stream.land(weights, pairs, &mut experts.weights)?;
    }
    if room > 0 {
        stage(config, w, streaming, room, &input, work, x)?;
    } else {
        stream.land(normed, t * width, &mut experts.normed)?;
    }
    // Queued before anyone waits for what has landed.
    if let Some(shared) = &here.shared {
        device_layers::add_shared(shared, &input, work, x)?;
    }
    input.give(work);
    if room == 0 {
        let (ids, weights) = (work.experts.ids.wait()?.to_vec(), work.experts.weights.wait()?.to_vec());
        let routing = Routing::from_ids(config.moe.experts, config.moe.top_k, ids, Some(weights))?;
        let mut sum = buffers.take(t * width);
        sum.fill(0.0);
        moe_layer::add_routed(w, &routing, packed.quantize, work.experts.normed.wait()?, buffers, &mut sum)?;
        normed.write_at(0, &sum)?;
        buffers.give(sum);
        device_layers::add_rows(x, normed, [t, width], &work.stream)?;
    }
    Ok(())
}

/// Bytes of one expert.
pub(crate) fn expert_bytes(w: &Moe) -> u64 {
    [&w.gate, &w.up, &w.down].into_iter().map(|w| (w.rows() * w.row_bytes()) as u64).sum()
}

/// x += routed experts(input), which are copied to the device.
fn stage(
    config: &Config,
    w: &Moe,
    streaming: Streaming,
    room: usize,
    input: &Input,
    work: &mut device_layers::Work,
    x: &mut Buffer<f32>,
) -> Result<(), Error> {
    let device_layers::Work { experts: Work { ids, weights, staged, routing, .. }, stream, hidden, .. } = work;
    let (active, ids) = match streaming.only_active {
        true => renumbered(ids.wait()?, config.moe.experts)?,
        false => ((0..config.moe.experts).collect(), ids.wait()?.to_vec()),
    };
    for (to, w) in staged.iter_mut().zip([&w.gate, &w.up, &w.down]) {
        copy(to, w, &active, room)?;
    }
    let host = Routing::from_ids(active.len(), config.moe.top_k, ids, Some(weights.wait()?.to_vec()))?;
    *routing = Routing::upload(stream.device(), &host)?;
    let experts = |i: usize, w: &Tensor| -> Result<Weight<'_, 3, Cuda>, Error> {
        Ok(staged[i].weight(w.dtype(), [active.len(), w.rows(), w.cols()])?)
    };
    let args = moe::Args {
        y: x.view_mut([host.tokens(), config.hidden])?,
        x: input.rows_for([w.gate.dtype(), w.up.dtype()].into_iter()),
        gate: experts(0, &w.gate)?,
        up: experts(1, &w.up)?,
        down: experts(2, &w.down)?,
        routing,
        accumulate: true,
        h: hidden,
    };
    Ok(moe::queue(args, stream)?)
}

/// The experts that come in `ids`, ascending, and for each id its place among them. Error: an id that is no expert's.
fn renumbered(ids: &[i32], experts: usize) -> Result<(Vec<usize>, Vec<i32>), Error> {
    let mut place = vec![-1; experts];
    for &id in ids {
        let known = usize::try_from(id).ok().and_then(|id| place.get_mut(id));
        *known.ok_or_else(|| Error::argument("ids", format!("hold {id}, expected less than {experts}")))? = 0;
    }
    let active: Vec<usize> = (0..experts).filter(|&e| place[e] == 0).collect();
    active.iter().zip(0..).for_each(|(&e, i)| place[e] = i);
    Ok((active, ids.iter().map(|&id| place[id as usize]).collect()))
}

/// Copies these experts, ascending, to the front of a buffer with room for `room` of them.
fn copy(to: &mut Buffer<u8>, w: &Tensor, active: &[usize], room: usize) -> Result<(), Error> {
    let matrix = w.rows() * w.row_bytes();
    let stride = w.dtype().bytes(w.expert_stride()).unwrap_or(0);
    to.reserve(room * matrix)?;
    let mut at = 0;
    for run in active.chunk_by(|a, b| a + 1 == *b && stride == matrix) {
        let (from, bytes) = (run[0] * stride, run.len() * matrix);
        to.write_at(at, w.bytes().get(from..from + bytes).unwrap_or(&[]))?;
        at += bytes;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::renumbered;

    #[test]
    fn ids_are_places_among_the_active() {
        assert_eq!(renumbered(&[5, 2, 5, 7], 9).unwrap(), (vec![2, 5, 7], vec![1, 0, 1, 2]));
        assert_eq!(renumbered(&[], 3).unwrap(), (vec![], vec![]));
        for id in [-1, 3] {
            let why = renumbered(&[0, id], 3).unwrap_err().to_string();
            assert!(why.contains(&format!("hold {id}")), "{why}");
        }
    }
}
