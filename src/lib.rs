//! haul moves a running server, or a disk image, into the cloud.
//!
//! The modules follow the data's path, top to bottom; a module uses only those above it (`tests/layering.rs`).
//! docs/architecture.md draws the picture.

pub mod error;
pub mod unit;
pub mod monitor;
pub mod io;
pub mod host;
pub mod image;
pub mod layout;
pub mod manifest;
#[cfg(feature = "net")]
pub mod net;
#[cfg(feature = "net")]
pub mod store;
pub mod source;
pub mod sink;
pub mod pipeline;
pub mod boot;
pub mod guest;
#[cfg(feature = "net")]
pub mod cloud;
pub mod config;
pub mod preflight;
pub mod job;
#[cfg(feature = "net")]
pub mod lab;
pub mod cli;
