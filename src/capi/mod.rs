//! The C boundary: the only exported functions, each a few lines. Reads size-tagged structs,
//! converts them to the core's types, and keeps panics and errors on this side.

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod convert;
pub(crate) mod exports;
mod reader;
mod status;
pub(crate) mod types;
