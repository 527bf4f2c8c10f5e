//! Worker threads. The library has its own, so that it neither waits for nor slows the host
//! program's, and the calling thread always takes part in the work.
//!
//! A call is over when the work is: a worker that the system has not woken by then never joins. A
//! general-purpose pool (rayon) waits for it instead, which for a step of 70 us on a warm state
//! cost more than a second core gains.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a worker without work, or a caller that waits for workers, looks again and again before
/// it sleeps: about what waking up costs. Generation calls come in quick succession.
const SPIN: Duration = Duration::from_micros(50);

/// More threads than any machine has cores are a mistake, and each costs workspace.
const MAX_THREADS: usize = 1024;

/// Workers of one process.
struct Workers {
    /// Threads do not survive a fork: a child that finds its parent's id here starts anew.
    process: u32,
    /// Threads that work on one call, the caller's included.
    threads: usize,
    /// Held by the caller that has the workers; another one works alone meanwhile.
    caller: Mutex<()>,
    desk: Mutex<Desk>,
    /// Number of the newest job, to be looked at without the lock.
    newest: AtomicU64,
    wake: Condvar,
    done: Condvar,
    spin: bool,
}

/// What caller and workers agree on, under a lock.
#[derive(Default)]
struct Desk {
    job: Option<Job>,
    number: u64,
    /// Workers that have joined the job so far, and those that are still at it.
    joined: usize,
    busy: usize,
}

/// A borrowed `Fn(worker)`, without its lifetime: `Workers::run` outlives every use.
#[derive(Clone, Copy)]
struct Job {
    work: *const (dyn Fn(usize) + Sync),
    /// Workers that may join.
    limit: usize,
}

// SAFETY: the function behind the pointer is Sync.
unsafe impl Send for Job {}

static WORKERS: AtomicPtr<Workers> = AtomicPtr::new(null_mut());

/// The process's workers, started on first use. The pointer is no lock, since a lock held by
/// another thread at the time of a fork would stay locked in the child.
fn workers() -> &'static Workers {
    let process = std::process::id();
    let current = WORKERS.load(Ordering::Acquire);
    // SAFETY: non-null values come from `Box::into_raw` below and are never freed once shared.
    if let Some(workers) = unsafe { current.as_ref() }
        && workers.process == process
    {
        return workers;
    }
    let fresh = Box::into_raw(Box::new(Workers {
        process,
        threads: wanted_threads(),
        caller: Mutex::default(),
        desk: Mutex::default(),
        newest: AtomicU64::new(0),
        wake: Condvar::new(),
        done: Condvar::new(),
        spin: !std::env::var("OMP_WAIT_POLICY").is_ok_and(|x| x.eq_ignore_ascii_case("passive")),
    }));
    // A stale value is the parent's: its threads do not exist here, and it stays as it is.
    if WORKERS.compare_exchange(current, fresh, Ordering::AcqRel, Ordering::Acquire).is_err() {
        // SAFETY: another thread was faster, so `fresh` was never shared.
        drop(unsafe { Box::from_raw(fresh) });
        return workers();
    }
    // SAFETY: shared now, so never freed.
    let workers = unsafe { &*fresh };
    for index in 1..workers.threads {
        let thread = std::thread::Builder::new().name(format!("mlstm-{index}"));
        // Without a thread (a full process table) the others do its work.
        let _ = thread.spawn(|| workers.serve());
    }
    workers
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
        .min(MAX_THREADS)
}

/// Locks; nothing panics while it holds one of these locks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Workers {
    /// Looks for `SPIN` whether the condition holds.
    fn spin_until(&self, condition: impl Fn() -> bool) {
        let start = Instant::now();
        while self.spin && !condition() && start.elapsed() < SPIN {
            for _ in 0..16 {
                std::hint::spin_loop();
            }
        }
    }

    /// A worker's life.
    fn serve(&self) {
        let mut seen = 0;
        loop {
            self.spin_until(|| self.newest.load(Ordering::Acquire) != seen);
            let mut desk = lock(&self.desk);
            let (job, worker) = loop {
                if desk.number != seen {
                    seen = desk.number;
                    if let Some(job) = desk.job.filter(|job| desk.joined < job.limit) {
                        desk.joined += 1;
                        desk.busy += 1;
                        break (job, desk.joined);
                    }
                }
                desk = self.wake.wait(desk).unwrap_or_else(PoisonError::into_inner);
            };
            drop(desk);
            // SAFETY: the caller waits until no worker is busy, so its function is still there.
            // It does not unwind: `for_each` catches panics.
            unsafe { (*job.work)(worker) };
            let mut desk = lock(&self.desk);
            desk.busy -= 1;
            if desk.busy == 0 {
                self.done.notify_one();
            }
        }
    }

    /// Runs `work(0)` here and `work(1..=limit)` on workers that come in time.
    fn run(&self, limit: usize, work: &(dyn Fn(usize) + Sync)) {
        // One job at a time: a second caller works alone rather than wait.
        let Ok(_caller) = self.caller.try_lock() else { return work(0) };
        let work_ptr: *const (dyn Fn(usize) + Sync + '_) = work;
        // SAFETY: only the lifetime changes; the job is taken back below before `work` ends.
        let work_ptr: *const (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(work_ptr) };
        {
            let mut desk = lock(&self.desk);
            desk.job = Some(Job { work: work_ptr, limit });
            desk.number += 1;
            desk.joined = 0;
            self.newest.store(desk.number, Ordering::Release);
        }
        self.wake.notify_all();
        work(0);
        let mut desk = lock(&self.desk);
        desk.job = None;
        if desk.busy > 0 {
            drop(desk);
            self.spin_until(|| lock(&self.desk).busy == 0);
            desk = lock(&self.desk);
        }
        while desk.busy > 0 {
            desk = self.done.wait(desk).unwrap_or_else(PoisonError::into_inner);
        }
    }
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
    if threads <= 1 {
        for index in 0..count {
            task(index, 0);
        }
        return;
    }
    let next = AtomicUsize::new(0);
    let panicked = AtomicBool::new(false);
    workers.run(threads - 1, &|worker| {
        let work = || {
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= count {
                    return;
                }
                task(index, worker);
            }
        };
        // A panic may not leave while others still use what this call has borrowed.
        if catch_unwind(AssertUnwindSafe(work)).is_err() {
            panicked.store(true, Ordering::Relaxed);
        }
    });
    assert!(!panicked.into_inner(), "a task of the CPU backend panicked");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_index_runs_once_with_callers_side_by_side() {
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for count in 0..400 {
                        let runs: Vec<_> = (0..count).map(|_| AtomicUsize::new(0)).collect();
                        for_each(3, count, |index, worker| {
                            assert!(worker < 3);
                            runs[index].fetch_add(1, Ordering::Relaxed);
                        });
                        assert!(runs.iter().all(|run| run.load(Ordering::Relaxed) == 1));
                    }
                });
            }
        });
    }

    #[test]
    fn a_panic_reaches_the_caller_and_leaves_the_workers_usable() {
        let outcome = catch_unwind(|| for_each(2, 8, |index, _| assert!(index != 5, "five")));
        assert!(outcome.is_err());
        let sum = AtomicUsize::new(0);
        for_each(2, 8, |index, _| {
            sum.fetch_add(index, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 28);
    }
}
