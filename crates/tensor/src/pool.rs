//! The execution context of every kernel: an instruction set and a pool of worker threads.
//!
//! A parallel region hands out task numbers `0..tasks` to the caller and to those workers that arrive before the
//! work has run out. Workers spin briefly for the next region and then park, so that back-to-back regions cost
//! about a microsecond and an idle pool costs nothing.
//!
//! One atomic word `state` holds the generation of the current region, whether it is open, and how many workers
//! have joined it. A worker joins by compare-and-swap while the region is open; the caller closes it and waits
//! until the joined count is zero before it returns, so a job never outlives its borrowed closure. A worker that
//! is asleep or was preempted before joining is simply not waited for.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

use crate::{AlignedF32, Error, Isa, Result};

/// How long a worker looks for the next region before it parks.
const SPIN: Duration = Duration::from_micros(50);
/// `state`: the region accepts workers.
const OPEN: u64 = 1;
/// `state`: the pool is being dropped.
const QUIT: u64 = 2;
/// `state`: one joined worker; the count has 16 bits from here.
const JOINED: u64 = 1 << 8;
const JOINED_MASK: u64 = 0xffff << 8;
/// `state`: one generation.
const GENERATION: u64 = 1 << 24;
/// More threads than this are refused, well below what the joined count can hold.
const MAX_THREADS: usize = 1024;
/// Scratch buffers kept for reuse; concurrent callers beyond it allocate their own.
const KEPT_SCRATCH: usize = 4;

/// Takes the slot of the participant (`0..threads`, the caller is 0) and the task number.
type Task = dyn Fn(usize, usize) + Sync;

/// The region that is running: a borrowed closure whose lifetime is erased, see the module's head.
#[derive(Clone, Copy)]
struct Job {
    run: *const Task,
    tasks: usize,
}

