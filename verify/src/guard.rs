//! Arrays against inaccessible memory: one element too far, read or written, and the process faults at that
//! instruction. Everywhere but on Unix they are plain arrays.

use std::cell::Cell;
use std::ops::{Deref, DerefMut};

crate::choice! {
    /// Where an array lies in its memory.
    pub enum Place {
        /// Its last byte is followed by inaccessible memory.
        End = "end",
        /// Its first byte is preceded by inaccessible memory.
        Start = "start",
    }
}

/// This system can lay arrays against inaccessible memory.
pub const AVAILABLE: bool = cfg!(unix);

thread_local! {
    static PLACE: Cell<Place> = const { Cell::new(Place::End) };
}

/// Where the next arrays of this thread will lie: [`Place::End`] unless [`with`] says otherwise.
pub fn place() -> Place {
    PLACE.get()
}

/// Runs `f` with all arrays that this thread makes at `place`.
pub fn with<R>(place: Place, f: impl FnOnce() -> R) -> R {
    struct Back(Place);
    impl Drop for Back {
        fn drop(&mut self) {
            PLACE.set(self.0);
        }
    }
    let _back = Back(PLACE.replace(place));
    f()
}

/// An array of numbers at the current [`place`]; used as a slice.
pub struct Guarded<T: Copy> {
    memory: memory::Memory<T>,
}

impl<T: Copy> Guarded<T> {
    /// `len` times `value`.
    pub fn filled(len: usize, value: T) -> Self {
        Guarded { memory: memory::Memory::new(len, value, place()) }
    }

    /// A copy.
    pub fn of(values: &[T]) -> Self {
        let Some(&first) = values.first() else {
            return Guarded { memory: memory::Memory::empty() };
        };
        let mut all = Guarded::filled(values.len(), first);
        all.copy_from_slice(values);
        all
    }
}

impl<T: Copy> Deref for Guarded<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        self.memory.slice()
    }
}

impl<T: Copy> DerefMut for Guarded<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        self.memory.slice_mut()
    }
}

impl<T: Copy> Clone for Guarded<T> {
    fn clone(&self) -> Self {
        Guarded::of(self)
    }
}

impl<T: Copy + std::fmt::Debug> std::fmt::Debug for Guarded<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

#[cfg(unix)]
mod memory {
    use super::Place;
    use std::cell::RefCell;
    use std::collections::HashMap;
    use std::ptr::NonNull;

    /// Mappings a thread keeps of each size: making one costs three calls of the system and fresh pages.
    const KEPT: usize = 32;
    /// Larger ones are given back at once.
    const MOST: usize = 1 << 20;

    /// Unused mappings by their size.
    #[derive(Default)]
    struct Free(HashMap<usize, Vec<*mut libc::c_void>>);

    impl Drop for Free {
        fn drop(&mut self) {
            for (bytes, list) in self.0.drain() {
                // SAFETY: mappings of this size that no Memory owns any more.
                list.into_iter().for_each(|base| unsafe {
                    libc::munmap(base, bytes);
                });
            }
        }
    }

    thread_local! {
        static FREE: RefCell<Free> = RefCell::default();
    }

