//! The machine haul runs on: its programs and child processes.

pub mod child;
pub mod programs;
