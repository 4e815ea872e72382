//! Moves a source into a sink: threads read, hash and pack batches side by side, one thread puts them in order.
//!
//! Memory is a fixed pool of buffers: a batch needs one before it may be read, and gives it back once it was written.
//! Because a buffer is taken in the order of the disk, the batch everything waits for always has one.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{Error, Kind, Result};
use crate::io::batch::{Pack, PackedBatch};
use crate::io::{Pool, PoolBuf};
use crate::monitor::{Counter, Monitor};
use crate::sink::Sink;
use crate::source::BlockSource;
use crate::unit::{Extent, MIB, to_usize};

/// Bytes of batches in flight at most, unless that is fewer than two batches a worker.
const BUDGET: u64 = 48 * MIB;

/// How a copy runs.
pub struct Options<'a> {
    /// Worker threads.
    pub threads: usize,
    /// Where in the disk to begin: 0, or where a resumed job stands.
    pub from: u64,
    /// Set from outside to pause the copy: it settles and ends with [`Kind::Interrupted`].
    pub stop: &'a AtomicBool,
}

/// Hands out batches in the order of the disk, with a buffer each.
struct Tasks<'a> {
    source: &'a BlockSource,
    cursor: u64,
    sequence: u64,
    pool: &'a Arc<Pool>,
    stop: &'a AtomicBool,
}

struct Task {
    sequence: u64,
    extent: Extent,
    buf: PoolBuf,
}

impl Tasks<'_> {
    /// The next batch to read; `None` at the end, or when the copy stops.
    fn next(&mut self, monitor: &dyn Monitor) -> Result<Option<Task>> {
        if self.stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let Some(run) = self.source.next(self.cursor)? else { return Ok(None) };
        let extent = self.source.geometry().batch_at(run.start);
        let Some(buf) = self.pool.take() else { return Ok(None) };
        monitor.count(Counter::Skipped, extent.start - self.cursor);
        self.cursor = extent.end;
        self.sequence += 1;
        Ok(Some(Task { sequence: self.sequence - 1, extent, buf }))
    }
}

/// Copies everything of `source` from `options.from` on into `sink`.
pub fn run(
    source: &BlockSource,
    sink: &mut dyn Sink,
    options: &Options<'_>,
    monitor: &dyn Monitor,
) -> Result<()> {
    let geometry = source.geometry();
    let threads = options.threads.max(1);
    let buffers = to_usize(BUDGET / geometry.batch()).max(2 * threads);
    let pool = Pool::new(buffers, to_usize(geometry.batch()));
    let tasks = Tasks { source, cursor: options.from, sequence: 0, pool: &pool, stop: options.stop };
    let tasks = Mutex::new(tasks);
    let packers: Vec<_> = (0..threads).map(|_| sink.packer()).collect::<Result<_>>()?;
    let (done, packed) = mpsc::channel();

    let put = std::thread::scope(|scope| {
        let tasks = &tasks;
        for packer in packers {
            let done = done.clone();
            scope.spawn(move || work(tasks, packer, &done, source, monitor));
        }
        drop(done);
        let put = put_in_order(&packed, sink, monitor);
        pool.close();
        put
    });
    let tasks = tasks.into_inner().unwrap_or_else(PoisonError::into_inner);
    let expected = tasks.sequence;
    let put = put?;
    if options.stop.load(Ordering::Relaxed) {
        sink.settle()?;
        return Err(Error::new(
            Kind::Interrupted,
            "interrupted",
            format!("the copy of {} was paused", source.name()),
        )
        .because("a signal asked for it"));
    }
    if put != expected {
        return Err(Error::new(Kind::Internal, "pipeline.thread", "a worker thread panicked"));
    }
    if geometry.size > tasks.cursor {
        monitor.count(Counter::Skipped, geometry.size - tasks.cursor);
    }
    monitor.advance(geometry.size);
    Ok(())
}

type Done = Result<(u64, PackedBatch)>;

fn work(
    tasks: &Mutex<Tasks<'_>>,
    mut packer: Box<dyn Pack>,
    done: &Sender<Done>,
    source: &BlockSource,
    monitor: &dyn Monitor,
) {
    loop {
        let task = tasks.lock().unwrap_or_else(PoisonError::into_inner).next(monitor);
        let result = match task {
            Ok(None) => return,
            Ok(Some(task)) => source
                .read(task.extent, task.buf, monitor)
                .and_then(|batch| packer.pack(batch))
                .map(|batch| (task.sequence, batch)),
            Err(error) => Err(error),
        };
        let failed = result.is_err();
        if done.send(result).is_err() || failed {
            return;
        }
    }
}

/// Puts batches as their turn comes; returns how many it put.
fn put_in_order(packed: &Receiver<Done>, sink: &mut dyn Sink, monitor: &dyn Monitor) -> Result<u64> {
    let mut waiting = BTreeMap::new();
    let mut turn = 0;
    for result in packed {
        let (sequence, batch) = result?;
        waiting.insert(sequence, batch);
        while let Some(batch) = waiting.remove(&turn) {
            let end = batch.extent.end;
            sink.put(batch)?;
            monitor.advance(end);
            turn += 1;
        }
    }
    Ok(turn)
}
