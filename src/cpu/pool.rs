//! Worker threads. The library has a pool of its own, so that it neither waits for nor slows the
//! host program's, and the calling thread always takes part in the work.

use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use rayon::{ThreadPool, ThreadPoolBuilder};

/// Workers of one process.
struct Workers {
    /// Threads do not survive a fork: a child that finds its parent's id here starts anew.
    process: u32,
    /// Threads that work on one call, the caller's included.
    threads: usize,
    /// `None` if the caller works alone.
    pool: Option<ThreadPool>,
}

static WORKERS: AtomicPtr<Workers> = AtomicPtr::new(null_mut());

/// The process's workers, made on first use. No lock is involved, since a lock held by another
/// thread at the time of a fork would stay locked in the child.
fn workers() -> &'static Workers {
    let process = std::process::id();
    let current = WORKERS.load(Ordering::Acquire);
    // SAFETY: non-null values come from `Box::leak` below and are never freed.
    if let Some(workers) = unsafe { current.as_ref() }
        && workers.process == process
    {
        return workers;
    }
    // The tests compare runs on 1, 2 and 3 threads, whatever the machine has.
    let threads = if cfg!(test) { 3 } else { wanted_threads() };
    let pool = (threads > 1)
        .then(|| {
            ThreadPoolBuilder::new()
                .num_threads(threads - 1)
                .thread_name(|index| format!("mlstm-{index}"))
                .build()
                .ok()
        })
        .flatten();
    // Without threads (a full process table) the caller works alone.
    let threads = if pool.is_some() { threads } else { 1 };
    let fresh = Box::into_raw(Box::new(Workers { process, threads, pool }));
    match WORKERS.compare_exchange(current, fresh, Ordering::AcqRel, Ordering::Acquire) {
        // A stale value is the parent's: its threads are gone, and dropping it would wait for them.
        // SAFETY: `fresh` is a leaked box.
        Ok(_) => unsafe { &*fresh },
        Err(_) => {
            // SAFETY: another thread was faster, so `fresh` was never shared.
            drop(unsafe { Box::from_raw(fresh) });
            workers()
        }
    }
}

/// Threads to use: the first variable that holds a positive number decides.
fn wanted_threads() -> usize {
    ["MLSTM_NUM_THREADS", "RAYON_NUM_THREADS", "OMP_NUM_THREADS"]
        .iter()
        .find_map(|name| {
            let value = std::env::var(name).ok()?;
            // OMP_NUM_THREADS may be a list, one entry per nesting level.
            value.split(',').next()?.trim().parse().ok().filter(|&count: &usize| count > 0)
        })
        .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from))
}

/// Threads that work on one call.
pub(crate) fn threads() -> usize {
    workers().threads
}

/// Runs `task(index, worker)` for every index below `count` on at most `threads` threads; `worker`
/// is below `threads` and no two tasks run at the same time with the same one. Which worker runs
/// a task is not fixed, so a task's result must not depend on it.
pub(crate) fn for_each(threads: usize, count: usize, task: impl Fn(usize, usize) + Sync) {
    let workers = workers();
    let threads = threads.min(workers.threads).min(count);
    let (Some(pool), true) = (&workers.pool, threads > 1) else {
        for index in 0..count {
            task(index, 0);
        }
        return;
    };
    let next = AtomicUsize::new(0);
    let work = |worker: usize| {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= count {
                return;
            }
            task(index, worker);
        }
    };
    pool.in_place_scope(|scope| {
        for worker in 1..threads {
            let work = &work;
            scope.spawn(move |_| work(worker));
        }
        work(0);
    });
}
