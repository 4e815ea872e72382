//! CVM's image and instance actions.
