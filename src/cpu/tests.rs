//! Every kernel against the oracle in `reference.rs`: random inputs, a new seed each run.

mod harness;
mod sequences;
mod steps;
mod vectors;