struct Shared {
    state: AtomicU64,
    job: UnsafeCell<Option<Job>>,
    next: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` is written only by the caller that holds the `submit` lock while no worker is joined, and read only
// by workers that joined after the release store that opened the region; the closure behind it is `Sync`.
unsafe impl Sync for Shared {}
// SAFETY: the raw pointer in `job` is only used under the protocol above, from whichever thread.
unsafe impl Send for Shared {}

struct Worker {
    handle: Option<JoinHandle<()>>,
    thread: Thread,
    parked: Arc<AtomicBool>,
}

/// Execution context of the kernels: which instructions they may use and which threads they run on.
///
/// Shareable between threads. Two callers at the same time are safe: the second one runs its region alone.
pub struct Cpu {
    isa: Isa,
    shared: Arc<Shared>,
    workers: Vec<Worker>,
    submit: Mutex<()>,
    scratch: Mutex<Vec<AlignedF32>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // The data behind our locks is valid at every step, so a panic elsewhere does not spoil it.
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Cpu {
    /// A context with the best instruction set of this machine and `threads` threads, the caller included.
    /// Zero asks for as many threads as the system offers. On a platform without threads, such as WebAssembly, the
    /// caller is the only one, whatever is asked for.
    ///
    /// # Errors
    /// [`Error::Thread`] where the system refuses a thread, [`Error::Value`] for an absurd number.
    pub fn new(threads: usize) -> Result<Cpu> {
        Cpu::with_isa(Isa::detect(), threads)
    }

    /// The same with a given instruction set, for tests and comparisons.
    ///
    /// # Errors
    /// Also [`Error::Value`] where this machine lacks the instruction set.
    pub fn with_isa(isa: Isa, threads: usize) -> Result<Cpu> {
        if !isa.is_available() {
            return Err(Error::Value { op: "cpu", what: format!("this machine has no {isa} instructions") });
        }
        let threads = match threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS),
            n if n > MAX_THREADS => {
                return Err(Error::Value {
                    op: "cpu",
                    what: format!("{n} threads, the most is {MAX_THREADS}"),
                });
            }
            n => n,
        };
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            next: AtomicUsize::new(0),
            panic: Mutex::new(None),
        });
        let mut cpu =
            Cpu { isa, shared, workers: Vec::new(), submit: Mutex::new(()), scratch: Mutex::new(Vec::new()) };
        for slot in 1..threads {
            let parked = Arc::new(AtomicBool::new(false));
            let (shared, flag) = (cpu.shared.clone(), parked.clone());
            // On an error the workers started so far are joined by dropping `cpu`.
            let spawned = std::thread::Builder::new()
                .name(format!("pocketglm-{slot}"))
                .spawn(move || work(&shared, &flag, slot));
            let handle = match spawned {
                Ok(handle) => handle,
                // Where the platform has no threads at all, the caller does everything.
                Err(source) if source.kind() == std::io::ErrorKind::Unsupported => break,
                Err(source) => return Err(Error::Thread { index: slot, threads, source }),
            };
            let thread = handle.thread().clone();
            cpu.workers.push(Worker { handle: Some(handle), thread, parked });
        }
        Ok(cpu)
    }

    /// The instruction set that kernels use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Number of threads, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `f(0)`, ..., `f(tasks - 1)`, each once, on the caller and the workers; returns when all are done.
    ///
    /// A region inside a region, or beside one of another thread, runs on its caller alone. A panic in a task is
    /// raised again here after every task that was running has ended; tasks not yet started are left out.
    pub fn parallel(&self, tasks: usize, f: &(dyn Fn(usize) + Sync)) {
        self.parallel_slots(tasks, &|_, task| f(task));
    }

    /// Like [`Cpu::parallel`]; `f` also gets its participant's slot in `0..threads`, which no other participant of
    /// this region has: an index of scratch memory.
    pub(crate) fn parallel_slots(&self, tasks: usize, f: &(dyn Fn(usize, usize) + Sync)) {
        let guard = match self.submit.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        };
        let Some(_guard) = guard.filter(|_| tasks > 1 && !self.workers.is_empty()) else {
            (0..tasks).for_each(|task| f(0, task));
            return;
        };
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. Workers call through the pointer only while joined, and this function
        // does not return before the region is closed and nobody is joined.
        let run = unsafe { std::mem::transmute::<*const (dyn Fn(usize, usize) + Sync + '_), *const Task>(f) };
        let job = Job { run, tasks };
        // SAFETY: the last region was closed and left by all before its caller gave back `submit`, so no one reads.
        unsafe { *shared.job.get() = Some(job) };
        shared.next.store(0, Ordering::Relaxed);
        let generation = shared.state.load(Ordering::Relaxed) & !(GENERATION - 1);
        shared.state.store(generation.wrapping_add(GENERATION) | OPEN, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        for worker in self.workers.iter().take(tasks - 1) {
            if worker.parked.swap(false, Ordering::SeqCst) {
                worker.thread.unpark();
            }
        }
        run_tasks(shared, job, 0);
        shared.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0u32;
        while shared.state.load(Ordering::Acquire) & JOINED_MASK != 0 {
            // A worker may have lost its core in the middle of a task; then the core is better given away.
            spins += 1;
            if spins > 2000 { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
        if let Some(payload) = lock(&shared.panic).take() {
            resume_unwind(payload);
        }
    }

    /// A buffer of at least `len` floats of unspecified contents, kept by this context for the next kernel.
    pub(crate) fn scratch(&self, len: usize) -> Result<Scratch<'_>> {
        let kept = {
            let mut kept = lock(&self.scratch);
            let best = (0..kept.len()).max_by_key(|&i| kept[i].len());
            best.map(|i| kept.swap_remove(i))
        };
        let buffer = match kept {
            Some(buffer) if buffer.len() >= len => buffer,
            // The old buffer is freed first: its contents are of no use and both together might not fit.
            old => {
                drop(old);
                AlignedF32::working(len)?
            }
        };
        Ok(Scratch { cpu: self, buffer })
    }

    /// Bytes of scratch memory that this context keeps for reuse at the moment.
    pub fn scratch_bytes(&self) -> usize {
        lock(&self.scratch).iter().map(|b| b.len() * 4).sum()
    }

    /// Frees the scratch memory that is kept for reuse.
    pub fn trim(&self) {
        lock(&self.scratch).clear();
    }
}

impl std::fmt::Debug for Cpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cpu").field("isa", &self.isa).field("threads", &self.threads()).finish()
    }
}

impl Drop for Cpu {
    fn drop(&mut self) {
        self.shared.state.fetch_or(QUIT, Ordering::SeqCst);
        for worker in &mut self.workers {
            worker.thread.unpark();
            if let Some(handle) = worker.handle.take() {
                // A worker catches the panics of its tasks, so joining cannot fail in a way worth reporting.
                let _ = handle.join();
            }
        }
    }
}

/// A borrowed scratch buffer; goes back to its [`Cpu`] when dropped.
pub(crate) struct Scratch<'a> {
    cpu: &'a Cpu,
    buffer: AlignedF32,
}

impl std::ops::Deref for Scratch<'_> {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.buffer
    }
}

impl std::ops::DerefMut for Scratch<'_> {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.buffer
    }
}

impl Drop for Scratch<'_> {
    fn drop(&mut self) {
        let mut kept = lock(&self.cpu.scratch);
        if kept.len() < KEPT_SCRATCH {
            kept.push(std::mem::take(&mut self.buffer));
        }
    }
}

/// Claims and runs tasks until none is left; a panic is kept for the caller and ends the claiming.
fn run_tasks(shared: &Shared, job: Job, slot: usize) {
    let result = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: the caller or a joined worker is here, so the closure is still borrowed by `parallel_slots`.
        let run = unsafe { &*job.run };
        loop {
            let task = shared.next.fetch_add(1, Ordering::Relaxed);
            if task >= job.tasks {
                break;
            }
            run(slot, task);
        }
    }));
    if let Err(payload) = result {
        // Adding instead of storing would overflow only after 2^63 claims.
        shared.next.store(job.tasks, Ordering::Relaxed);
        lock(&shared.panic).get_or_insert(payload);
    }
}

/// The life of a worker.
fn work(shared: &Shared, parked: &AtomicBool, slot: usize) {
    let mut seen = 0;
    let mut idle_since = Instant::now();
    loop {
        let state = shared.state.load(Ordering::Acquire);
        if state & QUIT != 0 {
            return;
        }
        let generation = state / GENERATION;
        if state & OPEN != 0 && generation != seen {
            let joined = shared.state.compare_exchange_weak(
                state,
                state + JOINED,
                Ordering::AcqRel,
                Ordering::Relaxed,
            );
            if joined.is_ok() {
                seen = generation;
                // SAFETY: joined, so the caller neither writes the job nor returns until the count goes down.
                if let Some(job) = unsafe { *shared.job.get() } {
                    run_tasks(shared, job, slot);
                }
                shared.state.fetch_sub(JOINED, Ordering::Release);
                idle_since = Instant::now();
            }
            continue;
        }
        for _ in 0..8 {
            std::hint::spin_loop();
        }
        if idle_since.elapsed() > SPIN {
            parked.store(true, Ordering::SeqCst);
            fence(Ordering::SeqCst);
            // Anything that changed before the flag was visible is seen here; after it, the caller unparks.
            let now = shared.state.load(Ordering::SeqCst);
            if now & QUIT == 0 && (now & OPEN == 0 || now / GENERATION == seen) {
                std::thread::park();
            }
            parked.store(false, Ordering::SeqCst);
            idle_since = Instant::now();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    #[test]
    fn every_task_runs_once_whatever_the_threads() {
        for threads in [1, 2, 3, 8] {
            let cpu = Cpu::new(threads).unwrap();
            for tasks in [0, 1, 2, 3, 100] {
                let counts: Vec<AtomicU32> = (0..tasks).map(|_| AtomicU32::new(0)).collect();
                cpu.parallel(tasks, &|i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn slots_of_a_region_are_not_shared() {
        let cpu = Cpu::new(4).unwrap();
        let busy: Vec<AtomicBool> = (0..cpu.threads()).map(|_| AtomicBool::new(false)).collect();
        for _ in 0..50 {
            cpu.parallel_slots(64, &|slot, _| {
                assert!(!busy[slot].swap(true, Ordering::SeqCst));
                std::hint::spin_loop();
                busy[slot].store(false, Ordering::SeqCst);
            });
        }
    }

    #[test]
    fn regions_after_a_pause_wake_parked_workers() {
        let cpu = Cpu::new(2).unwrap();
        for _ in 0..5 {
            std::thread::sleep(Duration::from_millis(2));
            // Two tasks that wait for each other end only if the parked worker takes one.
            let arrived = AtomicU32::new(0);
            cpu.parallel(2, &|_| {
                arrived.fetch_add(1, Ordering::SeqCst);
                while arrived.load(Ordering::SeqCst) < 2 {
                    std::thread::yield_now();
                }
            });
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_stays_usable() {
        let cpu = Cpu::new(2).unwrap();
        for bad in [0, 5, 31] {
            let caught = catch_unwind(AssertUnwindSafe(|| {
                cpu.parallel(32, &|i| assert!(i != bad, "task {i} fails"));
            }));
            let payload = caught.unwrap_err();
            assert_eq!(payload.downcast_ref::<String>().unwrap(), &format!("task {bad} fails"));
            let sum = AtomicUsize::new(0);
            cpu.parallel(10, &|i| {
                sum.fetch_add(i, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 45);
        }
    }

    #[test]
    fn nested_and_concurrent_regions_end() {
        let cpu = Cpu::new(2).unwrap();
        let sum = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        cpu.parallel(3, &|_| {
                            cpu.parallel(2, &|_| {
                                sum.fetch_add(1, Ordering::Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(sum.into_inner(), 4 * 100 * 3 * 2);
    }

    #[test]
    fn scratch_is_reused_and_can_be_freed() {
        let cpu = Cpu::new(1).unwrap();
        let first = cpu.scratch(1000).unwrap().as_ptr();
        assert_eq!(cpu.scratch(500).unwrap().as_ptr(), first);
        assert_eq!(cpu.scratch_bytes(), 4000);
        cpu.trim();
        assert_eq!(cpu.scratch_bytes(), 0);
    }

    #[test]
    fn absurd_thread_counts_are_refused() {
        assert!(matches!(Cpu::new(1 << 20), Err(Error::Value { op: "cpu", .. })));
    }
}
