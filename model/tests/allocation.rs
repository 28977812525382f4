//! A warm step takes no fresh memory for its activations, its routing or its logits: what it asks of the allocator are
//! short lists of sequences and of attention's parts.

use qwen3next_model::forward::{Activations, Options};
use qwen3next_model::{embedded, Batch, Model, State};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

struct Counting;

static BYTES: AtomicUsize = AtomicUsize::new(0);
static LARGEST: AtomicUsize = AtomicUsize::new(0);

impl Counting {
    fn count(size: usize) {
        BYTES.fetch_add(size, Ordering::Relaxed);
        LARGEST.fetch_max(size, Ordering::Relaxed);
    }
}

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Counting::count(layout.size());
        // SAFETY: the caller's layout.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: a pointer of `alloc` and its layout.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        Counting::count(size);
        // SAFETY: a pointer of `alloc`, its layout and the caller's size.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes that one call of `forward_each` asks for, and the largest piece.
fn asked(model: &Model, state: &mut State, tokens: &[u32], options: &Options) -> (usize, usize) {
    let batch = Batch::one(0, tokens);
    BYTES.store(0, Ordering::Relaxed);
    LARGEST.store(0, Ordering::Relaxed);
    let mut rows = 0;
    model
        .forward_each(state, &batch, options, |logits| {
            rows += logits.len() / model.config().vocab;
            Ok::<(), qwen3next_model::Error>(())
        })
        .unwrap();
    assert_eq!(rows, 1);
    (BYTES.load(Ordering::Relaxed), LARGEST.load(Ordering::Relaxed))
}

#[test]
fn a_warm_step_takes_no_memory_that_grows() {
    // On a thread of the pool: handing work over from outside it costs a node of a queue now and then.
    rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap().install(warm_steps);
}

fn warm_steps() {
    let loaded = embedded::load().unwrap();
    let model = Model::new(loaded.config, loaded.weights);
    for activations in [Activations::F32, Activations::Q8] {
        let options = Options { activations, ..Options::default() };
        // Attention is cut over its keys from 512 on.
        for context in [8, 1400] {
            let mut state = State::new(model.config(), 1, 2048).unwrap();
            let prompt: Vec<u32> = (0..context).map(|i| i % 200 + 5).collect();
            asked(&model, &mut state, &prompt, &options);
            for i in 0..20 {
                asked(&model, &mut state, &[7 + i], &options);
            }
            let (bytes, largest) = asked(&model, &mut state, &[9], &options);
            println!("{activations:?}, {context} tokens: {bytes} bytes, at most {largest} at once");
            // A row of logits is 1280 bytes, the activations of a layer several KB.
            assert!(largest < 1024, "{largest} bytes at once in {activations:?}, {context}");
            assert!(bytes < 4096, "{bytes} bytes in {activations:?} after {context} tokens");
        }
    }
}
