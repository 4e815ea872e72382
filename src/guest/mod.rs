//! Fixing the copy of a server so that it boots in the cloud: inspect, plan, apply, prove.
