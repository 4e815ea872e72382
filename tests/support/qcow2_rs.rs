//! qcow2 images read by the crate `qcow2-rs`: a judge that shares no code with haul's reader and writer.
//! It knows neither zstd nor extended L2 entries nor clusters of 512 bytes, refuses dirty images, and opens backing
//! files unasked.

use std::future::Future;
use std::path::Path;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use qcow2_rs::dev::Qcow2DevParams;
use qcow2_rs::utils::qcow2_setup_dev_sync;

/// Bytes handed over at a time, but for the last piece.
pub const PIECE: u64 = 1 << 20;

/// Reads the whole virtual disk of the image at `path`, in order, and hands each piece over with its offset.
/// Returns the virtual disk's size. Panics when qcow2-rs cannot read the image.
pub fn read_all(path: &Path, mut piece: impl FnMut(u64, &[u8])) -> u64 {
    let params = Qcow2DevParams::new(9, None, None, true, false);
    let dev =
        qcow2_setup_dev_sync(path, &params).unwrap_or_else(|e| panic!("qcow2-rs: {}: {e:?}", path.display()));
    ready(dev.qcow2_prep_io()).unwrap_or_else(|e| panic!("qcow2-rs: {}: {e:?}", path.display()));
    let size = dev.info.virtual_size();
    let mut buf = vec![0; usize::try_from(PIECE).unwrap()];
    for at in (0..size).step_by(buf.len()) {
        let want = usize::try_from(PIECE.min(size - at)).unwrap();
        let read = ready(dev.read_at(&mut buf[..want], at));
        assert_eq!(
            read.unwrap_or_else(|e| panic!("qcow2-rs: at {at}: {e:?}")),
            want,
            "qcow2-rs: short read at {at}"
        );
        piece(at, &buf[..want]);
    }
    size
}

/// Polls a future of qcow2-rs's synchronous engine, which does its reading inside `poll` and so is ready at once.
fn ready<F: Future>(future: F) -> F::Output {
    let mut future = pin!(future);
    for _ in 0..1000 {
        if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            return output;
        }
    }
    panic!("qcow2-rs: a synchronous read waits for something");
}
