//! The C boundary: the only exported functions, each a few lines. Reads size-tagged structs,
//! converts them to the core's types, and keeps panics and errors on this side.

mod convert;
mod exports;
mod reader;
mod status;
mod types;
