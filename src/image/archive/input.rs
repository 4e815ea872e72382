//! A disk read from front to back, with a place for what went wrong below a decoder.

use std::cell::{Cell, RefCell};
use std::io::{self, BufRead, Read};
use std::rc::Rc;
use std::sync::Arc;

use super::damaged;
use crate::error::Error;
use crate::io::ReadAt;
use crate::unit::{MIB, to_usize};

/// Most bytes that may be read without anything coming of them: empty blocks and frames, and padding.
const MAX_IDLE: u64 = 64 * MIB;

/// What the stream knows of its input while a decoder owns it.
#[derive(Default)]
pub(super) struct State {
    /// Bytes taken so far.
    pub(super) consumed: Cell<u64>,
    /// Where the decoder last gave something.
    pub(super) useful: Cell<u64>,
    /// Why the last read failed: decoders pass an error's text on at best.
    pub(super) failed: RefCell<Option<Error>>,
}

/// The bytes of `source`, in order.
pub(super) struct Input {
    source: Arc<dyn ReadAt>,
    buf: Vec<u8>,
    /// The bytes of `buf` not taken yet.
    ready: std::ops::Range<usize>,
    step: usize,
    state: Rc<State>,
}

impl Input {
    /// `source`, read in pieces of `step` bytes.
    pub(super) fn new(source: Arc<dyn ReadAt>, step: usize) -> Self {
        Input { source, buf: Vec::new(), ready: 0..0, step, state: Rc::default() }
    }

    pub(super) fn state(&self) -> &Rc<State> {
        &self.state
    }

    fn fail(&self, error: Error) -> io::Error {
        let text = error.to_string();
        *self.state.failed.borrow_mut() = Some(error);
        io::Error::other(text)
    }

    /// Reads on behind what is ready; reads nothing at the end.
    fn fill(&mut self) -> io::Result<()> {
        let consumed = self.state.consumed.get();
        if consumed - self.state.useful.get() > MAX_IDLE {
            let what = format!("{MAX_IDLE} bytes that unpack to nothing");
            return Err(self.fail(damaged("archive.idle", &self.source.name(), consumed, what)));
        }
        let at = consumed + self.ready.len() as u64;
        let len = to_usize((self.source.size() - at).min(self.step as u64));
        if len == 0 {
            return Ok(());
        }
        self.buf.copy_within(self.ready.clone(), 0);
        self.ready = 0..self.ready.len();
        self.buf.resize(self.ready.end + len, 0);
        if let Err(error) = self.source.read_at(&mut self.buf[self.ready.end..], at) {
            return Err(self.fail(error));
        }
        self.ready.end += len;
        Ok(())
    }

    /// The next `n` bytes, or fewer at the end, without taking them.
    pub(super) fn peek(&mut self, n: usize) -> io::Result<&[u8]> {
        while self.ready.len() < n {
            let before = self.ready.len();
            self.fill()?;
            if self.ready.len() == before {
                break;
            }
        }
        let end = self.ready.end.min(self.ready.start + n);
        Ok(&self.buf[self.ready.start..end])
    }
}

impl Read for Input {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let ready = self.fill_buf()?;
        let n = ready.len().min(bytes.len());
        bytes[..n].copy_from_slice(&ready[..n]);
        self.consume(n);
        Ok(n)
    }
}

impl BufRead for Input {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.ready.is_empty() {
            self.fill()?;
        }
        Ok(&self.buf[self.ready.clone()])
    }

    fn consume(&mut self, n: usize) {
        let n = n.min(self.ready.len());
        self.ready.start += n;
        self.state.consumed.set(self.state.consumed.get() + n as u64);
    }
}
