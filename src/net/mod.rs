//! The one async runtime, and the one bridge from the threads of the data path to it.

use std::future::Future;
use std::sync::OnceLock;

use tokio::runtime::{Builder, Runtime};

use crate::error::{Error, Kind, Result};

/// The process's runtime, started at first use.
fn runtime() -> Result<&'static Runtime> {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    if let Some(runtime) = RUNTIME.get() {
        return Ok(runtime);
    }
    // The TLS library wants its cryptography named once per process; a second naming changes nothing.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let started =
        Builder::new_multi_thread().worker_threads(2).thread_name("net").enable_all().build().map_err(
            |error| {
                Error::new(Kind::Internal, "net.runtime", "cannot start the network threads").caused_by(error)
            },
        )?;
    Ok(RUNTIME.get_or_init(|| started))
}

/// Runs a future to its end from a thread of the data path. Never call it from async code.
pub fn block_on<T>(future: impl Future<Output = T>) -> Result<T> {
    Ok(runtime()?.block_on(future))
}

/// Starts a task that runs beside its caller.
pub fn spawn<T: Send + 'static>(
    future: impl Future<Output = T> + Send + 'static,
) -> Result<tokio::task::JoinHandle<T>> {
    Ok(runtime()?.spawn(future))
}

/// The body of an answer, which may be no longer than `limit` bytes.
pub async fn body(mut answer: reqwest::Response, limit: u64) -> Result<Vec<u8>> {
    let failed = |why: String| {
        Error::new(Kind::Network, "net.body", "the answer was cut short").because(why).retryable()
    };
    let mut bytes = Vec::new();
    while let Some(piece) = answer.chunk().await.map_err(|error| failed(error.without_url().to_string()))? {
        let total = u64::try_from(bytes.len() + piece.len()).unwrap_or(u64::MAX);
        if total > limit {
            return Err(Error::new(Kind::Network, "net.body", "the answer is too long")
                .because(format!("it is longer than {limit} bytes")));
        }
        bytes.extend_from_slice(&piece);
    }
    Ok(bytes)
}