    /// A mapping of this size, its inner pages accessible.
    fn map(bytes: usize, page: usize) -> *mut libc::c_void {
        if let Some(base) = FREE.with(|free| free.borrow_mut().0.get_mut(&bytes)?.pop()) {
            return base;
        }
        // SAFETY: a fresh private mapping of no file, then its inner pages made accessible; failure is checked.
        unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANON;
            let base = libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_NONE, flags, -1, 0);
            assert!(base != libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
            let inner = bytes - 2 * page;
            if inner > 0 {
                let open = libc::mprotect(base.byte_add(page), inner, libc::PROT_READ | libc::PROT_WRITE);
                assert!(open == 0, "mprotect: {}", std::io::Error::last_os_error());
            }
            base
        }
    }

    /// A mapping of whole pages whose first and last are inaccessible.
    pub struct Memory<T> {
        base: *mut libc::c_void,
        bytes: usize,
        first: NonNull<T>,
        len: usize,
    }

    // SAFETY: it owns its pages alone, as a Vec owns its heap memory.
    unsafe impl<T: Send> Send for Memory<T> {}
    // SAFETY: shared references only read.
    unsafe impl<T: Sync> Sync for Memory<T> {}

    impl<T: Copy> Memory<T> {
        pub fn empty() -> Self {
            Memory { base: std::ptr::null_mut(), bytes: 0, first: NonNull::dangling(), len: 0 }
        }

        pub fn new(len: usize, value: T, place: Place) -> Self {
            // SAFETY: sysconf reads a constant of the system.
            let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
            let used = len.checked_mul(size_of::<T>()).expect("an array that fits into memory");
            let inner = used.next_multiple_of(page);
            let bytes = inner + 2 * page;
            assert!(align_of::<T>() <= page);
            let base = map(bytes, page);
            // A type's size is a multiple of its alignment, so counting back from the page's end keeps it.
            let skip = page + if place == Place::End { inner - used } else { 0 };
            // SAFETY: `skip` + `used` lie inside the mapping, the inner pages are writable and aligned for T.
            let first = unsafe {
                let first = NonNull::new_unchecked(base.byte_add(skip)).cast::<T>();
                (0..len).for_each(|i| first.add(i).write(value));
                first
            };
            crate::record::made(first.as_ptr() as usize, used);
            Memory { base, bytes, first, len }
        }

        pub fn slice(&self) -> &[T] {
            // SAFETY: `len` elements from `first` on were written when the mapping was made.
            unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.len) }
        }

        pub fn slice_mut(&mut self) -> &mut [T] {
            // SAFETY: as in `slice`; the mapping belongs to `self`, which is borrowed mutably.
            unsafe { std::slice::from_raw_parts_mut(self.first.as_ptr(), self.len) }
        }
    }

    impl<T> Drop for Memory<T> {
        fn drop(&mut self) {
            if self.bytes == 0 {
                return;
            }
            crate::record::gone(self.first.as_ptr() as usize);
            let keep = |free: &RefCell<Free>| {
                let mut free = free.borrow_mut();
                let list = free.0.entry(self.bytes).or_default();
                let kept = self.bytes <= MOST && list.len() < KEPT;
                if kept {
                    list.push(self.base);
                }
                kept
            };
            // A thread that ends has no list any more.
            if !FREE.try_with(keep).unwrap_or(false) {
                // SAFETY: the mapping that `new` made; nothing refers to it any more.
                unsafe { libc::munmap(self.base, self.bytes) };
            }
        }
    }
}

#[cfg(not(unix))]
mod memory {
    use super::Place;

    pub struct Memory<T>(Vec<T>);

    impl<T: Copy> Memory<T> {
        pub fn empty() -> Self {
            Memory(Vec::new())
        }
        pub fn new(len: usize, value: T, _: Place) -> Self {
            Memory(vec![value; len])
        }
        pub fn slice(&self) -> &[T] {
            &self.0
        }
        pub fn slice_mut(&mut self) -> &mut [T] {
            &mut self.0
        }
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    /// The address is readable, asked of the kernel: a pipe takes bytes only from accessible memory.
    fn readable(address: *const u8) -> bool {
        let mut ends = [0; 2];
        // SAFETY: pipe writes two numbers; write of one byte at a bad address fails with EFAULT and does not fault.
        unsafe {
            assert_eq!(libc::pipe(ends.as_mut_ptr()), 0);
            let written = libc::write(ends[1], address.cast(), 1);
            ends.into_iter().for_each(|end| assert_eq!(libc::close(end), 0));
            written == 1
        }
    }

    #[test]
    fn one_byte_outside_is_inaccessible() {
        for len in [1, 3, 1024, 4097, 100_000] {
            for &at in Place::ALL {
                let array = with(at, || Guarded::of(&vec![7u16; len]));
                assert!(array.iter().all(|&x| x == 7) && array.len() == len);
                let range = array.as_ptr_range();
                let (first, end) = (range.start.cast::<u8>(), range.end.cast::<u8>());
                assert!(readable(first) && readable(end.wrapping_sub(1)));
                match at {
                    Place::End => assert!(!readable(end)),
                    Place::Start => assert!(!readable(first.wrapping_sub(1))),
                }
            }
        }
        assert!(Guarded::<f32>::of(&[]).is_empty());
        assert_eq!(place(), Place::End);
    }
}
