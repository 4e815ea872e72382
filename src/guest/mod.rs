//! Fixing the copy of a server so that it boots in the cloud: inspect, plan, apply, prove.
//!
//! Everything up to the plan is read from the disk without mounting anything, and is data; only [`apply()`]
//! touches anything, and that is an overlay.

pub mod appliance;
pub mod apply;
pub mod builder;
pub mod by_host;
pub mod disk;
pub mod ext;
pub mod extended;
pub mod fat;
pub mod grub;
pub mod hook;
pub mod initramfs;
pub mod inspect;
pub mod install;
pub mod kernels;
pub mod linux;
pub mod loader;
pub mod mentions;
pub mod mounted;
pub mod os;
pub mod package;
pub mod partition;
pub mod plan;
pub mod prove;
pub mod say;
pub mod steps;
pub mod tree;
pub mod twin;
pub mod volume;

pub use appliance::first_process;
pub use apply::{Executor, Setup, apply};
pub use by_host::internal_entry;
pub use inspect::{Guest, inspect};
pub use plan::{Finding, Fix, Options, Plan, Severity, plan};
pub use prove::{Proof, prove};
