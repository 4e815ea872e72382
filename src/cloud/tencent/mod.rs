//! Tencent Cloud, public and private (TCE) editions: signatures, the API 3.0 client, and CVM's images and instances.

pub mod client;
pub mod cvm;
pub mod import;
pub mod os;
pub mod sign;
pub mod wire;

pub use client::{Client, Endpoint, Settings};
pub use cvm::{Cvm, Edition};
