//! A request's body on its way out: in pieces, at the rate allowed, with a note of when the last piece left.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures::Stream;
use hyper::body::{Frame, SizeHint};
use tokio::time::Instant;

use crate::error::{Error, Result};
use crate::store::Body;
use crate::unit::Extent;

/// Bytes handed over at once where nothing limits the rate.
const PIECE: u64 = 1 << 20;

/// When a transfer last moved.
#[derive(Clone)]
pub struct Progress(Arc<Mutex<Instant>>);

impl Progress {
    pub fn new() -> Self {
        Progress(Arc::new(Mutex::new(Instant::now())))
    }

    fn last(&self) -> Instant {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn touch(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// Returns once nothing has moved for `limit`.
    pub async fn stalled(&self, limit: Duration) {
        let mut last = self.last();
        loop {
            tokio::time::sleep_until(last + limit).await;
            let now = self.last();
            if now == last {
                return;
            }
            last = now;
        }
    }
}

type Pieces = Pin<Box<dyn Stream<Item = Result<Bytes>> + Send + Sync>>;

/// The body as the HTTP client polls it.
pub struct Sending {
    pieces: Pieces,
    left: u64,
}

impl Sending {
    pub fn new(body: Body, progress: Progress) -> Self {
        let left = body.len();
        let pieces = futures::stream::try_unfold((body, 0, progress), |(body, at, progress)| async move {
            if at == body.len() {
                return Ok(None);
            }
            let (len, wait) = match &body.limiter {
                Some(limiter) => {
                    let begin = if at == 0 { limiter.begin() } else { Duration::ZERO };
                    let (len, wait) = limiter.next(body.len() - at);
                    (len, begin.max(wait))
                }
                None => (PIECE, Duration::ZERO),
            };
            if !wait.is_zero() {
                tokio::time::sleep(wait).await;
            }
            let range = Extent::at(at, len).intersect(Extent::new(0, body.len()));
            let piece = if body.in_memory() {
                body.read(range)?
            } else {
                let body = body.clone();
                tokio::task::spawn_blocking(move || body.read(range)).await.map_err(|error| {
                    Error::new(crate::error::Kind::Internal, "net.task", "a reading task failed")
                        .caused_by(error)
                })??
            };
            progress.touch();
            Ok(Some((piece, (body, range.end, progress))))
        });
        Sending { pieces: Box::pin(pieces), left }
    }
}

impl hyper::body::Body for Sending {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>>>> {
        let piece = std::task::ready!(self.pieces.as_mut().poll_next(cx));
        if let Some(Ok(bytes)) = &piece {
            self.left = self.left.saturating_sub(bytes.len() as u64);
        }
        Poll::Ready(piece.map(|piece| piece.map(Frame::data)))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}
