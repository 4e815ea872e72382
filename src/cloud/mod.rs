//! Typed, blocking clients of the clouds' APIs, and the credentials they sign with.

pub mod clock;
pub mod credentials;
pub mod tencent;

pub use clock::{Clock, SystemClock};
pub use credentials::{Credentials, KeySource};
